"""`nsnet predict`: judge single images in this process, without Ray."""

from typing import Any

import click

from jobs.console import main, output, parameters
from jobs.workflows.predict import as_text, predict


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--detector", type=parameters.URI, required=True, help="Detector bundle: a folder or s3:// URI.")
@parameters.pin_option()
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per image.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if a GPU is available.")
@parameters.precision_option
@parameters.weights_options
@parameters.views_option
@parameters.trust_option
@parameters.limit_options
@parameters.debug_option
def command(images: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Judge one or more images (paths or s3:// URIs) and print the reasons.

    The exit code is 3 when an image could not be judged.
    """
    failures = 0
    for values in predict(images, limits=parameters.limits_from(options), **options):
        failures += values["status"] == "failed"
        if as_json:
            output.show_json(values)
        else:
            output.show(as_text(values))
    return main.EXIT_TOO_MANY_FAILED if failures else 0


if __name__ == "__main__":
    main.program(command, "nsnet predict")
