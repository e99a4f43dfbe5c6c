"""`nsnet submit`: run a command as a job of a Ray cluster, follow it, and end with its exit code."""

import copy
import importlib
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import click
from click.core import ParameterSource

from jobs.cluster.address import check_dashboard
from jobs.console import main, output, parameters
from jobs.console.output import say, show
from jobs.storage import redaction
from jobs.storage.uris import Uri, is_local
from jobs.submission import identity, sealing
from jobs.submission.request import Request, submit
from nsnet.errors import NsnetError, UsageError

COMMANDS: Final = ("train", "caption", "score", "evaluate", "audit", "ablate")
"""Commands that use a cluster."""
SUBMITTING: Final = ("variables", "no_wait", "again", "submission_id", "code")
"""Options that a job which was submitted has no use for."""


@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("name", metavar=f"[{'|'.join(COMMANDS)}]", required=False)
@click.argument("arguments", metavar="ARGUMENTS…", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--address", metavar="URL",
    help="Dashboard of the cluster, http://HOST:8265. Default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if it is http.",
)  # fmt: skip
@click.option(
    "--env", "variables", multiple=True, metavar="NAME",
    help="Pass this variable of the environment to driver and workers, sealed with the cluster's token; repeatable.",
)  # fmt: skip
@click.option("--no-wait", is_flag=True, help="Print the job's id on stdout and end, without waiting for the job.")
@click.option("--detach", is_flag=True, help="At Ctrl-C do not ask: the job goes on.")
@click.option("--again", is_flag=True, help="Submit although the job of this night succeeded or runs.")
@click.option("--submission-id", metavar="ID", help="Id of the job. Default: made of command, output and date (UTC).")
@click.option(
    "--code", type=click.Choice(["auto", "installed", "upload"]), default="auto", show_default=True,
    help="Code that the job runs: the image's, or a copy of this one; auto: upload from a source tree.",
)  # fmt: skip
@click.option("--follow", metavar="ID", help="Submit nothing: follow this job, and end with its exit code.")
@parameters.debug_option
@click.pass_context
def command(
    context: click.Context,
    /,
    name: str | None,
    arguments: tuple[str, ...],
    address: str | None,
    variables: tuple[str, ...],
    no_wait: bool,
    detach: bool,
    follow: str | None,
    **options: Any,
) -> int:
    """Run a command as a job of a Ray cluster, follow its log, and end with its exit code.

    ARGUMENTS are those of the command, checked here before anything is submitted. Options of the submission may stand
    among them. The job uses the cluster that it runs in.
    """
    if name is None or "--help" in (name, *arguments):
        if name is None and follow is not None:
            _check_alone(context)
            return _follow(_server(address), identity.check_id(follow), detach)
        show(_help(context, name))
        return 0 if "--help" in (name, *arguments) else main.EXIT_USAGE
    if follow is not None:
        raise click.UsageError("--follow ID follows a job that was submitted: give no command")
    request = _request(name, list(arguments), variables, **options)
    server = _server(address)
    job = submit(server, request)
    if no_wait:
        show(job)
        return 0
    return _follow(server, job, detach)


def _check_alone(context: click.Context) -> None:
    """Refuse options beside `--follow` that are for a submission."""
    for param in context.command.params:
        is_given = context.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
        if is_given and param.name in SUBMITTING:
            raise click.UsageError(f"--follow ID follows a job that was submitted: leave {param.opts[0]} out")


def _request(
    name: str, arguments: list[str], variables: tuple[str, ...], submission_id: str | None, **options: Any
) -> Request:
    """Check a command's arguments by its own parser."""
    inner = _command(name)
    for argument in arguments:
        if redaction.holds_secrets(_value(argument)) or redaction.holds_secrets(argument):
            raise UsageError(f"{redaction.shown(argument)} {redaction.REFUSED}: export the key, then give --env NAME")
        if redaction.quotes_secret(argument):
            raise UsageError("an argument holds the value of a secret variable: export it, then give --env NAME")
    values = sealing.chosen(variables)
    absolute = _absolute(inner, name, [*_from_environment(inner, name, arguments), *arguments])
    parsed = _parsed(inner, name, absolute)
    # an audit that only prints has no output
    wanted = identity.submission_id(name, parsed["out"] or parsed["source"], datetime.now(UTC))
    return Request(
        command=name,
        arguments=absolute,
        wanted=identity.check_id(submission_id) if submission_id else wanted,
        variables=values,
        **options,
    )


def _command(name: str) -> click.Command:
    """The command without its `--address`: a job uses the cluster that it runs in."""
    if name not in COMMANDS:
        raise click.UsageError(f"{name!r} is no command that runs on a cluster: give one of {', '.join(COMMANDS)}")
    inner = copy.copy(importlib.import_module(f"jobs.{name}").command)
    inner.params = [param for param in inner.params if param.name != "address"]
    return inner  # type: ignore[no-any-return]


def _context(inner: click.Command, name: str, arguments: list[str]) -> click.Context:
    """The arguments, parsed; ends with what click says of wrong ones."""
    return inner.make_context(f"nsnet submit {name}", list(arguments))


def _parsed(inner: click.Command, name: str, arguments: list[str]) -> dict[str, Any]:
    """The values of arguments."""
    return _context(inner, name, arguments).params


def _from_environment(inner: click.Command, name: str, arguments: list[str]) -> list[str]:
    """Options of the command that variables of this process give, as NSNET_WEIGHTS does: the job has other variables.
    Options of messages are those of the submission.
    """
    found = ["--debug"] if main.debugging() else []
    found += ["--log-format", "json"] if output.is_json() else []
    context = _context(inner, name, arguments)
    for param in inner.params:
        given = context.get_parameter_source(param.name or "") is ParameterSource.ENVIRONMENT
        if given and param.expose_value and (value := param.value_from_envvar(context)):
            found += [param.opts[0], str(value)]
    return found


def _value(argument: str) -> str:
    """What an argument gives: of `--option=value`, the value."""
    return argument.partition("=")[2] if argument.startswith("--") and "=" in argument else argument


def _absolute(inner: click.Command, name: str, arguments: list[str]) -> list[str]:
    """Make local paths absolute, as the command would here: a job runs in another folder, on another machine."""
    parsed = _parsed(inner, name, arguments)
    local = {value for value in _flat(parsed.values()) if isinstance(value, Uri) and is_local(value)}
    if not local:
        return arguments
    absolute = []
    for argument in arguments:
        value = _value(argument)
        path = _as_uri(value)
        absolute.append(argument.removesuffix(value) + path if path in local else argument)
    if _parsed(inner, name, absolute) != parsed:  # an option's value looks like a path that another argument names
        raise UsageError("a relative path is spelled like another argument: give absolute paths")
    say(f"local paths are those of the cluster's nodes, and every node must reach them: {', '.join(sorted(local))}")
    return absolute


def _as_uri(value: str) -> str:
    """What an argument is if the command reads it as an address; empty if it cannot be one."""
    try:
        return Uri(value) if value else ""
    except NsnetError:
        return ""


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)


def _server(address: str | None) -> Any:
    """The job server of an address, which is checked before Ray is imported."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    given = {"--address": address} | {name: os.environ.get(name) for name in names}
    if not (given["RAY_ADDRESS"] or "").startswith("http"):
        given["RAY_ADDRESS"] = None
    named, chosen = next(((name, value) for name, value in given.items() if value), ("", ""))
    if not chosen:
        raise UsageError("no cluster is named: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
    check_dashboard(chosen, f"{named} {redaction.shown(chosen)}")

    from jobs.submission.client import JobServer  # it imports Ray, which takes a second

    return JobServer(chosen)


def _follow(server: Any, job: str, detach: bool) -> int:
    from jobs.submission.following import follow

    is_terminal = sys.stdin.isatty() and sys.stderr.isatty()
    return follow(server, job, None if detach or not is_terminal else lambda: _ask(job))


def _ask(job: str) -> bool:
    try:
        return click.confirm(f"\nstop {job}? Otherwise it goes on", default=False, err=True)
    except click.Abort:
        return False


def _help(context: click.Context, name: str | None) -> str:
    """The help of `nsnet submit`, or of a command with the options of its submission."""
    if name is None or name == "--help":
        return context.get_help()
    inner = _command(name)
    formatter = context.make_formatter()
    with formatter.section("Options of the submission"):
        known = {param.name for param in inner.params}
        options = [param for param in command.params if isinstance(param, click.Option) and param.name not in known]
        formatter.write_dl([record for option in options if (record := option.get_help_record(context))])
    own = inner.make_context(f"nsnet submit {name}", [], resilient_parsing=True)
    return f"{inner.get_help(own)}\n\n{formatter.getvalue()}".rstrip("\n")


if __name__ == "__main__":
    main.program(command, "nsnet submit")
