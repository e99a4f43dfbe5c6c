"""`nsnet score`: a source of pictures to published verdicts, exactly once per version of a picture and detector."""

import json
import platform
import time
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import click

from jobs import attempts, console, ledger, lock, schema, storage
from jobs.console import say
from jobs.faults import OUTAGE_SECONDS
from jobs.ledger import Run
from jobs.plan import Selection, write_manifest
from jobs.sources import Source
from nsnet import bundle
from nsnet.config import to_dict
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits

RECORDED_PACKAGES = ("nsnet", "ray", "torch", "open_clip_torch", "transformers", "peft", "pillow", "numpy", "scipy")


@click.command()
@click.argument("source")
@click.option("--detector", required=True, help="Detector bundle: a folder or s3:// URI.")
@click.option("--out", required=True, help="Where verdicts are published: a folder or s3:// URI.")
@click.option("--batch-size", type=int, default=32, show_default=True, help="Pictures per model call.")
@console.selection_options
@click.option(
    "--reuse/--no-reuse", default=True, show_default=True, help="Take over published captions; do equal files once."
)
@click.option("--wait", is_flag=True, help="Wait while another run writes to OUT, instead of leaving with exit code 4.")
@click.option(
    "--outage-seconds",
    type=float,
    default=OUTAGE_SECONDS,
    show_default=True,
    help="Stop, to be continued, when the store of the pictures does not answer for so long.",
)
@console.max_failed_option
@console.weights_options
@console.limit_options
@console.address_option
def command(source: str, **options: Any) -> int:
    """Score the pictures of SOURCE that this detector has not judged yet: one published row each, a verdict or the
    reason why there is none. The same command continues a run that was stopped.

    SOURCE is a folder, an s3:// prefix, a Parquet manifest (column `uri`), image Parquet (column `bytes`) or a
    WebDataset tar.
    """
    limits = console.limits_from(options)
    selection = Selection(**{item.name: options.pop(item.name) for item in fields(Selection)})
    allowed = options.pop("max_failed")
    record = score(source, limits=limits, selection=selection, **options)
    return console.exit_code(record["counts"], record["rows"], allowed)


def score(
    source: str,
    *,
    detector: str,
    out: str,
    selection: Selection | None = None,
    batch_size: int = 32,
    reuse: bool = True,
    wait: bool = False,
    outage_seconds: float = OUTAGE_SECONDS,
    clip_weights: str | None = None,
    captioner: str | None = None,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Score a source and publish; returns the run's record, or one of 0 rows where there was nothing to do.

    A run with the same settings that was not published is continued. Whatever is wrong with the request is found
    before Ray or a model is started; before torch is, where there is nothing to do.
    """
    if batch_size < 1 or outage_seconds < 0:
        raise ConfigError(
            f"--batch-size must be at least 1 and --outage-seconds 0, got {batch_size} and {outage_seconds:g}"
        )
    started = time.monotonic()
    selection, limits = selection or Selection(), limits or DecodeLimits()
    source, detector, out = storage.absolute(source), storage.absolute(detector), storage.absolute(out)
    clip_weights, captioner = storage.model_path(clip_weights), storage.model_path(captioner)
    storage.reachable(detector)
    storage.check_output(out)
    description = bundle.read(storage.fetch_bundle(detector, bundle.DESCRIPTION))
    Source(source).check()
    settings = {
        "source": source,
        "detector_id": description.detector_id,
        "selection": to_dict(selection),
        "limits": to_dict(limits),
        "clip_weights": clip_weights,
        "captioner": captioner,
    }
    with lock.hold(out, wait=wait) as held:
        run = _unfinished(out, settings) or _plan(out, settings, selection, held)
        if run is None:
            return {"rows": 0, "counts": {name: {} for name in ledger.COUNTED}}
        told = storage.read_json(storage.join(run.staging, attempts.SETTINGS))
        plan = told["plan"]

        from jobs import pipeline, resources  # what follows needs Ray and torch, which take seconds to import
        from jobs.stages import Models, Score
        from nsnet.captions import captioner_id, thumbnail_px
        from nsnet.clip import find_weights
        from nsnet.detector import config_of
        from nsnet.preparation import PreparationConfig

        config = config_of(description)
        models = Models(
            detector=detector, clip_weights=clip_weights, captioner=captioner,
            run_id=run.run_id, detector_id=description.detector_id, reuse=reuse,
        )  # fmt: skip
        if not (models.bundle_folder() / bundle.CLIP).is_dir():
            find_weights(config.clip, models.clip_path())
        folder = models.captioner_folder(config.captioner)
        models = replace(models, captioner_id=captioner_id(config.captioner, folder))
        preparation = PreparationConfig(thumbnail_px=thumbnail_px(folder), patches=config.patches, limits=limits)
        known = ledger.published(out, schema.CAPTIONED, captioner_id=models.captioner_id) if reuse else ()
        held.check()
        attempt = attempts.begin(run.staging, held.number, known, models.captioner_id)
        if attempt.accepted:
            say(f"continuing run {run.run_id}: {attempt.count:,} of {plan['count']:,} pictures are left")
        if attempt.count:
            resources.connect(address)
            stream = pipeline.captioned(
                attempt.todo, source, preparation, config.captioner, models,
                keep=pipeline.SCORING_COLUMNS, batch_size=batch_size, checkpoint=attempt.checkpoint,
                outage_seconds=outage_seconds,
            )  # fmt: skip
            stream = stream.through(Score, stream.shares.scorers, stream.models, batch_size, stream.report)
            stages = ("prepared", "captioned", "scored")
            stream.write(attempt.rows, "score", attempt.count, stages, attempts.commit_rows(attempt.count))
        record = run.publish(
            storage.join(run.staging, attempts.MANIFEST),
            attempt.files(),
            check=held.check,
            planned_after=told["published"],
            details={
                "source": source,
                "left_out": plan["left_out"],
                "listing": plan["states"],
                "detector_id": description.detector_id,
                "captioner_id": models.captioner_id,
                "attempts": attempt.number,
                "seconds": round(time.monotonic() - started, 1),  # of the last attempt
                "settings": {**settings, "batch_size": batch_size, "reuse": reuse, "detector": to_dict(config)},
                "versions": {name: version(name) for name in RECORDED_PACKAGES} | {"python": platform.python_version()},
            },
        )
    say(ledger.summary(record))
    say(f"verdicts: {run.final}\nrecord:   {run.record}")
    return record


def _unfinished(out: str, settings: dict[str, Any]) -> Run | None:
    """A run with these settings that was planned and not published; remains of published ones are removed.

    One that another run has overtaken is given up: what it planned may have been published since.
    """
    found = None
    wanted, records = json.loads(json.dumps(settings)), {record["run_id"]: record for record in ledger.runs(out)}
    published = ledger.run_ids(records.values(), settings["detector_id"])
    for run_id, told in attempts.unfinished(out).items():
        run = Run(out=out, run_id=run_id)
        if run_id in records:
            run.tidy(records[run_id])
        elif told["settings"] != wanted:
            differing = sorted(name for name in wanted if told["settings"].get(name) != wanted[name])
            say(f"left alone: the unfinished run {run_id} has other settings ({', '.join(differing)}): {run.staging}")
        elif published - set(told["published"]):
            say(f"given up: the unfinished run {run_id}, since other runs were published after it was planned")
            run.abandon()
        else:
            found = run
    return found


def _plan(out: str, settings: dict[str, Any], selection: Selection, held: lock.Lock) -> Run | None:
    """Plan a new run; None: there is nothing to do."""
    run, detector_id = Run(out=out), settings["detector_id"]
    published = sorted(ledger.run_ids(ledger.runs(out), detector_id))
    done = ledger.published(out, schema.DONE, detector_id=detector_id)
    plan = write_manifest(settings["source"], storage.join(run.staging, attempts.MANIFEST), selection, done)
    say(f"source: {plan.describe()}")
    if not plan.count:
        storage.remove_folder(run.staging)
        return None
    told = {"count": plan.count, "left_out": plan.left_out, "states": plan.states}
    held.check()
    storage.write_json(
        storage.join(run.staging, attempts.SETTINGS), {"settings": settings, "published": published, "plan": told}
    )
    return run


if __name__ == "__main__":
    console.run(command, "nsnet score")
