"""Limits the size of a model by that of its weights, since a configuration of any size is built before weights load."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from nsnet.errors import WeightsError

FACTOR: Final = 8
"""Largest ratio of the model's bytes to those of its weights, which may have half precision; blocks are built twice."""
FREE_BYTES: Final = 2**26
"""Bytes allowed in addition, because buffers are in no file."""
TENSOR_BYTES: Final = 2**12
"""Minimum bytes that each tensor counts, including its module: building many layers also takes time."""
CONSTRUCTORS: Final = (
    torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.rand, torch.randn, torch.arange, torch.linspace,
)  # fmt: skip
"""Functions by which modules create tensors, other than by copying."""


class ModelSize(TorchFunctionMode):
    """Limits the bytes of tensors that this thread creates in a `with` block. Raises `WeightsError` above the limit.

    weights: files, or folders of files, whose size determines the limit. Tensors on the device `meta` count too.
    """

    def __init__(self, weights: Iterable[Path]) -> None:
        super().__init__()
        files = [file for path in weights for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
        self._max_bytes = FREE_BYTES + FACTOR * sum(file.stat().st_size for file in files)
        self._bytes_left = self._max_bytes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONSTRUCTORS:
            meta_kwargs = {name: value for name, value in kwargs.items() if name not in ("generator", "out")}
            described = func(*args, **{**meta_kwargs, "device": "meta"})
            self._bytes_left -= max(TENSOR_BYTES, described.numel() * described.itemsize)
            if self._bytes_left < 0:
                raise WeightsError(
                    f"the configuration describes a model of more than {self._max_bytes:,} bytes, the limit for its "
                    "weight files: use the configuration and the weights of one model"
                )
        return func(*args, **kwargs)
