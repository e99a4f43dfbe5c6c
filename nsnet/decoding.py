"""Greedy decoding of a batch of captions in tensors of fixed size, on CUDA by replayed graphs.

Dimensions: B rows (images), h heads of width d, L layers, N image tokens, T tokens of a caption at most.

A step of decoding is hundreds of small kernels, whose launches take longer than their work. Keys and values therefore
stay at fixed addresses, so that a step can be captured once as a CUDA graph and launched as a whole; and the host asks
only now and then whether captions have ended, because each question waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

CUDA_CHECK_STEPS: Final = 8
"""`check_steps` on CUDA. Each question waits for the device; a later one costs steps of rows that have ended."""
MAX_GRAPHS: Final = 1024
"""Maximum number of captured graphs, about 1 MB each; further pairs of batch size and position run without one."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes of a `CaptionBatch`."""

    rows: int
    layers: int
    heads: int
    head_width: int
    image_tokens: int
    max_tokens: int
    """T."""
    dtype: torch.dtype
    """Of keys and values."""


class CaptionBatch:
    """Tensors of a batch of captions. A step works on the first rows of each."""

    def __init__(self, shape: BatchShape, device: torch.device) -> None:
        layers, rows, heads, width = shape.layers, shape.rows, shape.heads, shape.head_width
        self.shape, self.device = shape, device
        self.image = torch.empty((layers, 2, rows, heads, shape.image_tokens, width), dtype=shape.dtype, device=device)
        """(L, 2, B, h, N, d): keys and values of the image tokens."""
        self.words = torch.empty((layers, 2, rows, heads, shape.max_tokens, width), dtype=shape.dtype, device=device)
        """(L, 2, B, h, T, d): keys and values of the caption; step t writes position t."""
        self.last = torch.empty(rows, dtype=torch.int64, device=device)
        """(B,): the newest token of each row."""
        self.ended = torch.empty(rows, dtype=torch.bool, device=device)
        """(B,): whether the row has its end."""
        self.written = torch.empty((rows, shape.max_tokens), dtype=torch.int64, device=device)
        """(B, T): the tokens so far."""

    def keep(self, rows: torch.Tensor, positions: int) -> None:
        """Move these rows, (kept,) int64, to the front, with this number of decoded positions."""
        for layer in (*self.image, *self.words[..., :positions, :]):
            layer[:, : len(rows)] = layer.index_select(1, rows)
        for tensor in (self.last, self.ended, self.written):
            tensor[: len(rows)] = tensor.index_select(0, rows)


Step = Callable[[CaptionBatch, int, int], None]
"""Decodes one position of the first rows of a batch: (batch, rows, position)."""


class StepRunner:
    """Runs steps one by one. With `graphs` (CUDA only) it captures a step when it is run for the second time.

    The first time a step runs as usual, which lets libraries initialise what must not happen during a capture. Graphs
    share one memory pool: they never run at the same time, and what one leaves for the next is in the batch, outside
    of the pool. The batch is kept for the next call, because graphs read and write at its addresses.
    """

    def __init__(self, *, graphs: bool = False, check_steps: int = 1) -> None:
        """check_steps: steps between two questions of the host how many captions have not ended."""
        self.graphs, self.check_steps = graphs, check_steps
        self._kept: CaptionBatch | None = None
        self._seen: set[tuple[int, int]] = set()
        self._captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def batch(self, shape: BatchShape, device: torch.device) -> CaptionBatch:
        """Return a batch of this shape; with graphs the same one as before if it is large enough."""
        if not self.graphs:
            return CaptionBatch(shape, device)
        if (
            self._kept is None
            or replace(self._kept.shape, rows=shape.rows) != shape
            or self._kept.shape.rows < shape.rows
        ):
            self._captured.clear()  # graphs of the old batch's addresses, which are free from now on
            self._seen.clear()
            self._pool = None  # torch takes a pool whose graphs are all gone for no new one
            self._kept = None  # before the new batch needs the memory
            self._kept = CaptionBatch(shape, device)
        return self._kept

    def run(self, step: Step, batch: CaptionBatch, rows: int, position: int) -> None:
        """Run a step once."""
        if not self.graphs:
            step(batch, rows, position)
            return
        key = (rows, position)
        if key in self._captured:
            self._captured[key].replay()
        elif key in self._seen and len(self._captured) < MAX_GRAPHS:
            self._captured[key] = self._capture(step, batch, rows, position)
            self._captured[key].replay()
        else:
            self._run_beside(step, batch, rows, position)
            self._seen.add(key)

    def _run_beside(self, step: Step, batch: CaptionBatch, rows: int, position: int) -> None:
        """Run on the stream of captures, since libraries keep a workspace for each stream."""
        current = torch.cuda.current_stream(batch.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(batch.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step(batch, rows, position)
        current.wait_stream(self._stream)

    def _capture(self, step: Step, batch: CaptionBatch, rows: int, position: int) -> torch.cuda.CUDAGraph:
        """Record the kernels of a step; a capture does not run them."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile, for example to copy: their calls must not fail
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step(batch, rows, position)
        return graph


def decode(batch: CaptionBatch, rows: int, step: Step, runner: StepRunner, *, first: int, padding: int) -> torch.Tensor:
    """Decode the first rows of a batch, whose `image` is filled, and return their tokens (rows, steps) int64.

    A row starts from the token `first`, which is not returned, and has `padding` after its end. As soon as at most half
    of the rows decode, the others leave the batch: rows that ended early cost little. There may be up to
    `runner.check_steps` - 1 more steps than the longest row needs.
    """
    batch.last.fill_(first)
    batch.ended.fill_(False)
    batch.written.fill_(padding)
    origin = torch.arange(rows, device=batch.device)  # of each row of the batch, its row in the result
    result = torch.full((rows, batch.shape.max_tokens), padding, device=batch.device)
    steps = 0
    while steps < batch.shape.max_tokens:
        runner.run(step, batch, rows, steps)
        steps += 1
        if steps % runner.check_steps:
            continue
        open_rows = rows - int(batch.ended[:rows].sum())
        if open_rows == 0:
            break
        fewer = rows
        while open_rows <= fewer // 2:  # halves, so that few batch sizes occur: each needs its own graphs
            fewer //= 2
        if fewer < rows:
            result.index_copy_(0, origin, batch.written[:rows])
            kept = torch.argsort(batch.ended[:rows].to(torch.uint8), stable=True)[:fewer]  # open rows first, in order
            batch.keep(kept, steps)
            origin, rows = origin[kept], fewer
    result.index_copy_(0, origin, batch.written[:rows])
    return result[:, :steps]
