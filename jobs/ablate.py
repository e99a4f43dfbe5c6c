"""`nsnet ablate`: train and test variants of a recipe on one split with the same seeds, and print one table."""

from typing import Any

import click

from jobs.console import main, parameters
from jobs.console.parameters import RECIPES, WorkersType
from jobs.experiments.request import COMPARED_VARIANTS
from jobs.storage.uris import Uri
from nsnet.errors import ConfigError


@click.command()
@click.argument("source", type=parameters.URI)
@click.option("--out", type=parameters.URI, required=True, help="Folder or s3:// URI for the trainings and the table.")
@click.option("--recipe", default="tiny", show_default=True, help=RECIPES)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    help=f"Repeatable; default, where the recipe's towers allow them: {', '.join(COMPARED_VARIANTS)}.",
)
@click.option("--seeds", default="0", show_default=True, help="Seeds of weights and image order, such as 0,1,2.")
@click.option("--split-seed", type=int, default=0, show_default=True, help="Seed of the one split of all trainings.")
@click.option("--workers", type=WorkersType(), default="1", show_default=True, help="Training processes: N, or 2-8.")
@click.option("--epochs", type=int, default=None, help="Passes over the images; default: the recipe's.")
@click.option("--batch-size", type=int, default=None, help="Images per step over all workers; default: the recipe's.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other setting of TrainingConfig.")
@click.option(
    "--captions",
    type=parameters.OPTIONAL_URI,
    default=None,
    help="Output of nsnet caption; default: make captions below OUT.",
)
@parameters.leakage_option(default=1000)
@click.option("--leave-out", default=None, metavar="GENERATOR", help="Test on this generator, train on the others.")
@parameters.max_left_out_option
@parameters.column_option
@parameters.weights_options
@parameters.limit_options
@parameters.address_option
@parameters.debug_option
def command(source: Uri, variants: tuple[str, ...], seeds: str, **options: Any) -> int:
    """Train variants of a recipe on SOURCE, test them on the same images, and print one table with intervals.

    Finished trainings are kept: run the same command again to continue.
    """
    from jobs.experiments.ablation import ablate  # it imports torch, which takes seconds

    limits = parameters.limits_from(options)
    try:
        seed_numbers = tuple(int(part) for part in seeds.split(","))
    except ValueError:
        raise ConfigError(f"--seeds {seeds}: give numbers such as 0,1,2") from None
    ablate(source, variants=variants, seeds=seed_numbers, limits=limits, **options)
    return 0


if __name__ == "__main__":
    main.program(command, "nsnet ablate")
