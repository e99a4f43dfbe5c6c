"""`nsnet runs`: list the published runs of an output, and whether their verdicts drift."""

import click

from jobs.console import main, output, parameters
from jobs.storage.uris import Uri
from jobs.workflows.history import as_text, history


@click.command()
@click.argument("out", type=parameters.URI)
@click.option("--detector-id", default=None, help="Only runs of this detector.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per run.")
@parameters.debug_option
def command(out: Uri, detector_id: str | None, as_json: bool) -> int:
    """List the runs that `nsnet score` published in OUT: counts, failures, speed and the share called fake.

    A run is compared with earlier runs of the same detector and source. An alarm means that it differs by more than
    those differ from each other; of unchanged runs, at most 5 % raise one.
    """
    runs = history(out, detector_id)
    for line in runs if as_json else ():
        output.show_json(line)
    if not as_json:
        output.show(as_text(runs))
    return 0


if __name__ == "__main__":
    main.program(command, "nsnet runs")
