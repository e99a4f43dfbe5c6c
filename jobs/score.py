"""`nsnet score`: a source of pictures to published verdicts."""

import platform
import time
from importlib.metadata import version
from typing import Any

import click

from jobs import console, storage
from jobs.console import say
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
@click.option("--limit", type=int, default=None, help="Score only the first so many pictures of the listing.")
@console.max_failed_option
@console.weights_options
@console.limit_options
@console.address_option
def command(source: str, **options: Any) -> int:
    """Score every picture of SOURCE: one published row each, a verdict or the reason why there is none.

    SOURCE is a folder, an s3:// prefix, a Parquet manifest (column `uri`), image Parquet (column `bytes`) or a
    WebDataset tar.
    """
    limits = console.limits_from(options)
    allowed = options.pop("max_failed")
    record = score(source, limits=limits, **options)
    return console.exit_code(record["counts"], record["rows"], allowed)


def score(
    source: str,
    *,
    detector: str,
    out: str,
    batch_size: int = 32,
    limit: int | None = None,
    clip_weights: str | None = None,
    captioner: str | None = None,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Score a source and publish; returns the run's record. All checks come before Ray or a model is started."""
    from jobs import ledger
    from jobs.ledger import Run
    from jobs.plan import write_manifest
    from jobs.sources import Source

    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"--batch-size and --limit must be at least 1, got {batch_size} and {limit}")
    started = time.monotonic()
    limits = limits or DecodeLimits()
    detector, out = storage.absolute(detector), storage.absolute(out)
    storage.reachable(detector)
    storage.check_output(out)
    folder = storage.fetch_bundle(detector, bundle.DESCRIPTION)
    description = bundle.read(folder)
    listing = Source(source)
    listing.check()
    from jobs.stages import Models
    from nsnet.captions import thumbnail_px
    from nsnet.clip import find_weights
    from nsnet.detector import config_of
    from nsnet.preparation import PreparationConfig

    config = config_of(description)
    models = Models(
        detector=detector, clip_weights=storage.model_path(clip_weights), captioner=storage.model_path(captioner)
    )
    side = thumbnail_px(models.captioner_folder(config.captioner))
    if not (folder / bundle.CLIP).is_dir():
        find_weights(config.clip, models.clip_path())
    run = Run(out=out)
    plan = write_manifest(listing, storage.join(run.staging, "manifest.parquet"), limit)
    say(f"source: {plan.describe()}")

    from jobs import pipeline, resources
    from jobs.stages import Score

    resources.connect(address)
    preparation = PreparationConfig(thumbnail_px=side, patches=config.patches, limits=limits)
    stream = pipeline.captioned(
        plan, preparation, config.captioner, models, keep=pipeline.SCORING_COLUMNS, batch_size=batch_size
    )
    stream = stream.through(Score, stream.shares.scorers, stream.models, run.run_id, batch_size, stream.report)
    stream.write(run.staged_rows, "score", plan.count, ("prepared", "captioned", "scored"))
    seconds = time.monotonic() - started
    record = run.publish(
        plan.uri,
        {
            "source": storage.absolute(source),
            "left_out": plan.left_out,
            "detector_id": description.detector_id,
            "seconds": round(seconds, 1),
            "settings": {
                "batch_size": batch_size,
                "limit": limit,
                "limits": to_dict(limits),
                "detector": to_dict(config),
            },
            "versions": {name: version(name) for name in RECORDED_PACKAGES} | {"python": platform.python_version()},
        },
    )
    say(ledger.summary(record))
    say(f"verdicts: {run.final}\nrecord:   {run.record}")
    return record


if __name__ == "__main__":
    console.run(command, "nsnet score")
