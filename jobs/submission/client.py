"""Talk to the job server of a cluster: Ray's client, with timeouts, and its errors in one line."""

import logging
import os
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import ray.exceptions
import requests
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk

from jobs.storage.redaction import shown, without_secrets
from nsnet.errors import LockedError, StorageError, UsageError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

TIMEOUT_SECONDS: Final = 120.0
"""For an answer. The job server itself waits half a minute for the agent that starts a job."""
API_SERVER: Final = "RAY_API_SERVER_ADDRESS"
CERTIFICATES: Final = "SSL_CERT_FILE"
"""Variable that names trusted certificates, as for Python's own TLS; `requests` alone does not read it."""
MAX_REASON: Final = 400
TLS_REASON: Final = re.compile(r"\[SSL[^\]]*\] ([^('\"]*[^('\" ])")
"""What OpenSSL says, within what Python, urllib3 and requests say around it."""


class JobServer:
    """The job server of the cluster whose dashboard is at an address.

    Methods raise `StorageError` if it does not answer or fails, and `UsageError` if it refuses the token.
    """

    def __init__(self, address: str) -> None:
        for logger in (sdk.logger, dashboard_sdk.logger):  # they announce each upload and each connection that ends
            logger.setLevel(logging.WARNING)
        self.address = shown(address)
        self._use_token()
        os.environ[API_SERVER] = address  # which Ray prefers to an argument
        with self._explained():
            self._client = _Client(address, verify=os.environ.get(CERTIFICATES) or True)

    def info(self, name: str) -> "JobDetails | None":
        """What the server knows of a job; None: it knows no such job."""
        with self._explained():
            try:
                return self._client.get_job_info(name)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def submit(self, name: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Start a job; raises `LockedError` if another of this name was submitted in this moment."""
        with self._explained():
            try:
                self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env)
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise LockedError(f"{name} was submitted by another command in this moment") from error
                raise

    def stop(self, name: str) -> None:
        """Ask a job to end."""
        with self._explained():
            self._client.stop_job(name)

    def tail(self, name: str) -> AsyncGenerator[str, None]:
        """The log of a job from its beginning, until the job ends or the connection does."""
        return cast("AsyncGenerator[str, None]", self._client.tail_job_logs(name))

    def asks_for_token(self) -> bool:
        """Whether the cluster refuses requests without a token."""
        with self._explained():
            return self._client.status_without_token() == requests.codes.unauthorized

    @staticmethod
    def _use_token() -> None:
        """Send the token if there is one and nobody decided otherwise, as `ray.init` does, which also warns of it."""
        if "RAY_AUTH_MODE" not in os.environ and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            os.environ["RAY_AUTH_MODE"] = "token"
            Config.initialize("")  # reads it again

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise UsageError(f"{self.address} {_token_problem(str(error))}") from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise StorageError(f"{self.address}: {_connection_problem(error)}") from error
        except RuntimeError as error:
            raise StorageError(f"{self.address}: {last_line(str(error))}") from error


class _Client(sdk.JobSubmissionClient):
    """Ray's client waits for ever; this one for `TIMEOUT_SECONDS`."""

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": TIMEOUT_SECONDS, **arguments})

    def status_without_token(self) -> int:
        url = f"{self._address}/api/version"
        return requests.get(url, verify=self._verify, timeout=TIMEOUT_SECONDS, allow_redirects=False).status_code


def _token_problem(message: str) -> str:
    remedy = (
        "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds the token of this cluster "
        "(`ray get-auth-token` on its head)"
    )
    if "Authentication required" in message:
        return f"asks for a token, and none was sent: {remedy}"
    if "Authentication failed" in message:
        return f"refuses the token: {remedy}"
    return f"needs a token ({without_secrets(message.partition('. ')[0])}): {remedy}"


def _connection_problem(error: BaseException) -> str:
    cause = error.__context__ if type(error) is ConnectionError and error.__context__ else error  # Ray hides it
    if isinstance(cause, requests.exceptions.SSLError):
        found = TLS_REASON.search(str(cause))
        return (
            f"no TLS connection ({found[1] if found else 'TLS failed'}): name the file of its authority in "
            "SSL_CERT_FILE if the certificate is its own, or correct the address"
        )
    if isinstance(cause, requests.exceptions.ProxyError):
        return "the proxy of http_proxy or https_proxy does not answer: correct it, or name the host in no_proxy"
    if isinstance(cause, requests.exceptions.Timeout):
        return f"no answer within {TIMEOUT_SECONDS:g} s"
    return f"no connection ({last_line(str(cause))})"


def last_line(text: str) -> str:
    """The last line of an error's text that is not empty, without secrets, shortened: servers send tracebacks."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    line = without_secrets(lines[-1]) if lines else "no reason given"
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} …"
