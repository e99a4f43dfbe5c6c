"""`nsnet calibrate`: make a detector for another operating point, from the validation predictions of its training."""

from typing import Any

import click

from jobs.console import main, parameters
from jobs.experiments.recalibration import calibrate
from jobs.storage.uris import Uri


@click.command()
@click.argument("detector", type=parameters.URI)
@click.option(
    "--predictions",
    type=parameters.URI,
    help="predictions.parquet of its training; only validation rows are used.",
)
@click.option(
    "--reals",
    type=parameters.URI,
    help="Instead: output of `nsnet score` by DETECTOR on real images, such as those of one source.",
)
@click.option(
    "--operating-point", required=True,
    help="accuracy, fpr=1%, fpr<=1%@95% (with a guarantee), or cost=10:1@0.01 (false alarm : miss @ share).",
)  # fmt: skip
@click.option(
    "--uncertain", type=parameters.ShareType(), default=None,
    help="Share of images nearest to the threshold to call uncertain; default: that of the operating point, or none.",
)  # fmt: skip
@click.option("--out", type=parameters.URI, required=True, help="Folder or s3:// URI of the new bundle.")
@parameters.debug_option
def command(detector: Uri, **options: Any) -> int:
    """Write a copy of DETECTOR with the temperature, threshold and uncertain band of another operating point; from
    reals, the temperature stays.

    The weights stay the same; test images are never used.
    """
    calibrate(detector, **options)
    return 0


if __name__ == "__main__":
    main.program(command, "nsnet calibrate")
