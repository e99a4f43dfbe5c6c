"""`nsnet train`: train a detector bundle on labelled images."""

from typing import Any

import click

from jobs.console import main, parameters
from jobs.console.parameters import RECIPES, WorkersType
from jobs.experiments.request import TrainRequest
from jobs.storage.uris import Uri


@click.command()
@click.argument("source", type=parameters.URI)
@click.option("--out", type=parameters.URI, required=True, help="Folder or s3:// URI of the detector bundle.")
@click.option("--recipe", default="tiny", show_default=True, help=RECIPES)
@click.option(
    "--variant",
    default="advanced",
    show_default=True,
    help="advanced, original[:RULE], linear[:resize], rank-k[:K], …; without a text tower linear and no-projection.",
)
@click.option("--workers", type=WorkersType(), default="1", show_default=True, help="Training processes: N, or 2-8.")
@click.option("--epochs", type=int, default=None, help="Passes over the images; default: the recipe's.")
@click.option("--batch-size", type=int, default=None, help="Images per step over all workers; default: the recipe's.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other setting of TrainingConfig.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, image order and split.")
@click.option(
    "--captions",
    type=parameters.OPTIONAL_URI,
    default=None,
    help="Output of nsnet caption; default: make captions beside OUT.",
)
@click.option("--caption-missing", is_flag=True, help="Caption images that have no caption in --captions.")
@click.option(
    "--split",
    type=parameters.OPTIONAL_URI,
    default=None,
    help="split.parquet of a training, to use its split.",
)
@click.option("--leave-out", default=None, metavar="GENERATOR", help="Keep this generator's images for the test.")
@click.option(
    "--operating-point",
    default="accuracy",
    show_default=True,
    help="Goal of the threshold: accuracy, fpr=1%, fpr<=1%@95% (with a guarantee), or cost=10:1@0.01 (false alarm : "
    "miss @ share of fakes).",
)
@click.option(
    "--max-failed", type=parameters.ShareType(), default="5%", show_default=True, help="Share of unreadable images."
)
@parameters.max_left_out_option
@parameters.column_option
@parameters.weights_options
@parameters.limit_options
@parameters.address_option
@parameters.debug_option
def command(source: Uri, **options: Any) -> int:
    """Train a detector on the labelled images of SOURCE and write it as a bundle.

    Labels come from 0_real|1_fake, nature|ai or real|fake folders, or from a `label` column. `train`, `val` and `test`
    folders, or a `split` column, are kept; images without them are split by content. The same command continues a
    stopped training. Split, records and predictions are in OUT.training.
    """
    request = TrainRequest(source=source, limits=parameters.limits_from(options), **options)

    from jobs.experiments.job import train  # it imports torch, which takes seconds

    train(request)
    return 0


if __name__ == "__main__":
    main.program(command, "nsnet train")
