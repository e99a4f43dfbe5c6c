"""The first stage: bytes of an image to its patches, thumbnail and facts. CPU only, no torch."""

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
"""Most bytes of files that a task holds at a time, a larger single one aside."""
FETCH_THREADS: Final = 8
"""Objects of a block that are fetched at a time."""
OUTAGE_POLL_SECONDS: Final = 5.0
OUTAGE_FAILURES: Final = 8
"""A store that fails for so many images of a block and gives none is away, whatever else it answers."""
Decode = Callable[[bytes, str, str, int], Prepared | None]
"""A try of an image: its bytes, their hash, the transform and its seed."""


@cache
def _patience(config: PreparationConfig, board_name: str | None) -> Patience:
    """One guarded child per worker process: Ray keeps worker processes, so it lives through many blocks."""
    return Patience(GuardedDecoder(config), Progress(board_name=board_name))


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Fetch, hash, decode, transform, select patches, make the thumbnail: one pass over the bytes, CPU only, no torch.

    A row whose known caption is of these very bytes gets no thumbnail. A row may bring a `transform`, and a `slot_seed`
    that orders its mosaic in the place of scoring's. Raises `OutageError` when the store of the
    images is away for longer than `outage_seconds`: rows that fail for no fault of theirs would be worse.
    """

    config: PreparationConfig
    schema: pa.Schema
    """Columns to keep of the manifest and to add; `mosaic` and `thumbnail` are binary."""
    report: Progress = field(default_factory=Progress)
    source: Uri | None = None
    """URI of the source, which must be there for a missing image to be taken for one."""
    outage_seconds: float = OUTAGE_SECONDS
    remembered: Remembered = field(default_factory=dict)
    """What failed in earlier runs, and is not decoded again."""

    def __call__(self, table: pa.Table) -> pa.Table:
        manifest = table.to_pylist()
        rows = self._rows(manifest, self._fetch(manifest))
        again = sum(row["requests"] > 1 for row in rows)
        self.report.add(
            prepared=len(rows), asked_again=again, failed=sum(row["status"] == "failed" for row in rows)
        )  # fmt: skip
        return to_table([self._blank(row) if row["status"] == "failed" else row for row in rows], self.schema)

    def in_blocks(self, table: pa.Table) -> Iterator[pa.Table]:
        """The same for a long table, in blocks that leave as they are done."""
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
        """A failed row with pixels of as many bytes as if it had not failed. Ray cuts blocks by bytes: a task that is
        repeated, where other images fail than before, must give the same rows in the same blocks, or rows are lost
        (verification then says so, and the next attempt makes them). A known caption is taken to be of these bytes.
        """
        pixels = {}
        if self.config.patches is not None:
            pixels["mosaic"] = bytes(3 * self.config.patches.mosaic_px**2)
        if self.config.thumbnail_px and row.get("known_hash") is None:
            pixels["thumbnail"] = bytes(3 * self.config.thumbnail_px**2)
        return {**row, **pixels}

    def _fetch(self, manifest: RowDicts) -> list[tuple[Fetched | ImageError, int]]:
        """Bytes or the reason why there are none, of each row, and how often its store was asked; asked for again as
        long as the store is to blame.
        """
        fetch = _fetch_with(self.config.limits.max_bytes)
        end = time.monotonic() + self.outage_seconds
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            fetched = list(pool.map(fetch, manifest))
            requests = [result.requests for result in fetched]
            for repetition in itertools.count():
                lost, away = self._lost(manifest, fetched)
                if not lost or (repetition and not away):
                    return list(zip(fetched, requests, strict=True))
                if away:
                    self._wait(manifest[lost[0]], fetched[lost[0]], end)
                for i, result in zip(lost, pool.map(fetch, [manifest[i] for i in lost]), strict=True):
                    fetched[i] = result
                    requests[i] += result.requests
        raise AssertionError("the loop above only ends by itself")

    def _wait(self, row: dict[str, Any], result: Fetched | ImageError, end: float) -> None:
        """Wait until the store of a row answers, a moment at least: what is missing now may only have been away."""
        while time.monotonic() < end:
            time.sleep(min(OUTAGE_POLL_SECONDS, self.outage_seconds))
            if probes.store_is_up(row["container"] or row["uri"], self.source):
                return
        raise OutageError(
            f"the store of the images has not answered for {self.outage_seconds:g} s ({row['uri']}: {result}): what "
            "was finished is kept, run the same command again once it is back"
        )

    def _lost(self, manifest: RowDicts, fetched: list[Fetched | ImageError]) -> tuple[list[int], bool]:
        """Rows that are worth another request, and whether their store is away: it does not answer, or it fails for
        many images and gives none.
        """
        lost = [i for i, result in enumerate(fetched) if isinstance(result, FetchError) and result.may_be_outage]
        stores = {i: uris.failure_domain(manifest[i]["container"] or manifest[i]["uri"]) for i in lost}
        asked = {store: manifest[i]["container"] or manifest[i]["uri"] for i, store in stores.items()}
        silent = {store for store, uri in asked.items() if not probes.store_is_up(uri, self.source)}
        if silent:
            return [i for i in lost if stores[i] in silent], True
        lost = [i for i in lost if not isinstance(fetched[i], ObjectMissingError)]
        gives = any(isinstance(result, Fetched | ObjectChangedError) for result in fetched)
        return lost, len(lost) >= OUTAGE_FAILURES and not gives

    def _rows(self, manifest: RowDicts, fetched: list[tuple[Fetched | ImageError, int]]) -> RowDicts:
        """Each image's row. Those that are slow are tried again once the others are done."""
        patience = _patience(self.config, self.report.board_name)
        patience.remembered = self.remembered
        rows = [self._row(row, *came, patience.first) for row, came in zip(manifest, fetched, strict=True)]
        for i, row in enumerate(rows):
            if row is None:
                rows[i] = self._row(manifest[i], *fetched[i], patience.again)
        patience.settle()
        return [row for row in rows if row is not None]

    def _row(
        self, row: dict[str, Any], fetched: Fetched | ImageError, requests: int, decode: Decode
    ) -> dict[str, Any] | None:
        """The row of an image; None where `decode` gave none."""
        row = {**row, "requests": requests}
        if isinstance(fetched, ImageError):
            return failed(row, fetched)
        content_hash = hashlib.sha256(fetched.data).hexdigest()
        row |= {"content_hash": content_hash, "size_bytes": len(fetched.data)}
        if row.get("expected_hash") not in (None, content_hash):
            return failed(row, ObjectChangedError("its content is not what the manifest says (content_hash)"))
        slot_seed = row.get("slot_seed", SCORING_SEED)
        try:
            seed = transform_seed(row["image_id"], slot_seed)
            done = decode(fetched.data, content_hash, row.get("transform") or "", seed)
        except ImageError as error:
            return failed(row, error)
        if done is None:
            return None
        row |= {
            "width": done.width, "height": done.height, "format": done.format, "frames": done.frames,
            "remark": done.remark,
            "jpeg_quality": done.quality, "perceptual_hash": done.perceptual_hash,
        }  # fmt: skip
        if row.get("known_hash") == content_hash:
            row |= {"caption": row["known_caption"], "caption_run_id": row["known_run_id"]}
        elif self.config.thumbnail_px:
            row["thumbnail"] = done.thumbnail.tobytes()
        if self.config.patches is not None:
            row["mosaic"] = assemble_mosaic(done.patches, self.config.patches.slot_seed(slot_seed)).tobytes()
        row["status"] = "scored"
        return row


def transform_seed(image_id: str, slot_seed: int) -> int:
    """Seed of a transform's random choices: of the image, and in training of the epoch."""
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
        if len(fetched.data) > max_bytes:  # only its beginning was read, which has no hash worth keeping
            too_large = ImageTooLargeError(f"more than {max_bytes:,} bytes, the limit (--max-bytes)")
            too_large.requests = fetched.requests
            return too_large
        return fetched

    return fetch
