"""`nsnet calibrate`: a detector for another operating point, from the validation predictions of its training."""

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
    required=True,
    help="predictions.parquet of its training; only validation is used.",
)
@click.option(
    "--operating-point", required=True, help="accuracy, fpr=1%, or cost=10:1@0.01 (false alarm : miss @ share)."
)
@click.option(
    "--uncertain", type=parameters.ShareType(), default=None,
    help="Share of images nearest to the threshold that are called uncertain; default: what the point says, or none.",
)  # fmt: skip
@click.option("--out", type=parameters.URI, required=True, help="Where the new bundle goes: a folder or s3:// URI.")
@parameters.debug_option
def command(detector: Uri, **options: Any) -> int:
    """Write DETECTOR again with temperature, threshold and band for another operating point, as a detector of its own.

    Weights stay; test images are never looked at.
    """
    calibrate(detector, **options)
    return 0


if __name__ == "__main__":
    main.run(command, "nsnet calibrate")
