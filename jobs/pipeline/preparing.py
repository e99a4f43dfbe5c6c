"""The first stage: turn an image's bytes into patches, thumbnail and facts. CPU only, no torch."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.cluster.shares import rows_per_block
from jobs.pipeline.bottleneck import DECODING, FETCHING
from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.outages import Fetcher, FetchResult
from jobs.pipeline.patience import Patience
from jobs.pipeline.pixels import THUMBNAIL, PixelColumn, mosaic_column, pixel_bytes, sides
from jobs.pipeline.poison import Remembered
from jobs.pipeline.rows import ProgressReporter, RowDicts, failed, to_table
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.reading import Fetched
from jobs.storage.uris import Uri
from nsnet.errors import ImageError, ObjectChangedError
from nsnet.patches import SCORING_SEED
from nsnet.preparation import PreparationConfig, Prepared, assemble_mosaics

BYTES_PER_BLOCK: Final = 32 * 2**20
"""Most file bytes of a block, as far as sizes are known, unless a single file is larger: a second of decoding."""
UNKNOWN_BYTES: Final = 2**20
"""Assumed size of a file whose size is unknown."""
Decode = Callable[[bytes, str, str, int], Prepared | None]
"""Decodes an image, given its bytes, their hash, the transform and its seed; None: it timed out."""


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
        return pa.concat_tables([self.schema.empty_table(), *self.in_blocks(table)])

    def in_blocks(self, table: pa.Table) -> Iterator[pa.Table]:
        """Prepare a long table; yields blocks as they are prepared. While images are decoded, the next are fetched."""
        fetcher = Fetcher(
            max_bytes=self.config.limits.max_bytes, source=self.source, outage_seconds=self.outage_seconds
        )
        manifests: list[RowDicts] = [block.to_pylist() for block in self._blocks(table)]
        ahead = ThreadPoolExecutor(1)
        try:
            fetching = ahead.submit(fetcher.fetch, next(iter(manifests), []))
            for manifest, following in pairwise([*manifests, []]):
                columns = {name: PixelColumn(len(manifest), side) for name, side in sides(self.config).items()}
                rows: RowDicts = []
                started, waited = time.monotonic(), 0.0
                while len(rows) < len(manifest):
                    waited -= time.monotonic()
                    fetched = fetching.result()
                    waited += time.monotonic()
                    fetching = ahead.submit(fetcher.fetch, manifest[len(rows) + len(fetched) :] or following)
                    rows += self._rows(manifest, len(rows), fetched, columns)
                self.report.spend(**{FETCHING: waited, DECODING: time.monotonic() - started - waited})
                yield to_table(rows, self.schema, {name: column.to_arrow() for name, column in columns.items()})
        finally:
            fetcher.stop.set()
            ahead.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End this process's guarded child. Ray's workers keep theirs for the next block."""
        _patience(self.config, self.report.board_name).close()

    def _blocks(self, table: pa.Table) -> list[pa.Table]:
        """Cut a table into blocks of `rows_per_block`, or fewer rows if their files exceed `BYTES_PER_BLOCK`."""
        most_rows = rows_per_block(pixel_bytes(self.config))
        starts, held = [0], 0
        for i, size in enumerate(table.column("size_bytes").to_pylist()):
            size = UNKNOWN_BYTES if size is None else size
            fetched = size if size <= self.config.limits.max_bytes else 0
            rows = i - starts[-1]
            if rows and (rows == most_rows or held + fetched > BYTES_PER_BLOCK):
                starts.append(i)
                held = 0
            held += fetched
        return [table.slice(start, end - start) for start, end in pairwise([*starts, table.num_rows]) if end > start]

    def _rows(
        self, manifest: RowDicts, start: int, fetched: list[FetchResult], columns: Mapping[str, PixelColumn]
    ) -> RowDicts:
        """The rows from `start` of a block whose images were fetched. Slow images are tried again after the others."""
        patience = _patience(self.config, self.report.board_name)
        patience.remembered = self.remembered
        done: list[dict[str, Any] | None] = [None] * len(fetched)
        decode: Decode
        for decode in (patience.first, patience.again):
            for i, result in enumerate(fetched):
                if done[i] is None:
                    pixels = {name: column.pixels[start + i] for name, column in columns.items()}
                    done[i] = self._row(manifest[start + i], result, decode, pixels)
        patience.settle()
        rows = [row for row in done if row is not None]
        for i, row in enumerate(rows, start):
            _complete(i, row, columns)
        self.report.passed(
            "preparing", len(rows), [row["error_class"] for row in rows if row["status"] == "failed"],
            prepared=len(rows),
            requests_repeated=sum(max(0, row["requests"] - 1) for row in rows),
            fetched_bytes=sum(len(result.data) for result, _ in fetched if isinstance(result, Fetched)),
        )  # fmt: skip
        return rows

    def _row(
        self, row: dict[str, Any], result: FetchResult, decode: Decode, pixels: Mapping[str, npt.NDArray[np.uint8]]
    ) -> dict[str, Any] | None:
        """The row of an image, whose pixels are written into `pixels`; None if `decode` timed out."""
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
        if prepared.size_bytes is not None:
            row["size_bytes"] = prepared.size_bytes
        if prepared.provenance is not None:
            row |= asdict(prepared.provenance)
        if row.get("known_hash") == content_hash:
            row |= {"caption": row["known_caption"], "caption_run_id": row["known_run_id"]}
        elif self.config.thumbnail_px:
            pixels[THUMBNAIL][...] = prepared.thumbnail
        columns = [mosaic_column(i) for i in range(len(prepared.patches))]
        assemble_mosaics(prepared.patches, self.config, slot_seed, out=[pixels[name] for name in columns])
        row["status"] = "scored"
        return row


def _complete(i: int, row: dict[str, Any], columns: Mapping[str, PixelColumn]) -> None:
    """Give a failed row as many pixel bytes as a successful one, and a row with a known caption no thumbnail.

    Ray cuts blocks by bytes: a retried task in which other images fail must give the same rows in the same blocks, or
    rows are lost (verification then reports it, and the next attempt makes them). So a failed row's known caption is
    assumed to be of these bytes.
    """
    has_failed, known = row["status"] == "failed", row.get("known_hash")
    for name, column in columns.items():
        if has_failed:
            column.pixels[i] = 0
        if name == THUMBNAIL:
            column.is_null[i] = known is not None if has_failed else known == row["content_hash"]


def transform_seed(image_id: str, slot_seed: int) -> int:
    """Seed of a transform's random choices, from the image and, in training, the epoch."""
    digest = hashlib.sha256(f"{slot_seed}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
