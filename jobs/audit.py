"""`nsnet audit`: report the content of a source and what in it would mislead a detector or a benchmark."""

from dataclasses import fields
from typing import Any

import click

from jobs.auditing.audit import AUDIT_FILE, COPIES_FILE, REPORT_FILE, audit
from jobs.console import main, parameters
from jobs.dataset.plan import Selection
from jobs.storage.uris import Uri
from nsnet.duplicates import DISTANCE


@click.command()
@click.argument("source", type=parameters.URI)
@click.option(
    "--out",
    type=parameters.URI,
    default=None,
    help=f"Folder or s3:// URI for facts, {AUDIT_FILE}, {REPORT_FILE} and {COPIES_FILE}; default: only print.",
)
@click.option("--distance", default=DISTANCE, show_default=True, help="Most differing hash bits of near-duplicates.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sample for the metadata's AUROC.")
@parameters.align_option
@parameters.selection_options
@parameters.max_failed_option
@parameters.max_left_out_option
@parameters.limit_options
@parameters.address_option
@parameters.debug_option
def command(source: Uri, **options: Any) -> int:
    """Report the images of SOURCE by generator and class, duplicates, and how well file format, size, bytes per pixel
    and JPEG quality alone separate real from fake.

    With --out, the next audit of the source reads only new and changed images. With --align, each image is also
    encoded again, and the metadata of the resulting files are measured beside those of the files as they are.
    """
    limits = parameters.limits_from(options)
    selection = Selection(**{item.name: options.pop(item.name) for item in fields(Selection)})
    allowed, left_out = options.pop("max_failed"), options.pop("max_left_out")
    result = audit(source, limits=limits, selection=selection, **options)
    forms = [result, *([result["alignment"]] if result["alignment"] else [])]
    failed = max(sum(error["pictures"] for error in form["failed"].values()) for form in forms)
    failed_code = main.exit_code({"status": {"failed": failed}}, result["pictures"], allowed)
    return max(failed_code, main.left_out_code(result, left_out))


if __name__ == "__main__":
    main.program(command, "nsnet audit")
