"""`nsnet plan-cluster`: size a cluster for a number of images and a deadline, from measured or estimated rates."""

from typing import Any

import click

from jobs.console import main, output, parameters
from jobs.planning.plan import CPUS_PER_GPU, plan_cluster
from jobs.planning.text import as_text
from nsnet.config import to_dict


@click.command()
@click.option("--images", type=parameters.COUNT, required=True, help="Number of images, such as 250k, 10M or 1B.")
@click.option("--hours", type=float, help="Deadline: plan the smallest cluster that meets it.")
@click.option("--gpus", type=parameters.COUNT, help="With --cpus: say how many hours this cluster takes.")
@click.option("--cpus", type=parameters.COUNT, help="CPUs of all nodes, with --gpus.")
@click.option(
    "--cpus-per-gpu", type=parameters.COUNT, default=CPUS_PER_GPU, show_default=True,
    help="CPUs for each GPU on nodes with GPUs.",
)  # fmt: skip
@click.option("--megapixels", type=float, help="Mean size of an image, in 10^6 px; default: that of the rates.")
@click.option("--image-bytes", type=parameters.COUNT, help="Mean size of a file, in bytes; default: JPEG of this size.")
@click.option(
    "--known-captions", type=parameters.ShareType(), default="0%", show_default=True,
    help="Share of images that have a caption already; 100% for a detector without captions.",
)  # fmt: skip
@click.option("--price-gpu", type=float, help="Price of an hour of one GPU with the CPUs of its node.")
@click.option("--price-cpu", type=float, help="Price of an hour of one CPU on a node without GPUs.")
@click.option("--rates", type=parameters.URI, help="Local JSON file of rates; default: those of this release.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@parameters.debug_option
def command(as_json: bool, **options: Any) -> int:
    """Say how many GPUs, CPUs and GiB `nsnet score` needs for a number of images, and which stage limits it.

    It starts nothing. The answer is as good as its rates, which it names.
    """
    plan = plan_cluster(**options)
    if as_json:
        output.show_json(to_dict(plan))
    else:
        output.show(as_text(plan))
    return 0


if __name__ == "__main__":
    main.run(command, "nsnet plan-cluster")
