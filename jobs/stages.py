"""Ray Data stages: thin shells that turn columns into arrays and delegate to `nsnet`.

A stage passes rows that already failed through untouched. Pixels travel as fixed-length binary columns and are dropped
as soon as they are used. Rows: B of a batch; K mosaic slots, N patch side, M mosaic side, S thumbnail side.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs import schema, sources, storage
from jobs.guard import GuardedDecoder
from nsnet import bundle
from nsnet.errors import CaptionError, FetchError, ImageError, ImageTooLargeError, ScoreError
from nsnet.patches import SCORING_SEED, assemble_mosaic
from nsnet.preparation import PreparationConfig

if TYPE_CHECKING:  # these modules import torch, which decoding workers must not wait for
    from nsnet.captions import CaptionerConfig
    from nsnet.clip import ClipConfig

ROWS_PER_BLOCK: Final = 32
"""Pictures per block: some 20 MB with BLIP's thumbnails, small enough to stream, large enough for a GPU batch."""
FETCH_THREADS: Final = 8
"""Objects of a block that are fetched at a time."""
HEAVY: Final = ("mosaic", "patches", "thumbnail")
"""Columns of pixels, as bytes."""

Rows = list[dict[str, Any]]


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

    def bundle_folder(self) -> Path:
        """The bundle as a local folder."""
        assert self.detector is not None
        return storage.fetch_bundle(self.detector, bundle.DESCRIPTION)

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
    """How stages tell of their progress: to a `jobs.progress.Board`, by its name."""

    board_name: str | None = None

    def add(self, **counts: int) -> None:
        """Count, without waiting."""
        if self.board_name is not None:
            _board(self.board_name).add.remote(counts)


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
        "error_message": str(error)[:1000],
    }


def to_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly this schema: missing values are null, other keys are dropped."""
    return pa.Table.from_pylist(rows, schema=schema)


@cache
def _decoder(config: PreparationConfig) -> GuardedDecoder:
    """One guarded child per worker process: Ray keeps worker processes, so it lives through many blocks."""
    return GuardedDecoder(config)


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Fetch, hash, decode, select patches, make the thumbnail: one pass over the bytes, CPU only, no torch."""

    config: PreparationConfig
    schema: pa.Schema
    """Columns to keep of the manifest and to add; `mosaic` or `patches`, and `thumbnail`, are binary."""
    report: StageReport = field(default_factory=StageReport)

    def __call__(self, table: pa.Table) -> pa.Table:
        manifest = table.to_pylist()
        limit = self.config.limits.max_bytes
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            fetched = pool.map(_fetch_with(limit), manifest)
            rows = [self._row(row, data) for row, data in zip(manifest, fetched, strict=True)]
        self.report.add(prepared=len(rows), failed=sum(row["status"] == "failed" for row in rows))
        return to_table(rows, self.schema)

    def _row(self, row: dict[str, Any], fetched: bytes | ImageError) -> dict[str, Any]:
        if isinstance(fetched, ImageError):
            return failed(row, fetched)
        row = {**row, "content_hash": hashlib.sha256(fetched).hexdigest(), "size_bytes": len(fetched)}
        try:
            done = _decoder(self.config).prepare(fetched)
        except ImageError as error:
            return failed(row, error)
        row |= {"width": done.width, "height": done.height, "format": done.format, "frames": done.frames}
        row |= {"status": "scored", "thumbnail": done.thumbnail.tobytes()}
        if "patches" in self.schema.names:
            return {**row, "patches": done.patches.tobytes()}
        return {**row, "mosaic": assemble_mosaic(done.patches, SCORING_SEED).tobytes()}


def _fetch_with(max_bytes: int) -> Callable[[dict[str, Any]], bytes | ImageError]:
    def fetch(row: dict[str, Any]) -> bytes | ImageError:
        known = row["size_bytes"]
        if known is not None and known > max_bytes:
            return ImageTooLargeError(f"{known:,} bytes, the limit is {max_bytes:,} (--max-bytes)")
        try:
            data = sources.fetch(row, max_bytes)
        except Exception as error:  # the per-row boundary: stores raise OSError, botocore's, aiohttp's and more
            return FetchError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if len(data) > max_bytes:  # only its beginning was read, which has no hash worth keeping
            return ImageTooLargeError(f"more than {max_bytes:,} bytes, the limit (--max-bytes)")
        return data

    return fetch


class Caption:
    """Thumbnails to captions, in an actor with the captioner; drops the thumbnail."""

    def __init__(
        self, models: Models, config: "CaptionerConfig", schema: pa.Schema, batch_size: int, report: StageReport
    ) -> None:
        from nsnet.captions import Captioner

        models.use_threads()
        self.captioner = Captioner.load(config, models.captioner_folder(config), models.device)
        self.captioner_id = self.captioner.digest()[:16]
        self.schema, self.batch_size, self.report = schema, batch_size, report

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, alive = _light_rows(table)
        side = self.captioner.thumbnail_px
        for some in _batches(alive, self.batch_size):
            captions = self.captioner.caption(_pixels(table, "thumbnail", some, (side, side, 3)))
            for i, caption in zip(some, captions, strict=True):
                rows[i]["caption"] = caption
                if caption is None:
                    rows[i] = failed(rows[i], CaptionError("the captioner gave no word"))
        self.report.add(captioned=len(rows), failed=sum(rows[i]["status"] == "failed" for i in alive))
        rows = [{**row, "captioner_id": self.captioner_id} for row in rows]
        return _with_heavy(rows, table, self.schema)


class Embed:
    """Captions to features of the frozen text tower, in an actor; for training, which then needs no text tower."""

    def __init__(
        self, models: Models, config: "ClipConfig", schema: pa.Schema, batch_size: int, report: StageReport
    ) -> None:
        from nsnet.clip import find_weights, load_clip

        models.use_threads()
        self.clip = load_clip(config, find_weights(config, models.clip_path()))
        self.clip.model.to(models.device)
        self.schema, self.batch_size, self.report = schema, batch_size, report

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, alive = _light_rows(table)
        for some in _batches(alive, self.batch_size):
            features = self.clip.encode_text([rows[i]["caption"] for i in some]).cpu().numpy()
            for i, feature in zip(some, features, strict=True):
                rows[i]["text_features"] = feature.tolist()
        self.report.add(embedded=len(rows))
        return _with_heavy(rows, table, self.schema)


class Score:
    """Mosaics and captions to verdicts, in an actor with the detector; drops the mosaic."""

    def __init__(self, models: Models, run_id: str, batch_size: int, report: StageReport) -> None:
        from nsnet.detector import Detector

        models.use_threads()
        self.detector = Detector.load(
            models.bundle_folder(), device=models.device, clip_weights=models.clip_path(), captioner=False
        )
        self.run_id, self.batch_size, self.report = run_id, batch_size, report

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, alive = _light_rows(table)
        side = self.detector.config.patches.mosaic_px
        for some in _batches(alive, self.batch_size):
            mosaics = _pixels(table, "mosaic", some, (side, side, 3))
            scores = self.detector.score(mosaics, [rows[i]["caption"] for i in some])
            for at, i in enumerate(some):
                if not np.isfinite(scores.logit[at]):
                    rows[i] = failed(rows[i], ScoreError(f"the logit is {scores.logit[at]}"))
                    continue
                rows[i] |= {
                    "logit": float(scores.logit[at]),
                    "prob_fake": float(scores.prob_fake[at]),
                    "verdict": scores.verdict[at],
                    "residual_energy": float(scores.residual_energy[at]),
                }
        constant = {
            "threshold": self.detector.calibration.threshold,
            "detector_id": self.detector.detector_id,
            "run_id": self.run_id,
            "scored_at": datetime.now(UTC),
        }
        self.report.add(scored=len(rows), failed=sum(rows[i]["status"] == "failed" for i in alive))
        return to_table([{**row, **constant} for row in rows], schema.VERDICTS)


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
