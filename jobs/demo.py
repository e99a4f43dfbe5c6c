"""`nsnet demo`: draw a labelled bucket, then train, score and evaluate on it."""

from pathlib import Path
from typing import Any

import click

from jobs.console import main, parameters
from jobs.experiments.demo import demo
from jobs.storage.uris import Uri


@click.command()
@click.option("--out", type=parameters.URI, required=True, help="Folder for images, detector, verdicts and table.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of images, weights and image order.")
@click.option("--workers", type=int, default=2, show_default=True, help="Training processes.")
@parameters.address_option
@parameters.debug_option
def command(out: Uri, **options: Any) -> int:
    """Make a labelled bucket, train `tiny` on it, score unseen images, and evaluate.

    The fakes are drawn scenes passed through a small up-sampling decoder. They show that the whole pipeline works, and
    say nothing about images from today's generators.
    """
    demo(Path(out), **options)
    return 0


if __name__ == "__main__":
    main.program(command, "nsnet demo")
