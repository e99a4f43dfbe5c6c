"""`nsnet caption`: publish captions and text features of a source, once for all trainings."""

from dataclasses import fields
from typing import Any

import click

from jobs.console import main, parameters
from jobs.dataset.plan import Selection
from jobs.storage.uris import Uri
from jobs.workflows.caption import caption


@click.command()
@click.argument("source", type=parameters.URI)
@click.option("--out", type=parameters.URI, required=True, help="Folder or s3:// URI to publish captions in.")
@click.option("--recipe", default="tiny", show_default=True, help="Recipe whose captioner and text tower are used.")
@parameters.batch_option
@parameters.precision_option
@parameters.selection_options
@click.option("--wait", is_flag=True, help="Wait while another run writes to OUT, instead of exiting with code 4.")
@parameters.max_failed_option
@parameters.max_left_out_option
@parameters.weights_options
@parameters.limit_options
@parameters.address_option
@parameters.debug_option
def command(source: Uri, **options: Any) -> int:
    """Caption the images of SOURCE that have no caption in OUT yet. Each gets one published row, with the caption and
    its features by the frozen text tower, or with an error. The same command continues a stopped run.

    Training reads these rows (`nsnet train --captions OUT`), and loads neither captioner nor text tower.
    """
    limits = parameters.limits_from(options)
    selection = Selection(**{item.name: options.pop(item.name) for item in fields(Selection)})
    allowed, left_out = options.pop("max_failed"), options.pop("max_left_out")
    record = caption(source, limits=limits, selection=selection, **options)
    failed_code = main.exit_code(record["counts"], record["rows"], allowed)
    return max(failed_code, main.left_out_code(record, left_out))


if __name__ == "__main__":
    main.program(command, "nsnet caption")
