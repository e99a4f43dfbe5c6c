"""`nsnet evaluate`: report verdicts against labels, per generator and as the unweighted mean over generators."""

from typing import Any

import click

from jobs.console import main, parameters
from jobs.evaluation.comparison import SAMPLES
from jobs.storage.uris import Uri
from jobs.workflows.evaluate import STANDARD, evaluate, parse_pairs


@click.command()
@click.argument("verdicts_or_source", type=parameters.URI, metavar="VERDICTS_OR_SOURCE")
@click.option(
    "--out",
    type=parameters.URI,
    required=True,
    help="Folder for evaluation.json, .txt and .parquet, and report.html.",
)
@click.option(
    "--detector",
    type=parameters.URI,
    default=None,
    help="Bundle that scores the images of a labelled source.",
)
@parameters.pin_option()
@click.option("--detector-id", default=None, help="Use only verdicts of this detector.")
@parameters.align_option
@click.option(
    "--robustness", is_flag=False, flag_value=STANDARD, default=None, metavar="[standard|social|CHAIN,…]",
    help="Also score each image under these transforms, such as jpeg:75,resize:0.5+jpeg:75.",
)  # fmt: skip
@click.option(
    "--pair", "pairs", multiple=True, metavar="FAKE=REAL",
    help="Compare a generator without reals with the reals of another; repeatable; auto: as benchmarks do.",
)  # fmt: skip
@click.option("--split", default=None, help="Rows of this split, or all. Default: test, if present.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=None,
    help="Fake is a probability of at least this, instead of the detector's threshold; benchmarks use 0.5.",
)  # fmt: skip
@click.option("--samples", default=SAMPLES, show_default=True, help="Bootstrap samples for the intervals.")
@parameters.leakage_option(default=0)
@parameters.views_option
@parameters.max_failed_option
@parameters.column_option
@parameters.max_left_out_option
@parameters.weights_options
@parameters.address_option
@parameters.debug_option
def command(
    verdicts_or_source: Uri, out: Uri, pairs: tuple[str, ...], max_failed: float, max_left_out: int, **options: Any
) -> int:
    """Compare published verdicts (an output of `nsnet score`, or a Parquet file of it) with their labels.

    With --detector, the argument is a labelled source of images. It is scored first, below OUT; the same command
    continues a stopped run. Labels, generators and splits are then the current ones of the source. The predictions of
    a training (OUT.training/predictions.parquet) are verdicts as well. With --align, each image is judged raw and
    aligned, and --robustness is applied to aligned images.
    """
    result = evaluate(verdicts_or_source, out=out, pairs=parse_pairs(pairs), **options)
    if result["source"] is None:  # `nsnet score` has checked the failed images
        return 0
    failed, scored = result["failed"], result["all"]["real"] + result["all"]["fake"]
    failed_code = main.exit_code({"status": {"failed": failed}}, scored + failed, max_failed)
    return max(failed_code, main.left_out_code(result, max_left_out))


if __name__ == "__main__":
    main.program(command, "nsnet evaluate")
