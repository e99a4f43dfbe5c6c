"""Train variants of a recipe on one split, and compare them on the same test images."""

import re
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.cluster.address import check_address
from jobs.console import output, summary
from jobs.console.output import say
from jobs.console.tables import aligned
from jobs.dataset import schema
from jobs.experiments import leakage
from jobs.experiments.experiment import Experiment
from jobs.experiments.inputs import share_split
from jobs.experiments.job import train
from jobs.experiments.paths import LEAKAGE_FILE, PREDICTIONS_FILE, RESULT_FILE
from jobs.experiments.request import COMPARED_VARIANTS, TrainRequest
from jobs.report.text import leakage_lines
from jobs.storage import listing, parquet, reading, uris, writing
from jobs.storage.uris import Uri
from nsnet import metrics
from nsnet.bundle import DESCRIPTION
from nsnet.errors import NullSpaceError
from nsnet.images import DecodeLimits

SHOWN: Final = ("ap", "auroc", "acc")
BASELINE: Final = "advanced"
"""Variant to compare the others with."""


def ablate(
    source: Uri,
    *,
    out: Uri,
    variants: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0,),
    split_seed: int = 0,
    limits: DecodeLimits | None = None,
    captions: Uri | None = None,
    leave_out: str | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Train and test each variant with each seed; returns the table. Checks all requests before the first training.

    variants: default: those of `COMPARED_VARIANTS` that the towers of the recipe allow.
    """
    shared = TrainRequest(
        source=source, out=uris.join(out, "shared"), captions=captions or uris.join(out, "captions"),
        caption_missing=captions is None, seed=split_seed, leave_out=leave_out, limits=limits or DecodeLimits(),
        **training,
    )  # fmt: skip
    allowed = shared.allowed_variants()
    variants = variants or tuple(name for name in COMPARED_VARIANTS if name.partition(":")[0] in allowed)
    if "advanced" not in allowed:  # no text tower: nothing needs captions
        shared = replace(shared, variant=variants[0], captions=captions, caption_missing=False)
    requests = [
        replace(shared, out=uris.join(out, _name(variant, seed)), variant=variant, seed=seed, leave_out=None)
        for variant in variants
        for seed in seeds
    ]
    for request in requests:
        request.resolved()
    check_address(shared.address)
    split = share_split(Experiment.resolve(shared))
    failed: dict[str, str] = {}
    for number, request in enumerate(requests, start=1):
        say(f"ablate: {number} of {len(requests)}: {request.variant}, seed {request.seed}")
        request = replace(request, split=split, caption_missing=False)
        if _is_finished(request) and request.belongs_to(request.identity(request.resolved())):
            continue
        try:
            train(request)
        except NullSpaceError as error:  # concerns only this variant; any other error ends the command
            say(f"  {error}")
            failed[request.variant] = str(error)
    rows = [_row(variant, [r for r in requests if r.variant == variant], failed) for variant in variants]
    _add_tests(rows, requests)
    result = {"source": shared.source, "recipe": shared.recipe, "seeds": list(seeds), "split": split, "variants": rows}
    text = as_text(rows)
    writing.write_json(uris.join(out, "ablation.json"), result)
    writing.write_bytes(uris.join(out, "ablation.txt"), (text + "\n").encode())
    output.show(text)
    say(f"table: {uris.join(out, 'ablation.json')}")
    summary.note(table=uris.join(out, "ablation.json"), failed_variants=sorted(failed))
    return result


def _is_finished(request: TrainRequest) -> bool:
    """Whether a training is finished: its last file exists, the bundle's description; a control writes no bundle."""
    is_control = request.resolved().training.captions != "own"
    return listing.exists(uris.join(request.work, RESULT_FILE) if is_control else uris.join(request.out, DESCRIPTION))


def _name(variant: str, seed: int) -> str:
    return f"{re.sub(r'[^0-9A-Za-z.-]+', '-', variant)}-seed{seed}"


def _row(variant: str, requests: list[TrainRequest], failed: dict[str, str]) -> dict[str, Any]:
    """Table row of a variant: validation results as means over its seeds, or its error."""
    if variant in failed:
        return {"variant": variant, "error": failed[variant]}
    results = [reading.read_json(uris.join(request.work, RESULT_FILE), {"best_epoch": dict}) for request in requests]
    bests = [result["best_epoch"] for result in results]
    files = [uris.join(request.work, LEAKAGE_FILE) for request in requests]
    # trainings of older releases, or without test images, have none
    measured = [reading.read_json(file, {}) for file in files if listing.exists(file)]
    return {
        "variant": variant,
        "residual_energy": float(np.mean([best["residual_energy"] for best in bests])),
        "validation_ap": float(np.mean([best["val_ap"] for best in bests])),
        "best_epochs": [best["epoch"] for best in bests],
        "leakage": leakage.mean(measured) if len(measured) == len(files) else None,
    }


def _add_tests(rows: list[dict[str, Any]], requests: list[TrainRequest]) -> None:
    """Add to each row the metrics on the test images and their difference from `advanced`, with intervals.

    Only images that every training has judged count. All variants and seeds share the bootstrap samples, so that a
    difference of two variants compares the same images. Intervals are over images, not over seeds.
    """
    trained = {row["variant"]: row for row in rows if "error" not in row}
    tables = {
        variant: [
            _tested(uris.join(request.work, PREDICTIONS_FILE)) for request in requests if request.variant == variant
        ]
        for variant in trained
    }
    id_sets = [set(table.column("image_id").to_pylist()) for of_seeds in tables.values() for table in of_seeds]
    ids = pa.array(sorted(set.intersection(*id_sets)) if id_sets else [], pa.string())
    measured = {variant: _metrics_and_samples(of_seeds, ids) for variant, of_seeds in tables.items()}
    for variant, row in trained.items():
        row["test"] = _with_intervals(*measured[variant]) if len(ids) else None
        row["test_pictures"] = len(ids)
        if len(ids) and BASELINE in measured and variant != BASELINE:
            (value, samples), (base, base_samples) = measured[variant], measured[BASELINE]
            row["difference"] = _with_intervals(
                {name: _minus(value[name], base[name]) for name in value},
                {name: samples[name] - base_samples[name] for name in samples},
            )


def _tested(uri: str) -> pa.Table:
    """Predictions on the test images, ordered by image."""
    table = pa.Table.from_batches(parquet.read(uri, schema.PREDICTIONS), schema.PREDICTIONS)
    return table.filter(pc.equal(table.column("split"), "test")).sort_by("image_id")


def _metrics_and_samples(
    tables: list[pa.Table], ids: pa.Array
) -> tuple[dict[str, float | None], dict[str, metrics.Array]]:
    """Metrics on these images, and on bootstrap samples of them, as means over the seeds."""
    tables = [table.filter(pc.is_in(table.column("image_id"), value_set=ids)) for table in tables]
    labels = tables[0].column("label").to_numpy()
    probabilities = np.stack([table.column("prob_fake").to_numpy() for table in tables])
    called_fake = np.stack([pc.equal(table.column("verdict"), "fake").to_numpy() for table in tables])
    return metrics.summary(labels, probabilities, called_fake), metrics.bootstrap(labels, probabilities, called_fake)


def _with_intervals(values: dict[str, float | None], samples: dict[str, metrics.Array]) -> dict[str, Any]:
    bounds = metrics.intervals(samples)
    return {
        name: {"value": values[name], "low": bound and bound[0], "high": bound and bound[1]}
        for name, bound in bounds.items()
    }


def _minus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table as text, in the order of the variants."""
    heading = ["variant", "residual energy", "validation AP", *(f"test {name}" for name in SHOWN)]
    heading.append(f"test ap − {BASELINE}'s")
    cells = [[row["variant"], *_cells(row)] for row in rows]
    lines = aligned([heading, *cells], left=len(heading))
    lines += [f"{row['variant']}: {row['error']}" for row in rows if "error" in row]
    if measured := {row["variant"]: row["leakage"] for row in rows if row.get("leakage")}:
        lines += ["", *leakage_lines(measured)]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return ["failed", *[""] * (len(SHOWN) + 2)]
    cells = [f"{row['residual_energy']:.3f}", f"{row['validation_ap']:.4f}"]
    cells += [_cell((row["test"] or {}).get(name)) for name in SHOWN]
    return [*cells, _cell(row["difference"]["ap"], sign="+") if "difference" in row else ""]


def _cell(metric: dict[str, Any] | None, sign: str = "") -> str:
    if metric is None or metric["value"] is None or metric["low"] is None:
        return "undefined"
    return f"{metric['value']:{sign}.3f} [{metric['low']:{sign}.3f}, {metric['high']:{sign}.3f}]"
