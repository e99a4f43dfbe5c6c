"""Submit a command to a cluster: at most once per id, with its code and its variables."""

import shlex
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobs.console.output import say
from jobs.storage.redaction import without_secrets
from jobs.submission import package, sealing
from jobs.submission.identity import attempt
from jobs.submission.job import installed_version
from nsnet.errors import LockedError, StorageError, UsageError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

    from jobs.submission.client import JobServer

MODULE: Final = "jobs.submission.job"
STOP_WAIT: Final = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
"""Seconds that a stopped job has to release its lock; Ray kills it after 3 by default."""
TOO_MANY_FAILED: Final = 3
"""Exit code of a job that published, though it counts as failed for Ray."""
MAX_ATTEMPTS: Final = 1000


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command to be run on a cluster."""

    command: str
    arguments: list[str]
    wanted: str
    """The id of its first job."""
    again: bool = False
    """Submit it although it is done, or under way."""
    code: str = "auto"
    """auto, installed or upload."""
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def uploads(self) -> bool:
        """Whether the source of this program is uploaded."""
        return self.code == "upload" or (self.code == "auto" and package.is_source_tree())


def submit(server: "JobServer", request: Request) -> str:
    """Start a job; returns its id. Raises `LockedError` if the request is done or under way, `UsageError` if a
    variable cannot be passed.
    """
    runtime_env = _variables(server, request.variables)
    command = shlex.join([request.command, *request.arguments])
    name = _free_id(server, request, command)
    entry = f"python -m {MODULE}"
    with tempfile.TemporaryDirectory(prefix="nsnet-submit-") as folder:
        if request.uploads:
            packed = package.pack(Path(folder))
            runtime_env["working_dir"] = str(packed.path)
            code = f"{packed.files} files of source, {packed.size / 2**20:.1f} MiB"
        else:
            version = installed_version()
            if version is None:
                raise UsageError("--code installed: no nsnet is installed here whose version the image could have")
            entry += f" --version {shlex.quote(version)}"
            code = f"nsnet {version} of the image"
        try:
            server.submit(name, f"{entry} {command}", runtime_env)
        except (StorageError, KeyboardInterrupt):
            say(
                f"{name} may have been started: `nsnet submit --follow {name} --address {server.address}` shows it, or "
                "says that there is no such job"
            )
            raise
    passed = f"; variables: {', '.join(request.variables)}" if request.variables else ""
    say(f"submitted {name} to {server.address}: {code}{passed}")
    return name


def _variables(server: "JobServer", values: dict[str, str]) -> dict[str, Any]:
    """The part of the runtime environment that brings variables to driver and workers: sealed, if there is a token."""
    if not values:
        return {"env_vars": dict(STOP_WAIT)}
    token = sealing.cluster_token() if server.asks_for_token() else None
    if token is None:
        sealing.check_plain(values)
        return {"env_vars": STOP_WAIT | values}
    return {
        "env_vars": STOP_WAIT | {sealing.SEALED: sealing.seal(values, token)},
        "worker_process_setup_hook": sealing.HOOK,
    }


def _free_id(server: "JobServer", request: Request, command: str) -> str:
    """The wanted id; if its job failed, or with `again`, the next one."""
    name = request.wanted
    for number in range(1, MAX_ATTEMPTS):
        name = attempt(request.wanted, number)
        earlier = server.info(name)
        if earlier is None:
            return name
        if not request.again and not _may_be_repeated(earlier):
            raise LockedError(
                f"{_state(name, earlier, command)}. `nsnet submit --follow {name} --address {server.address}` shows "
                "its log; --again submits this command nevertheless"
            )
        say(f"{_state(name, earlier, command)}: submitting this command as the next one")
    raise UsageError(f"{name} is attempt {MAX_ATTEMPTS}: choose another id with --submission-id")


def _may_be_repeated(job: "JobDetails") -> bool:
    """Whether a job ended without publishing: then the same command continues its work."""
    return job.status.is_terminal() and job.driver_exit_code not in (0, TOO_MANY_FAILED)


def _state(name: str, job: "JobDetails", command: str) -> str:
    """What is known of an earlier job; the id does not tell commands apart that write to the same output."""
    code = f", exit code {job.driver_exit_code}" if job.driver_exit_code is not None else ""
    at = f" at {datetime.fromtimestamp(job.start_time / 1000, UTC):%H:%M} UTC" if job.start_time else ""
    before = f"{name} was submitted before{at} ({str(job.status).lower()}{code})"
    if job.entrypoint.endswith(f" {command}"):
        return before
    return f"{before} with other arguments ({without_secrets(job.entrypoint.partition(MODULE)[2].strip())})"
