"""The stage that scores: the detectors of a pass turn mosaics, and captions if they use them, into verdicts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import pyarrow as pa

from jobs.dataset import schema
from jobs.pipeline.actors import ResultCache, first_of_each, in_batches, light_rows, loading
from jobs.pipeline.models import Models
from jobs.pipeline.pixels import MOSAIC, gather
from jobs.pipeline.rows import ProgressReporter, RowDicts, failed, to_table
from jobs.storage.uris import Uri
from nsnet.errors import BundleError, CaptionError, ScoreError

if TYPE_CHECKING:
    from nsnet.detector import Detector

NO_CAPTION: Final = {field.name: None for field in schema.CAPTION}
NO_ERROR: Final = {**{field.name: None for field in schema.OUTCOME}, "status": "scored"}


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A detector of a pass, and what it needs of a row."""

    detector: Uri | None
    detector_id: str | None
    """Identity that the bundle must have when an actor loads it; None: any."""
    run_id: str | None
    """Run that is written into its rows."""
    detector_sha256: str | None = None
    """Hash that the bundle's description must have; None: any."""
    wanted: int = 1
    """Its bit in `schema.WANTED`: rows without it are not judged."""
    mosaics: tuple[str, ...] = (MOSAIC,)
    """Columns of its views."""
    needs_captions: bool = True


class Score:
    """A stage that makes a row per image and detector, one detector after the other, and drops the mosaics.

    Every model call has the same number of images, as in `Caption`: a continued run gives the same bits as an
    uninterrupted one.
    """

    name: ClassVar = "scoring"

    def __init__(self, models: Models, judges: Sequence[Judge], batch_size: int, report: ProgressReporter) -> None:
        self.scorers = [Scorer(models, judge, batch_size) for judge in judges]
        self.report = report

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, usable = light_rows(table)
        judged = [scorer.verdicts(table, rows) for scorer in self.scorers]
        failures = {
            row["image_id"]: row["error_class"]
            for of_scorer in judged
            for row in of_scorer
            if row["status"] == "failed"
        }
        errors = [failures[rows[i]["image_id"]] for i in usable if rows[i]["image_id"] in failures]
        self.report.passed(self.name, len(usable), errors, scored=len(rows))
        return pa.concat_tables([to_table(of_scorer, schema.VERDICTS) for of_scorer in judged])


class Scorer:
    """One detector of the stage."""

    def __init__(self, models: Models, judge: Judge, batch_size: int) -> None:
        self.judge, self.batch_size = judge, batch_size
        self.models = replace(
            models,
            detector=judge.detector,
            detector_sha256=judge.detector_sha256,
            detector_id=judge.detector_id,
            run_id=judge.run_id,
        )
        self.memory = ResultCache()
        # Load while the first images are prepared and captioned. Errors are raised by the first call, as in `Embed`.
        self._detector = ThreadPoolExecutor(1).submit(self._load)

    @cached_property
    def detector(self) -> "Detector":
        """The detector, when it is loaded."""
        detector = self._detector.result()
        self.models.use_threads()
        return detector

    def _load(self) -> "Detector":
        models = self.models
        with loading:
            from nsnet.detector import Detector
            from nsnet.text_features import TextFeatures

            models.use_threads()
            detector = Detector.load(
                models.bundle_folder(), device=models.device, precision=models.precision, compiled=models.compiled,
                captioner=False, sha256=models.detector_sha256, **models.tower_paths(),
            )  # fmt: skip
        if models.detector_id not in (None, detector.detector_id):
            raise BundleError(
                f"{models.detector} was replaced during the run: it holds {detector.detector_id}, not "
                f"{models.detector_id}"
            )
        detector.text_features = TextFeatures(detector.text_clip, self.batch_size)
        return detector

    def verdicts(self, table: pa.Table, every: RowDicts) -> RowDicts:
        """The rows of `schema.VERDICTS` for the rows of a table that this detector's run wants."""
        positions = [i for i, row in enumerate(every) if row["wanted"] & self.judge.wanted]
        rows = {i: self._own(every[i]) for i in positions}
        usable = [i for i in positions if rows[i]["status"] != "failed"]
        for batch in in_batches(first_of_each(rows, usable, self.models, self.memory), self.batch_size):
            self._score(table, rows, batch)
        for i in usable:
            result = self.memory[self.models.key(rows[i])]
            if np.isfinite(result["logit"]):
                rows[i] |= result
            else:
                rows[i] = failed(rows[i], ScoreError(f"the logit is {result['logit']} in {self.detector.precision}"))
        self.memory.trim()
        constant = {
            "threshold": self.detector.calibration.threshold,
            "detector_id": self.detector.detector_id,
            "run_id": self.models.run_id,
            "scored_at": datetime.now(UTC),
        }
        return [{**row, **constant} for row in rows.values()]

    def _own(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as it is without the other detectors of the pass."""
        if self.judge.needs_captions:
            return dict(row)
        error = NO_ERROR if row["error_stage"] == CaptionError.stage else {}
        return {**row, **NO_CAPTION, **error}

    def _score(self, table: pa.Table, rows: dict[int, dict[str, Any]], batch: list[int]) -> None:
        """Score the images of a batch of rows into the cache."""
        side = self.detector.config.patches.mosaic_px
        shape = (self.batch_size, side, side, 3)
        captions = None
        if self.judge.needs_captions:
            captions = [rows[i]["caption"] for i in batch]
            captions += captions[:1] * (self.batch_size - len(batch))
        scores = self.detector.score_views([gather(table, name, batch, shape) for name in self.judge.mosaics], captions)
        for k, i in enumerate(batch):
            result: dict[str, Any] = {
                "logit": float(scores.logit[k]),
                "prob_fake": float(scores.prob_fake[k]),
                "verdict": scores.verdict[k],
                "residual_energy": float(scores.residual_energy[k]),
            }
            if scores.prob_spread is not None and scores.views_agree is not None:
                spread, agree = float(scores.prob_spread[k]), bool(scores.views_agree[k])
                result |= {"prob_spread": spread, "views_agree": agree}
            self.memory[self.models.key(rows[i])] = result
