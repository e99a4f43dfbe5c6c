"""`nsnet import-head`: make a bundle from a published linear head on CLIP features, such as UniversalFakeDetect's."""

from typing import Any

import click

from jobs.console import main, parameters
from jobs.storage.uris import Uri


@click.command("import-head")
@click.argument("head", type=parameters.MODEL_PATH)
@click.option("--out", type=parameters.URI, required=True, help="Folder or s3:// URI of the detector bundle.")
@click.option("--recipe", default="vit-l-14", show_default=True, help="The CLIP that the head was trained on.")
@click.option(
    "--variant", default="linear", show_default=True, help="The head's input: linear (centre crop) or linear:resize."
)
@click.option(
    "--clip-weights",
    type=parameters.MODEL_PATH,
    default=None,
    help="Local path of the CLIP weights, instead of the hub's.",
)
@parameters.mirror_option
@parameters.debug_option
def command(head: Uri, **options: Any) -> int:
    """Make a detector from HEAD, a file with the `weight` (1, D) and `bias` (1) of a linear layer on the features of a
    frozen CLIP image tower: a .safetensors file, or a .pth file, from which only tensors are read.

    The detector crops the centre of an image, as UniversalFakeDetect does, or squashes it, as AIGIBench's code for that
    detector does (--variant linear:resize). It calls an image fake if its probability is at least 0.5.
    """
    from jobs.experiments.imported_head import import_head  # it imports torch, which takes seconds

    import_head(head, **options)
    return 0


if __name__ == "__main__":
    main.program(command, "nsnet import-head")
