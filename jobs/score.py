"""`nsnet score`: publish verdicts on a source of images, exactly once per image version and detector."""

from dataclasses import fields
from typing import Any

import click

from jobs.console import main, parameters
from jobs.dataset.plan import Selection
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.uris import Uri
from jobs.workflows.score import score_together


@click.command()
@click.argument("source", type=parameters.URI)
@click.option(
    "--detector",
    "detectors",
    type=parameters.URI,
    required=True,
    multiple=True,
    help="Detector bundle: a folder or s3:// URI. Repeat it to judge with several in one pass.",
)
@parameters.pin_option(multiple=True)
@click.option("--out", type=parameters.URI, required=True, help="Folder or s3:// URI to publish verdicts in.")
@parameters.batch_option
@parameters.precision_option
@parameters.selection_options
@click.option(
    "--reuse/--no-reuse", default=True, show_default=True, help="Reuse published captions; score equal files once."
)
@click.option("--wait", is_flag=True, help="Wait while another run writes to OUT, instead of exiting with code 4.")
@click.option(
    "--outage-seconds",
    type=float,
    default=OUTAGE_SECONDS,
    show_default=True,
    help="Stop when the store of the images does not answer for this long; the same command continues.",
)
@parameters.views_option
@click.option(
    "--separate-models",
    is_flag=True,
    help="Load captioner and detectors in different processes, for GPUs whose memory does not hold both.",
)
@parameters.max_failed_option
@parameters.max_left_out_option
@parameters.weights_options
@parameters.trust_option
@parameters.limit_options
@parameters.address_option
@parameters.debug_option
def command(source: Uri, **options: Any) -> int:
    """Score the images of SOURCE that the detectors have not judged yet. Each gets one published row per detector, with
    a verdict or an error. The same command continues a stopped run.

    SOURCE is a folder, an s3:// prefix, a Parquet manifest (column `uri`), image Parquet (column `bytes`) or a
    WebDataset tar.
    """
    limits = parameters.limits_from(options)
    selection = Selection(**{item.name: options.pop(item.name) for item in fields(Selection)})
    allowed, left_out = options.pop("max_failed"), options.pop("max_left_out")
    records = score_together(source, limits=limits, selection=selection, **options)
    failed_code = max(main.exit_code(record["counts"], record["rows"], allowed) for record in records)
    return max(failed_code, *(main.left_out_code(record, left_out) for record in records))


if __name__ == "__main__":
    main.program(command, "nsnet score")
