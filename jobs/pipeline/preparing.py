"""The first stage: turn an image's bytes into patches, thumbnail and facts. CPU only, no torch."""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import pyarrow as pa

from jobs.dataset import fetching
from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.patience import Patience
from jobs.pipeline.poison import Remembered
from jobs.pipeline.rows import ROWS_PER_BLOCK, Progress, RowDicts, failed, to_table
from jobs.storage import probes, uris
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.reading import Fetched
from jobs.storage.uris import Uri
from nsnet.errors import FetchError, ImageError, ImageTooLargeError, ObjectChangedError, ObjectMissingError, OutageError
from nsnet.patches import SCORING_SEED, assemble_mosaic
from nsnet.preparation import PreparationConfig, Prepared

BYTES_PER_BLOCK: Final = 256 * 2**20
"""Most file bytes that a task holds at a time, unless a single file is larger."""
FETCH_THREADS: Final = 8
"""Objects of a block that are fetched in parallel."""
OUTAGE_POLL_SECONDS: Final = 5.0
OUTAGE_FAILURES: Final = 8
"""Outage: a store fails for this many images of a block and delivers none, even if it answers."""
Decode = Callable[[bytes, str, str, int], Prepared | None]
"""Decodes an image, given its bytes, their hash, the transform and its seed; None: it timed out."""


@cache
def _patience(config: PreparationConfig, board_name: str | None) -> Patience:
    """The worker process's decoder with one guarded child. Ray reuses worker processes, so it serves many blocks."""
    return Patience(GuardedDecoder(config), Progress(board_name=board_name))


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
    report: Progress = field(default_factory=Progress)
    source: Uri | None = None
    """URI of the source. An image counts as missing only if the source exists."""
    outage_seconds: float = OUTAGE_SECONDS
    remembered: Remembered = field(default_factory=dict)
    """Failures of earlier runs, which are not decoded again."""

    def __call__(self, table: pa.Table) -> pa.Table:
        manifest = table.to_pylist()
        rows = self._rows(manifest, self._fetch(manifest))
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

    def _fetch(self, manifest: RowDicts) -> list[tuple[Fetched | ImageError, int]]:
        """Bytes or the error of each row, and its number of requests; retries while the store is the cause."""
        fetch = _fetch_with(self.config.limits.max_bytes)
        end = time.monotonic() + self.outage_seconds
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            fetched = list(pool.map(fetch, manifest))
            requests = [result.requests for result in fetched]
            for repetition in itertools.count():
                retriable, is_outage = self._retriable(manifest, fetched)
                if not retriable or (repetition and not is_outage):
                    return list(zip(fetched, requests, strict=True))
                if is_outage:
                    self._wait(manifest[retriable[0]], fetched[retriable[0]], end)
                for i, result in zip(retriable, pool.map(fetch, [manifest[i] for i in retriable]), strict=True):
                    fetched[i] = result
                    requests[i] += result.requests
        raise AssertionError("unreachable: the loop ends by return or raise")

    def _wait(self, row: dict[str, Any], result: Fetched | ImageError, end: float) -> None:
        """Wait until the store of a row answers, for one poll at least: an object may be missing due to an outage."""
        while time.monotonic() < end:
            time.sleep(min(OUTAGE_POLL_SECONDS, self.outage_seconds))
            if probes.store_is_up(row["container"] or row["uri"], self.source):
                return
        raise OutageError(
            f"the store of the images has not answered for {self.outage_seconds:g} s ({row['uri']}: {result}): run "
            "the same command again once it answers; finished images are kept"
        )

    def _retriable(self, manifest: RowDicts, fetched: list[Fetched | ImageError]) -> tuple[list[int], bool]:
        """Rows to fetch again, and whether their store has an outage: it does not answer, or it fails for many images
        and delivers none.
        """
        retriable = [i for i, result in enumerate(fetched) if isinstance(result, FetchError) and result.may_be_outage]
        stores = {i: uris.failure_domain(manifest[i]["container"] or manifest[i]["uri"]) for i in retriable}
        probed = {store: manifest[i]["container"] or manifest[i]["uri"] for i, store in stores.items()}
        down = {store for store, uri in probed.items() if not probes.store_is_up(uri, self.source)}
        if down:
            return [i for i in retriable if stores[i] in down], True
        retriable = [i for i in retriable if not isinstance(fetched[i], ObjectMissingError)]
        delivers = any(isinstance(result, Fetched | ObjectChangedError) for result in fetched)
        return retriable, len(retriable) >= OUTAGE_FAILURES and not delivers

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


def _fetch_with(max_bytes: int) -> Callable[[dict[str, Any]], Fetched | ImageError]:
    def fetch(row: dict[str, Any]) -> Fetched | ImageError:
        known = row["size_bytes"]
        if known is not None and known > max_bytes:
            return ImageTooLargeError(f"{known:,} bytes, the limit is {max_bytes:,} (--max-bytes)")
        try:
            fetched = fetching.fetch(row, max_bytes)
        except ImageError as error:
            return error
        if len(fetched.data) > max_bytes:  # only the beginning was read, so its hash would be useless
            too_large = ImageTooLargeError(f"more than {max_bytes:,} bytes, the limit (--max-bytes)")
            too_large.requests = fetched.requests
            return too_large
        return fetched

    return fetch
