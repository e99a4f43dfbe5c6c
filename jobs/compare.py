"""`nsnet compare`: compare the verdicts of two detectors on the same images, as after a shadow run."""

import click

from jobs.console import main, output, parameters
from jobs.console.main import EXIT_TOO_MANY_FAILED
from jobs.storage.uris import Uri
from jobs.workflows.compare import EXAMPLES, as_text, compare_detectors


@click.command()
@click.argument("out", type=parameters.URI)
@click.option(
    "--detectors", default="", metavar="A,B",
    help="Ids, or beginnings of ids, of the detector in use and of the new one. Default: the two that there are.",
)  # fmt: skip
@click.option("--examples", type=click.IntRange(0, 10_000), default=EXAMPLES, show_default=True, help="Flips to show.")
@click.option("--out", "report", type=parameters.URI, help="Folder for compare.json and flips.parquet.")
@click.option(
    "--max-flips", type=parameters.ShareType(), default="100%", show_default=True,
    help="Share of images with another verdict above which the exit code is 3.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@parameters.debug_option
def command(out: Uri, detectors: str, examples: int, report: Uri | None, max_flips: float, as_json: bool) -> int:
    """Compare the newest verdicts of two detectors in OUT, an output of `nsnet score`, on images that both judged."""
    wanted = [name.strip() for name in detectors.split(",")] if detectors.strip() else []
    result = compare_detectors(out, wanted, examples=examples, report=report)
    output.show_json(result) if as_json else output.show(as_text(result))
    if result["flips"]["share"] > max_flips:
        output.say(
            f"{result['flips']['flips']:,} of {result['flips']['images']:,} images have another verdict, more than the "
            f"allowed {max_flips:.2%} (--max-flips): exit code {EXIT_TOO_MANY_FAILED}"
        )
        return EXIT_TOO_MANY_FAILED
    return 0


if __name__ == "__main__":
    main.program(command, "nsnet compare")
