"""The first stage: turn an image's bytes into patches, thumbnail and facts. CPU only, no torch."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import pyarrow as pa

from jobs.cluster.shares import ROWS_PER_BLOCK
from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.outages import Fetcher
from jobs.pipeline.patience import Patience
from jobs.pipeline.poison import Remembered
from jobs.pipeline.rows import ProgressReporter, RowDicts, failed, to_table
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.reading import Fetched
from jobs.storage.uris import Uri
from nsnet.errors import ImageError, ObjectChangedError
from nsnet.patches import SCORING_SEED, assemble_mosaic
from nsnet.preparation import PreparationConfig, Prepared

BYTES_PER_BLOCK: Final = 256 * 2**20
"""Maximum number of file bytes that a task holds at a time, unless a single file is larger."""
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
        manifest = table.to_pylist()
        fetcher = Fetcher(
            max_bytes=self.config.limits.max_bytes, source=self.source, outage_seconds=self.outage_seconds
        )
        rows = self._rows(manifest, fetcher.fetch(manifest))
        retried = sum(row["requests"] > 1 for row in rows)
        self.report.add(
            prepared=len(rows), asked_again=retried, failed=sum(row["status"] == "failed" for row in rows)
        )  # fmt: skip
        return to_table([self._blank(row) if row["status"] == "failed" else row for row in rows], self.schema)

    def in_blocks(self, table: pa.Table) -> Iterator[pa.Table]:
        """Prepare a long table; yields blocks as they are prepared."""
        start = held = 0
        for i, size in enumerate(table.column("size_bytes").to_pylist()):
            fetched = size if size is not None and size <= self.config.limits.max_bytes else 0
            if i > start and (i - start == ROWS_PER_BLOCK or held + fetched > BYTES_PER_BLOCK):
                yield self(table.slice(start, i - start))
                start, held = i, 0
            held += fetched
        if start < table.num_rows:
            yield self(table.slice(start))

    def _blank(self, row: dict[str, Any]) -> dict[str, Any]:
        """A failed row with as many pixel bytes as a successful one. Ray cuts blocks by bytes: a retried task in which
        other images fail must give the same rows in the same blocks, or rows are lost (verification then reports it,
        and the next attempt makes them). A known caption is assumed to be of these bytes.
        """
        pixels = {}
        if self.config.patches is not None:
            pixels["mosaic"] = bytes(3 * self.config.patches.mosaic_px**2)
        if self.config.thumbnail_px and row.get("known_hash") is None:
            pixels["thumbnail"] = bytes(3 * self.config.thumbnail_px**2)
        return {**row, **pixels}

    def _rows(self, manifest: RowDicts, fetched: list[tuple[Fetched | ImageError, int]]) -> RowDicts:
        """The rows of all images. Slow images are tried again after the others."""
        patience = _patience(self.config, self.report.board_name)
        patience.remembered = self.remembered
        rows = [self._row(row, *result, patience.first) for row, result in zip(manifest, fetched, strict=True)]
        for i, row in enumerate(rows):
            if row is None:
                rows[i] = self._row(manifest[i], *fetched[i], patience.again)
        patience.settle()
        return [row for row in rows if row is not None]

    def _row(
        self, row: dict[str, Any], fetched: Fetched | ImageError, requests: int, decode: Decode
    ) -> dict[str, Any] | None:
        """The row of an image; None if `decode` timed out."""
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
            row["thumbnail"] = prepared.thumbnail.tobytes()
        if self.config.patches is not None:
            row["mosaic"] = assemble_mosaic(prepared.patches, self.config.patches.slot_seed(slot_seed)).tobytes()
        row["status"] = "scored"
        return row


def transform_seed(image_id: str, slot_seed: int) -> int:
    """Seed of a transform's random choices, from the image and, in training, the epoch."""
    digest = hashlib.sha256(f"{slot_seed}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
