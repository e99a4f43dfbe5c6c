"""The first stage: turn an image's bytes into patches, thumbnail and facts. CPU only, no torch."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Final

import pyarrow as pa

from jobs.cluster.shares import ROWS_PER_BLOCK
from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.outages import Fetcher
from jobs.pipeline.patience import Patience
from jobs.pipeline.pixels import PixelColumn, sides
from jobs.pipeline.poison import Remembered
from jobs.pipeline.rows import ProgressReporter, RowDicts, failed, to_table
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.reading import Fetched
from jobs.storage.uris import Uri
from nsnet.errors import ImageError, ObjectChangedError
from nsnet.patches import SCORING_SEED, assemble_mosaic
from nsnet.preparation import PreparationConfig, Prepared

BYTES_PER_BLOCK: Final = 32 * 2**20
"""Most file bytes of a block, unless a single file is larger: about a second of decoding. A task holds two blocks."""
UNKNOWN_BYTES: Final = 2**20
"""Assumed size of a file whose size is unknown."""
Decode = Callable[[bytes, str, str, int], Prepared | None]
"""Decodes an image, given its bytes, their hash, the transform and its seed; None: it timed out."""
FetchResult = tuple[Fetched | ImageError, int]
"""Bytes or the error of an image, and its number of requests."""


@cache
def _patience(config: PreparationConfig, board_name: str | None) -> Patience:
    """The worker process's decoder with one guarded child. Ray reuses worker processes, so it serves many blocks."""
    return Patience(GuardedDecoder(config), ProgressReporter(board_name=board_name))


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Fetch, hash, decode, transform, select patches, make the thumbnail: one pass over the bytes, CPU only, no torch.

    A row whose known caption is of the same bytes gets no thumbnail. A row may have a `transform`, and a `slot_seed`
    that orders its mosaic instead of scoring's. Raises `OutageError` when an outage of the images' store lasts longer
    than `outage_seconds`, because failing rows of sound images would be worse.
    """

    config: PreparationConfig
    schema: pa.Schema
    """Columns of the result; `mosaic` and `thumbnail` are binary."""
    report: ProgressReporter = field(default_factory=ProgressReporter)
    source: Uri | None = None
    """URI of the source. An image counts as missing only if the source exists."""
    outage_seconds: float = OUTAGE_SECONDS
    remembered: Remembered = field(default_factory=dict)
    """Failures of earlier runs, which are not decoded again."""

    def __call__(self, table: pa.Table) -> pa.Table:
        manifest = table.to_pylist()
        return self._prepared(manifest, self._fetch(manifest))

    def in_blocks(self, table: pa.Table) -> Iterator[pa.Table]:
        """Prepare a long table; yields blocks as they are prepared, and fetches the next one in the meantime."""
        manifests: list[RowDicts] = [block.to_pylist() for block in self._blocks(table)]
        ahead = ThreadPoolExecutor(1)
        try:
            fetching = ahead.submit(self._fetch, next(iter(manifests), []))
            for manifest, following in pairwise([*manifests, []]):
                fetched = fetching.result()
                fetching = ahead.submit(self._fetch, following)
                yield self._prepared(manifest, fetched)
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)  # after an error, an outage could delay its end by minutes

    def _blocks(self, table: pa.Table) -> list[pa.Table]:
        """Cut a table into blocks of `ROWS_PER_BLOCK` rows, or fewer if their files exceed `BYTES_PER_BLOCK`."""
        starts, held = [0], 0
        for i, size in enumerate(table.column("size_bytes").to_pylist()):
            size = UNKNOWN_BYTES if size is None else size
            fetched = size if size <= self.config.limits.max_bytes else 0
            rows = i - starts[-1]
            if rows and (rows == ROWS_PER_BLOCK or held + fetched > BYTES_PER_BLOCK):
                starts.append(i)
                held = 0
            held += fetched
        return [table.slice(start, end - start) for start, end in pairwise([*starts, table.num_rows]) if end > start]

    def _fetch(self, manifest: RowDicts) -> list[FetchResult]:
        fetcher = Fetcher(
            max_bytes=self.config.limits.max_bytes, source=self.source, outage_seconds=self.outage_seconds
        )
        return fetcher.fetch(manifest)

    def _prepared(self, manifest: RowDicts, fetched: list[FetchResult]) -> pa.Table:
        """The block of these images. Slow images are tried again after the others."""
        columns = {name: PixelColumn(len(manifest), side) for name, side in sides(self.config).items()}
        patience = _patience(self.config, self.report.board_name)
        patience.remembered = self.remembered
        done: list[dict[str, Any] | None] = [None] * len(manifest)
        decode: Decode
        for decode in (patience.first, patience.again):
            for i, (row, result) in enumerate(zip(manifest, fetched, strict=True)):
                if done[i] is None:
                    done[i] = self._row(i, row, result, decode, columns)
        patience.settle()
        rows = [row for row in done if row is not None]
        for i, row in enumerate(rows):
            if row["status"] == "failed":
                _blank(i, row, columns)
        self.report.add(
            prepared=len(rows),
            asked_again=sum(row["requests"] > 1 for row in rows),
            failed=sum(row["status"] == "failed" for row in rows),
        )
        return to_table(rows, self.schema, {name: column.to_arrow() for name, column in columns.items()})

    def _row(
        self,
        i: int,
        row: dict[str, Any],
        result: FetchResult,
        decode: Decode,
        columns: Mapping[str, PixelColumn],
    ) -> dict[str, Any] | None:
        """The row of an image, whose pixels are written into row `i` of the columns; None if `decode` timed out."""
        fetched, requests = result
        row = {**row, "requests": requests}
        if isinstance(fetched, ImageError):
            return failed(row, fetched)
        content_hash = hashlib.sha256(fetched.data).hexdigest()
        row |= {"content_hash": content_hash, "size_bytes": len(fetched.data)}
        if row.get("expected_hash") not in (None, content_hash):
            return failed(row, ObjectChangedError("its content does not match content_hash in the manifest"))
        slot_seed = row.get("slot_seed", SCORING_SEED)
        try:
            seed = transform_seed(row["image_id"], slot_seed)
            prepared = decode(fetched.data, content_hash, row.get("transform") or "", seed)
        except ImageError as error:
            return failed(row, error)
        if prepared is None:
            return None
        row |= {
            "width": prepared.width, "height": prepared.height, "format": prepared.format, "frames": prepared.frames,
            "remark": prepared.remark,
            "jpeg_quality": prepared.quality, "perceptual_hash": prepared.perceptual_hash,
        }  # fmt: skip
        if row.get("known_hash") == content_hash:
            row |= {"caption": row["known_caption"], "caption_run_id": row["known_run_id"]}
        elif self.config.thumbnail_px:
            columns["thumbnail"].row(i)[...] = prepared.thumbnail
        if self.config.patches is not None:
            order = self.config.patches.slot_seed(slot_seed)
            assemble_mosaic(prepared.patches, order, out=columns["mosaic"].row(i))
        row["status"] = "scored"
        return row


def _blank(i: int, row: dict[str, Any], columns: Mapping[str, PixelColumn]) -> None:
    """Give a failed row as many pixel bytes as a successful one. Ray cuts blocks by bytes: a retried task in which
    other images fail must give the same rows in the same blocks, or rows are lost (verification then reports it, and
    the next attempt makes them). A known caption is assumed to be of these bytes.
    """
    for name, column in columns.items():
        if name != "thumbnail" or row.get("known_hash") is None:
            column.row(i)[...] = 0


def transform_seed(image_id: str, slot_seed: int) -> int:
    """Seed of a transform's random choices, from the image and, in training, the epoch."""
    digest = hashlib.sha256(f"{slot_seed}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
