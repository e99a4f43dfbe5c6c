"""What a submitted job runs: `python -m jobs.submission.job [--version VERSION] COMMAND ARGUMENTS`.

It checks the version that the image has, if the source was not uploaded, opens the sealed variables, and becomes the
command.
"""

import importlib.metadata
import runpy
import sys

from jobs.console import main as console
from jobs.submission.sealing import unseal_environment
from nsnet.errors import NsnetError, UsageError


def installed_version() -> str | None:
    """The version of the installed distribution; None: there is none."""
    try:
        return importlib.metadata.version("nsnet")
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_version(wanted: str) -> None:
    found = installed_version()
    if found != wanted:
        raise UsageError(
            f"the cluster's image has nsnet {found or 'without a version'}, the submitter {wanted}: use an image of "
            "that version, or submit with --code upload"
        )


def main(arguments: list[str]) -> None:
    """Run a command with its arguments, as this process."""
    wanted = None
    if arguments[0] == "--version":
        wanted, *arguments = arguments[1:]
    try:
        if wanted is not None:
            _check_version(wanted)
        unseal_environment()
    except NsnetError as error:
        console.end_early(error, arguments)
    sys.argv = arguments
    runpy.run_module(f"jobs.{arguments[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
