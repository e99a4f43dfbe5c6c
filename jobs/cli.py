"""Console script `nsnet COMMAND`. Each command is a module, which also runs as `python -m jobs.COMMAND`."""

import importlib
from typing import Final

import click

from jobs.console.main import program

COMMANDS: Final = {
    "audit": "Find what would mislead a detector in a labelled source.",
    "caption": "Caption the images of a source, once for all trainings.",
    "train": "Train a detector on labelled images.",
    "ablate": "Train variants of a recipe on one split, and compare them.",
    "calibrate": "Choose another operating point for a detector.",
    "import-head": "Make a detector from a published linear head.",
    "score": "Score new and changed images of a source and publish the verdicts.",
    "evaluate": "Compare verdicts with labels, per generator.",
    "compare": "Compare the verdicts of two detectors on the same images.",
    "compact": "Merge the small files of many nights into larger ones.",
    "runs": "List the runs of an output, and whether their verdicts drift.",
    "weights": "Mirror weights for workers without internet, and check a mirror.",
    "predict": "Judge single images, without a cluster.",
    "plan-cluster": "Size a cluster for a number of images and a deadline.",
    "submit": "Run a command as a job of a Ray cluster.",
    "demo": "Make images, train, score and evaluate on this machine.",
}
MODULES: Final = {"runs": "list_runs"}
"""Command -> module of `jobs`, if its name is taken by a package."""


class _Group(click.Group):
    """Loads a command's module only when it is called: `--help` must not wait for Ray and torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"jobs.{MODULES.get(name, name.replace('-', '_'))}").command
        command.name = name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Group)
@click.version_option(package_name="nsnet")
def group() -> None:
    """Detect AI-generated images in whole object-store buckets.

    Exit codes: 0 done; 1 a bug or an infrastructure error; 2 wrong usage; 3 finished, but more images failed than
    allowed; 4 another run holds the lock.
    """


def main() -> None:
    """Run the console script."""
    program(group, "nsnet")


if __name__ == "__main__":
    main()
