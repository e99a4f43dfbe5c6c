"""Ray Data stages: thin shells that turn columns into arrays and delegate to `nsnet`.

A stage passes rows that already failed through untouched. Pixels travel as fixed-length binary columns and are dropped
as soon as they are used. Rows: B of a batch; K mosaic slots, N patch side, M mosaic side, S thumbnail side.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.dataset import fetching, schema
from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.patience import Patience
from jobs.pipeline.poison import Remembered
from jobs.storage import bundles, probes, uris
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.reading import Fetched
from jobs.storage.redaction import without_secrets
from nsnet import bundle
from nsnet.errors import (
    BundleError,
    CaptionError,
    FetchError,
    ImageError,
    ImageTooLargeError,
    ObjectChangedError,
    ObjectMissingError,
    OutageError,
    ScoreError,
)
from nsnet.patches import SCORING_SEED, assemble_mosaic
from nsnet.preparation import PreparationConfig, Prepared

if TYPE_CHECKING:  # these modules import torch, which decoding workers must not wait for
    from nsnet.captions import Captioner, CaptionerConfig
    from nsnet.clip import Clip, ClipConfig
    from nsnet.detector import Detector

ROWS_PER_BLOCK: Final = 32
"""Pictures per block: some 20 MB with BLIP's thumbnails, small enough to stream, large enough for a GPU batch."""
BYTES_PER_BLOCK: Final = 256 * 2**20
"""Most bytes of files that a task holds at a time, a larger single one aside."""
FETCH_THREADS: Final = 8
"""Objects of a block that are fetched at a time."""
OUTAGE_POLL_SECONDS: Final = 5.0
LEASE_POLL_SECONDS: Final = 0.25
MANY: Final = 8
"""A store that fails for so many pictures of a block and gives none is away, whatever else it answers."""
REMEMBERED: Final = 65_536
"""Contents whose results an actor remembers."""
HEAVY: Final = ("mosaic", "thumbnail")
"""Columns of pixels, as bytes."""

Rows = list[dict[str, Any]]
Decode = Callable[[bytes, str, str, int], Prepared | None]
"""A try of an image: its bytes, their hash, the transform and its seed."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Where actors find their models. A remote bundle is fetched to a cache on the node where the actor runs."""

    detector: str | None = None
    """URI of a bundle; None: nothing was trained yet."""
    clip_weights: str | None = None
    """Local path that replaces the hub's CLIP weights."""
    captioner: str | None = None
    """Local transformers folder that replaces the hub's captioner."""
    device: str = "cpu"
    threads: int = 1
    """Threads of an actor that computes on the CPU."""
    run_id: str | None = None
    """Run that the rows are marked with."""
    detector_id: str | None = None
    """Identity of the detector, which the bundle must still have when an actor loads it."""
    captioner_id: str = ""
    """Identity of the captioner."""
    reuse: bool = True
    """Compute repeated bytes once."""

    def key(self, row: dict[str, Any]) -> str:
        """Rows of the same key have the same results. A known caption belongs to it: that of a copy may be another."""
        content = row["content_hash"] if self.reuse else row["image_id"]
        return f"{content} {row.get('transform') or ''} {row.get('caption') or ''}"

    def bundle_folder(self) -> Path:
        """The bundle as a local folder."""
        assert self.detector is not None
        return bundles.fetch_bundle(self.detector, bundle.DESCRIPTION)

    def captioner_folder(self, config: "CaptionerConfig") -> Path | None:
        """The captioner's folder: as given, in the bundle, or the hub's; None: the tiny one."""
        from nsnet.captions import find_captioner

        own = bundle.captioner_of(self.bundle_folder()) if self.detector is not None else None
        return find_captioner(config, Path(self.captioner) if self.captioner else own)

    def clip_path(self) -> Path | None:
        """The given CLIP weights."""
        return Path(self.clip_weights) if self.clip_weights else None

    def use_threads(self) -> None:
        """Bound this process's compute threads: actors share their node's cores."""
        import torch

        if self.device == "cpu":
            torch.set_num_threads(self.threads)


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """How stages tell of their progress: to a `jobs.pipeline.progress.Board`, by its name."""

    board_name: str | None = None

    def add(self, **counts: int) -> None:
        """Count, without waiting."""
        if self.board_name is not None:
            _board(self.board_name).add.remote(counts)

    def lease(self, seconds: float) -> float:
        """Seconds that a slow image may take (`poison.Budget`), at most so many; waits while others use the rest."""
        if self.board_name is None:
            return seconds
        import ray

        while (answer := ray.get(_board(self.board_name).lease.remote(seconds))) is None:
            time.sleep(LEASE_POLL_SECONDS)
        return float(answer)

    def settle(self, leased: float, good: float, slow: float) -> None:
        """As `Budget.settle`, without waiting."""
        if self.board_name is not None:
            _board(self.board_name).settle.remote(leased, good, slow)


@cache
def _board(name: str) -> Any:
    import ray

    return ray.get_actor(name)


def failed(row: dict[str, Any], error: ImageError) -> dict[str, Any]:
    """The row, marked as failed."""
    return {
        **row,
        "status": "failed",
        "error_stage": error.stage,
        "error_class": type(error).__name__,
        "error_message": without_secrets(str(error))[:1000],
    }


def to_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly this schema: missing values are null, other keys are dropped."""
    return pa.Table.from_pylist(rows, schema=schema)


@cache
def _patience(config: PreparationConfig, board_name: str | None) -> Patience:
    """One guarded child per worker process: Ray keeps worker processes, so it lives through many blocks."""
    return Patience(GuardedDecoder(config), StageReport(board_name=board_name))


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Fetch, hash, decode, transform, select patches, make the thumbnail: one pass over the bytes, CPU only, no torch.

    A row whose known caption is of these very bytes gets no thumbnail. A row may bring a `transform`, and a `slot_seed`
    that orders its mosaic in the place of scoring's. Raises `OutageError` when the store of the
    pictures is away for longer than `outage_seconds`: rows that fail for no fault of theirs would be worse.
    """

    config: PreparationConfig
    schema: pa.Schema
    """Columns to keep of the manifest and to add; `mosaic` and `thumbnail` are binary."""
    report: StageReport = field(default_factory=StageReport)
    source: str | None = None
    """URI of the source, which must be there for a missing picture to be taken for one."""
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
        repeated, where other pictures fail than before, must give the same rows in the same blocks, or rows are lost
        (verification then says so, and the next attempt makes them). A known caption is taken to be of these bytes.
        """
        pixels = {}
        if self.config.patches is not None:
            pixels["mosaic"] = bytes(3 * self.config.patches.mosaic_px**2)
        if self.config.thumbnail_px and row.get("known_hash") is None:
            pixels["thumbnail"] = bytes(3 * self.config.thumbnail_px**2)
        return {**row, **pixels}

    def _fetch(self, manifest: Rows) -> list[tuple[Fetched | ImageError, int]]:
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
            f"the store of the pictures has not answered for {self.outage_seconds:g} s ({row['uri']}: {result}): what "
            "was finished is kept, run the same command again once it is back"
        )

    def _lost(self, manifest: Rows, fetched: list[Fetched | ImageError]) -> tuple[list[int], bool]:
        """Rows that are worth another request, and whether their store is away: it does not answer, or it fails for
        many pictures and gives none.
        """
        lost = [i for i, result in enumerate(fetched) if isinstance(result, FetchError) and result.may_be_outage]
        stores = {i: uris.failure_domain(manifest[i]["container"] or manifest[i]["uri"]) for i in lost}
        asked = {store: manifest[i]["container"] or manifest[i]["uri"] for i, store in stores.items()}
        silent = {store for store, uri in asked.items() if not probes.store_is_up(uri, self.source)}
        if silent:
            return [i for i in lost if stores[i] in silent], True
        lost = [i for i in lost if not isinstance(fetched[i], ObjectMissingError)]
        gives = any(isinstance(result, Fetched | ObjectChangedError) for result in fetched)
        return lost, len(lost) >= MANY and not gives

    def _rows(self, manifest: Rows, fetched: list[tuple[Fetched | ImageError, int]]) -> Rows:
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
    """Seed of a transform's random choices: of the picture, and in training of the epoch."""
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


class Memory:
    """Results by content, so that bytes which repeat are computed once; the oldest give way."""

    def __init__(self, entries: int = REMEMBERED) -> None:
        self.entries = entries
        self._values: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def trim(self) -> None:
        """Forget what is too much; between batches, so that a batch finds all that it put there."""
        while len(self._values) > self.entries:
            del self._values[next(iter(self._values))]


class Caption:
    """Thumbnails to captions, in an actor with the captioner; drops the thumbnail.

    The captioner is loaded for the first row without a known caption. Every call has the same number of pictures: a
    caption does then not depend, in its last bits, on the neighbours that a block happened to have.
    """

    def __init__(
        self, models: Models, config: "CaptionerConfig", schema: pa.Schema, batch_size: int, report: StageReport
    ) -> None:
        self.models, self.config = models, config
        self.schema, self.batch_size, self.report = schema, batch_size, report
        self.memory = Memory()

    @cached_property
    def captioner(self) -> "Captioner":
        """The model."""
        from nsnet.captions import Captioner

        self.models.use_threads()
        return Captioner.load(self.config, self.models.captioner_folder(self.config), self.models.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, alive = _light_rows(table)
        wanting = [i for i in alive if rows[i].get("caption") is None]
        for some in _batches(_first_of_each(rows, wanting, self.models, self.memory), self.batch_size):
            side = self.captioner.thumbnail_px
            thumbnails = _pixels(table, "thumbnail", some, (side, side, 3))
            captions = self.captioner.caption(_padded(thumbnails, self.batch_size))
            for i, caption in zip(some, captions, strict=False):
                self.memory[self.models.key(rows[i])] = caption
        for i in alive:
            if rows[i].get("caption") is None:
                caption = self.memory[self.models.key(rows[i])]
                rows[i] |= {"caption": caption, "caption_run_id": self.models.run_id}
                if caption is None:
                    rows[i] = failed(rows[i], CaptionError("the captioner gave no word"))
                    continue
            rows[i]["caption_id"] = caption_id(
                self.models.captioner_id, rows[i]["content_hash"], rows[i].get("transform")
            )
        self.memory.trim()
        self.report.add(captioned=len(rows), failed=sum(rows[i]["status"] == "failed" for i in alive))
        return _with_heavy(rows, table, self.schema)


def caption_id(captioner_id: str, content_hash: str, transform: str | None = None) -> str:
    """Identity of a caption: the captioner's, and 16 hexadecimal digits of the SHA-256 of what it was shown."""
    shown = hashlib.sha256(f"{content_hash}/{transform}".encode()).hexdigest() if transform else content_hash
    return f"{captioner_id}-{shown[:16]}"


class Embed:
    """Captions to features of the frozen text tower, in an actor; for training, which then needs no text tower.

    Every call has the same number of captions, as in `Caption`.
    """

    def __init__(
        self, models: Models, config: "ClipConfig", schema: pa.Schema, batch_size: int, report: StageReport
    ) -> None:
        self.models, self.config = models, config
        self.schema, self.batch_size, self.report = schema, batch_size, report

    @cached_property
    def clip(self) -> "Clip":
        """The model; not loaded in `__init__`, of whose errors Ray passes on the text alone."""
        from nsnet.clip import find_weights, load_clip

        self.models.use_threads()
        clip = load_clip(self.config, find_weights(self.config, self.models.clip_path()))
        clip.model.to(self.models.device)
        return clip

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, alive = _light_rows(table)
        for some in _batches(alive, self.batch_size):
            captions = [rows[i]["caption"] for i in some]
            features = self.clip.encode_text(captions + captions[:1] * (self.batch_size - len(some))).cpu().numpy()
            for i, feature in zip(some, features, strict=False):
                rows[i]["text_features"] = feature.tolist()
        self.report.add(embedded=len(rows))
        return _with_heavy(rows, table, self.schema)


class Score:
    """Mosaics, and captions where the detector uses them, to verdicts, in an actor with the detector; drops the mosaic.

    Every call has the same number of pictures, as in `Caption`: a continued run gives the same bits as a whole one.
    """

    def __init__(self, models: Models, batch_size: int, report: StageReport) -> None:
        self.models, self.batch_size, self.report = models, batch_size, report
        self.memory = Memory()

    @cached_property
    def detector(self) -> "Detector":
        """The model; not loaded in `__init__`, as in `Embed`."""
        from nsnet.detector import Detector

        models = self.models
        models.use_threads()
        detector = Detector.load(
            models.bundle_folder(), device=models.device, clip_weights=models.clip_path(), captioner=False
        )
        if models.detector_id not in (None, detector.detector_id):
            raise BundleError(
                f"{models.detector} was replaced during the run: it holds {detector.detector_id}, not "
                f"{models.detector_id}"
            )
        return detector

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, alive = _light_rows(table)
        side = self.detector.config.patches.mosaic_px
        for some in _batches(_first_of_each(rows, alive, self.models, self.memory), self.batch_size):
            mosaics = _padded(_pixels(table, "mosaic", some, (side, side, 3)), self.batch_size)
            captions = None
            if self.detector.config.projection.needs_captions:
                captions = [rows[i]["caption"] for i in some]
                captions += captions[:1] * (self.batch_size - len(some))
            scores = self.detector.score(mosaics, captions)
            for at, i in enumerate(some):
                self.memory[self.models.key(rows[i])] = {
                    "logit": float(scores.logit[at]),
                    "prob_fake": float(scores.prob_fake[at]),
                    "verdict": scores.verdict[at],
                    "residual_energy": float(scores.residual_energy[at]),
                }
        for i in alive:
            result = self.memory[self.models.key(rows[i])]
            if np.isfinite(result["logit"]):
                rows[i] |= result
            else:
                rows[i] = failed(rows[i], ScoreError(f"the logit is {result['logit']}"))
        self.memory.trim()
        constant = {
            "threshold": self.detector.calibration.threshold,
            "detector_id": self.detector.detector_id,
            "run_id": self.models.run_id,
            "scored_at": datetime.now(UTC),
        }
        self.report.add(scored=len(rows), failed=sum(rows[i]["status"] == "failed" for i in alive))
        return to_table([{**row, **constant} for row in rows], schema.VERDICTS)


def _first_of_each(rows: Rows, positions: list[int], models: Models, memory: Memory) -> list[int]:
    """Of the rows at these positions, the first of each content that is not remembered yet."""
    first: dict[str, int] = {}
    for i in positions:
        key = models.key(rows[i])
        if key not in memory:
            first.setdefault(key, i)
    return list(first.values())


def _padded(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """A batch filled up to a fixed size with its first picture."""
    return np.concatenate([pixels, np.repeat(pixels[:1], size - len(pixels), axis=0)])


def _light_rows(table: pa.Table) -> tuple[Rows, list[int]]:
    """Rows without the pixel columns, and the positions of those that have not failed."""
    rows: Rows = table.drop_columns([name for name in HEAVY if name in table.column_names]).to_pylist()
    return rows, [i for i, row in enumerate(rows) if row["status"] != "failed"]


def _with_heavy(rows: Rows, table: pa.Table, wanted: pa.Schema) -> pa.Table:
    """Rows as a table of the wanted schema, its pixel columns taken over from the input without a copy."""
    kept = [name for name in wanted.names if name in HEAVY]
    light = pa.schema([field for field in wanted if field.name not in kept])
    result = to_table(rows, light)
    for name in kept:
        result = result.append_column(wanted.field(name), table.column(name))
    return result.select(wanted.names)


def _batches(positions: list[int], size: int) -> list[list[int]]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def _pixels(table: pa.Table, name: str, positions: list[int], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """A binary column's values at some rows as one uint8 array (rows, *shape)."""
    column = table.column(name)
    return np.stack([np.frombuffer(column[i].as_buffer(), dtype=np.uint8).reshape(shape) for i in positions])
