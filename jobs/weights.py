"""`nsnet weights`: mirror published weights into a bucket for workers without internet, and check a mirror."""

from collections.abc import Callable
from typing import Any

import click

from jobs.console import main, parameters
from jobs.storage.uris import Uri
from jobs.workflows import weights


def _models(default: str) -> Callable[[Any], Any]:
    """`--recipe` and `--detector`: which models."""

    def decorate(command: Any) -> Any:
        command = click.option(
            "--detector", "detectors", type=parameters.URI, multiple=True,
            help="Bundle whose models are meant, those that it does not hold itself; repeatable.",
        )(command)  # fmt: skip
        return click.option(
            "--recipe", "recipes", multiple=True, metavar="NAME",
            help=f"Recipe whose models are meant; repeatable. Default, without --detector: {default}.",
        )(command)  # fmt: skip

    return decorate


@click.group()
def command() -> None:
    """Mirror the published weights of recipes and bundles into a bucket, and check such a mirror.

    Other commands load from a mirror with --weights URI or NSNET_WEIGHTS.
    """


@command.command("mirror")
@click.option("--to", type=parameters.URI, required=True, help="Folder or s3:// URI of the mirror.")
@_models("vit-l-14")
@parameters.path_options
@parameters.debug_option
def mirror_command(**options: Any) -> int:
    """Copy towers, tokenizers and captioners from the hub, its local cache or local paths to a mirror.

    Files that the mirror has are not copied again, and nothing in it is changed or removed. Pickled weights become
    safetensors.
    """
    weights.mirror_models(**options)
    return 0


@command.command("check")
@click.argument("mirror", type=parameters.URI)
@_models("all of the mirror")
@click.option("--quick", is_flag=True, help="Compare sizes only; do not read the files.")
@parameters.debug_option
def check_command(mirror: Uri, **options: Any) -> int:
    """Compare every file of MIRROR with its recorded size and SHA-256, and print a line per model.

    The exit code is 2 if a model is missing or damaged.
    """
    weights.check_mirror(mirror, **options)
    return 0


if __name__ == "__main__":
    main.program(command, "nsnet weights")
