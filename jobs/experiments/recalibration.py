"""Make a detector for another operating point, from the validation predictions of its training, or from reals."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.console.output import say
from jobs.dataset import schema
from jobs.dataset.schema import PREDICTIONS
from jobs.runs import catalog
from jobs.storage import bundles, listing, parquet, probes, uris, writing
from jobs.storage.uris import Uri
from nsnet import bundle, calibration
from nsnet.calibration import Calibration, OperatingPoint
from nsnet.config import from_dict, to_dict
from nsnet.errors import BundleError, SourceError, UsageError


def calibrate(
    detector: Uri,
    *,
    operating_point: str,
    out: Uri,
    predictions: Uri | None = None,
    reals: Uri | None = None,
    uncertain: float | None = None,
) -> bundle.Description:
    """Write the bundle; returns its description.

    `predictions`: of its training. `reals`: instead, an output of scoring with this detector, of which all images are
    real; then only the threshold is chosen.
    """
    if (predictions is None) == (reals is None):
        raise UsageError("give either --predictions, of the training, or --reals, an output of nsnet score")
    point = OperatingPoint.parse(operating_point)
    point = point if uncertain is None else replace(point, uncertain_share=uncertain)
    probes.reachable(detector)
    probes.check_output(out)
    if listing.exists(uris.join(out, bundle.DESCRIPTION)):
        raise UsageError(f"{out} already holds a detector; choose another --out")
    folder = bundles.fetch_bundle(detector, bundle.DESCRIPTION)
    before = bundle.read(folder)
    if before.note:
        say(before.note)
    old = from_dict(Calibration, before.calibration)
    if reals is not None:
        fitted = calibration.fit_reals(_reals(reals, before), point, old)
    else:
        assert predictions is not None
        fitted = calibration.fit(*_validation(predictions, before), point, version=old.version + 1)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "bundle"
        for name in before.files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy / name)
        origin = before.training.get("calibrated_from", before.detector_id)
        training = {**before.training, "calibrated_from": origin, "calibration": to_dict(fitted)}
        after = bundle.seal(
            copy, config=before.config, calibration=to_dict(fitted), training=json.loads(json.dumps(training)),
            clip_digest=before.clip_digest,
        )  # fmt: skip
        if after.files != before.files:
            raise BundleError(f"the bundle {folder} was changed while it was read; try again")
        writing.upload_folder(copy, out, last=bundle.DESCRIPTION)
    say(f"detector {after.detector_id}: threshold {fitted.threshold:.4g} for {point}, version {fitted.version}: {out}")
    return after


def _reals(out: Uri, detector: bundle.Description) -> Any:
    """Logits of the untransformed images that this detector, or the one it was calibrated from, scored."""
    columns = pa.schema([schema.VERDICTS.field(name) for name in ("logit", "status", "label", "transform")])
    makers = {detector.detector_id, str(detector.training.get("calibrated_from", detector.detector_id))}
    logits: list[float] = []
    fakes = 0
    for maker in sorted(makers):
        for batch in catalog.newest(out, columns, detector_id=maker):
            rows = pa.Table.from_batches([batch])
            rows = rows.filter(pc.and_(pc.equal(rows["status"], "scored"), pc.is_null(rows["transform"])))
            fakes += pc.sum(pc.equal(rows["label"], 1)).as_py() or 0
            logits += rows["logit"].to_pylist()
    if fakes:
        raise SourceError(f"{out} holds {fakes:,} images that are labelled fake: --reals needs reals only")
    if not logits:
        raise SourceError(f"{out} holds no images that were scored by {detector.detector_id}")
    return np.array(logits)


def _validation(uri: str, detector: bundle.Description) -> tuple[Any, Any]:
    """Labels and logits of the validation images, from this detector or the one that it was calibrated from."""
    try:
        table = pa.Table.from_batches(parquet.read(uri, PREDICTIONS), PREDICTIONS)
    except FileNotFoundError as error:
        raise SourceError(f"{uri} does not exist") from error
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise SourceError(
            f"{uri} does not hold a training's predictions: {' '.join(str(error).split())[:200]}"
        ) from error
    known = {detector.detector_id, detector.training.get("calibrated_from")}
    makers = set(table.column("detector_id").to_pylist())
    if others := sorted(map(str, makers - known)):
        raise SourceError(f"{uri} is of detector {', '.join(others[:3])}, not of {detector.detector_id}")
    table = table.filter(pc.equal(table.column("split"), "val"))
    labels, logits = table.column("label").to_pylist(), table.column("logit").to_numpy()
    if {*labels} != {0, 1} or not np.isfinite(logits).all():
        raise SourceError(
            f"the {len(labels)} validation images of {uri} must be both real and fake, each with its label and a "
            "finite logit"
        )
    return labels, logits
