"""`nsnet caption`: a source of pictures to captions in Parquet."""

import secrets
import time
from dataclasses import replace
from typing import Any

import click

from jobs import console, storage
from jobs.console import say
from nsnet.config import to_dict
from nsnet.errors import ConfigError, UsageError
from nsnet.images import DecodeLimits


@click.command()
@click.argument("source")
@click.option("--out", required=True, help="Where the caption Parquet goes: a folder or s3:// URI.")
@click.option("--recipe", default="tiny", show_default=True, help="Recipe whose captioner is asked.")
@click.option("--batch-size", type=int, default=32, show_default=True, help="Pictures per model call.")
@click.option("--captioner", default=None, help="Local transformers folder of a BLIP captioner, instead of the hub's.")
@console.max_failed_option
@console.limit_options
@console.address_option
def command(source: str, **options: Any) -> int:
    """Caption every picture of SOURCE: one row each, a caption or the reason why there is none.

    The rows count once OUT/captions.json is there, which is written last.
    """
    allowed = options.pop("max_failed")
    record = caption(source, limits=console.limits_from(options), **options)
    return console.exit_code(record["counts"], record["rows"], allowed)


def caption(
    source: str,
    *,
    out: str,
    recipe: str = "tiny",
    batch_size: int = 32,
    captioner: str | None = None,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Caption a source; returns the record of what was written."""
    from jobs import attempts, ledger, parquet
    from jobs.plan import write_manifest
    from jobs.sources import Source
    from jobs.stages import Models
    from nsnet import recipes
    from nsnet.captions import captioner_id, thumbnail_px
    from nsnet.preparation import PreparationConfig

    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    started = time.monotonic()
    out, limits = storage.absolute(out), limits or DecodeLimits()
    storage.check_output(out)
    rows, record_uri = storage.join(out, "captions"), storage.join(out, "captions.json")
    if storage.exists(rows):
        stopped = "" if storage.exists(record_uri) else ", left unfinished by a run that was stopped: remove it, or"
        raise UsageError(f"{rows} exists{stopped or ';'} choose another --out")
    source = storage.absolute(source)
    Source(source).check()
    config = recipes.get(recipe).detector
    models = Models(captioner=storage.model_path(captioner))
    folder = models.captioner_folder(config.captioner)
    models, side = replace(models, captioner_id=captioner_id(config.captioner, folder)), thumbnail_px(folder)
    work = storage.join(out, f"staging-{secrets.token_hex(4)}")
    plan = write_manifest(source, storage.join(work, "manifest.parquet"))
    say(f"source: {plan.describe()}")
    todo = storage.join(work, "todo")
    attempts.write_todo(plan.uri, todo)

    from jobs import pipeline, resources, schema

    resources.connect(address)
    stream = pipeline.captioned(
        todo,
        source,
        PreparationConfig(thumbnail_px=side, patches=config.patches, limits=limits),
        config.captioner,
        models,
        keep=schema.CAPTIONS,
        batch_size=batch_size,
    )
    stream.write(rows, "caption", plan.count, ("prepared", "captioned"))
    files = [entry.uri for entry in storage.list_files(rows)]
    counts = ledger.Counts()
    ledger.verify_ids(
        parquet.read(plan.uri, schema.IDS), counts.watch(parquet.read_small(files, schema.CAPTIONS))
    )  # fmt: skip
    record = {
        "source": source,
        "rows": counts.rows,
        "counts": counts.by_column(),
        "store": counts.store(),
        "captioner_id": models.captioner_id,
        "left_out": plan.left_out,
        "seconds": round(time.monotonic() - started, 1),
        "settings": {
            "recipe": recipe,
            "batch_size": batch_size,
            "limits": to_dict(limits),
            "captioner": to_dict(config.captioner),
        },
    }
    storage.write_json(record_uri, record)
    storage.remove_folder(work)
    say(f"{ledger.summary(record)}\ncaptions: {rows}\nrecord:   {record_uri}")
    return record


if __name__ == "__main__":
    console.run(command, "nsnet caption")
