"""`nsnet caption`: a source of pictures to captions in Parquet."""

import secrets
from typing import Any

import click

from jobs import console, storage
from jobs.console import say
from nsnet.errors import ConfigError, UsageError
from nsnet.images import DecodeLimits


@click.command()
@click.argument("source")
@click.option("--out", required=True, help="Where the caption Parquet goes: a folder or s3:// URI.")
@click.option("--recipe", default="tiny", show_default=True, help="Recipe whose captioner is asked.")
@click.option("--batch-size", type=int, default=32, show_default=True, help="Pictures per model call.")
@click.option("--captioner", default=None, help="Local transformers folder of a BLIP captioner, instead of the hub's.")
@console.limit_options
@console.address_option
def command(source: str, **options: Any) -> int:
    """Caption every picture of SOURCE: one row each, a caption or the reason why there is none."""
    caption(source, limits=console.limits_from(options), **options)
    return 0


def caption(
    source: str,
    *,
    out: str,
    recipe: str = "tiny",
    batch_size: int = 32,
    captioner: str | None = None,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> int:
    """Caption a source; returns the number of rows."""
    from jobs.plan import write_manifest
    from jobs.sources import Source
    from jobs.stages import Models
    from nsnet import recipes
    from nsnet.captions import thumbnail_px
    from nsnet.preparation import PreparationConfig

    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    out = storage.absolute(out)
    storage.check_output(out)
    rows = storage.join(out, "captions")
    if storage.exists(rows):
        raise UsageError(f"{rows} exists; choose another --out")
    listing = Source(source)
    listing.check()
    config = recipes.get(recipe).detector
    models = Models(captioner=storage.model_path(captioner))
    side = thumbnail_px(models.captioner_folder(config.captioner))
    work = storage.join(out, f"staging-{secrets.token_hex(4)}")
    plan = write_manifest(listing, storage.join(work, "manifest.parquet"))
    say(f"source: {plan.describe()}")

    from jobs import pipeline, resources, schema

    resources.connect(address)
    stream = pipeline.captioned(
        plan,
        PreparationConfig(thumbnail_px=side, patches=config.patches, limits=limits or DecodeLimits()),
        config.captioner,
        models,
        keep=schema.CAPTIONS,
        batch_size=batch_size,
    )
    stream.write(rows, "caption", plan.count, ("prepared", "captioned"))
    storage.remove_folder(work)
    say(f"captions: {rows}")
    return plan.count


if __name__ == "__main__":
    console.run(command, "nsnet caption")
