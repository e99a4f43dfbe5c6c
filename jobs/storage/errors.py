"""Classify errors of stores and of this machine; say what helps, and how long to wait before a retry."""

import asyncio
import errno
import os
import random
import re
import traceback
from enum import Enum
from typing import Any, Final

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
)

from jobs.storage.redaction import without_secrets
from nsnet.errors import FetchError, NsnetError, ObjectChangedError, ObjectDeniedError, ObjectMissingError

ATTEMPTS: Final = 6
"""Requests for an object before it counts as unreadable."""
FIRST_WAIT_SECONDS: Final = 0.25
MAX_WAIT_SECONDS: Final = 10.0
OUTAGE_SECONDS: Final = 120.0
"""Maximum outage of the images' store before a run stops."""


class Fault(Enum):
    """Kinds of errors, by their remedy."""

    MISSING = "missing"
    CHANGED = "changed"
    DENIED = "denied"
    CREDENTIALS = "credentials"
    """The keys are expired or wrong: no object can be read until they are replaced."""
    TRANSIENT = "transient"
    """Throttling, resets, truncated and slow bodies, server errors: a retry helps."""
    PERMANENT = "permanent"


CREDENTIAL_CODES: Final = frozenset(
    "ExpiredToken ExpiredTokenException InvalidAccessKeyId InvalidToken RequestExpired RequestTimeTooSkewed "
    "SignatureDoesNotMatch TokenRefreshRequired UnrecognizedClientException".split()
)
THROTTLING_CODES: Final = frozenset(
    "SlowDown Throttling ThrottlingException RequestLimitExceeded RequestTimeout TooManyRequests BandwidthLimitExceeded"
    .split()
)  # fmt: skip
TRANSIENT_ERRNO: Final = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH,
     errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE}
)  # fmt: skip
ADVICE: Final = {
    errno.ENOSPC: "free some space, or choose another folder (--out, TMPDIR; Ray's own files are in /tmp/ray)",
    errno.EDQUOT: "the quota is used up: free some space, or choose another folder (--out, TMPDIR)",
    errno.EROFS: "it is mounted read-only: choose another folder (--out, TMPDIR, HOME)",
    errno.EFBIG: "the file system or `ulimit -f` allows no larger file",
    errno.EMFILE: "too many files are open: raise `ulimit -n`, for example to 65536",
    errno.ENFILE: "too many files are open on this machine: raise fs.file-max",
    errno.ENOMEM: "the machine is out of memory: end other programs, or use a larger machine",
}
"""Advice for each error number of this machine that stops a run."""
OUT_OF_MEMORY: Final = frozenset({"MemoryError", "ArrowMemoryError", "OutOfMemoryError", "OutOfMemoryException"})
"""Class names, including those of torch, Ray and DuckDB, which are not imported just to test for them."""
OUT_OF_DISK: Final = frozenset({"OutOfDiskError"})
RAY_ERRORS: Final = frozenset({"ray.exceptions", "ray.data.exceptions"})
"""Modules whose errors are failures of the cluster, except `CARRIERS`."""
CARRIERS: Final = frozenset({"RayError", "RayTaskError", "UserCodeException", "UnserializableException"})
"""Names of Ray's classes that wrap another error as text: it may be a bug of this program."""
RAY_DATA_MARK: Final = "SystemException"
"""Cause that Ray Data adds to errors of tasks and of Ray; it has no information."""


class ChangedError(Exception):
    """The store returned another version of the object than requested."""


class CutError(Exception):
    """The body ended before its declared length."""


def kind(error: BaseException) -> Fault:
    """Classify an error of botocore, aiohttp or the operating system."""
    if isinstance(error, ChangedError):
        return Fault.CHANGED
    answer = error.__cause__ if isinstance(error, OSError) else error  # s3fs's OSError omits details of its cause
    if isinstance(answer, ClientError):
        return _kind_of_answer(answer.response)
    if isinstance(error, NoCredentialsError | CredentialRetrievalError):
        return Fault.CREDENTIALS
    if isinstance(error, ParamValidationError):
        return Fault.PERMANENT
    # botocore's other errors concern connections and unreadable answers
    if isinstance(error, CutError | HTTPClientError | BotoCoreError | aiohttp.ClientError | asyncio.TimeoutError):
        return Fault.TRANSIENT
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Fault.MISSING
    if isinstance(error, PermissionError):
        return Fault.DENIED
    if isinstance(error, ConnectionError | TimeoutError) or (
        isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO
    ):
        return Fault.TRANSIENT
    return Fault.PERMANENT


def _kind_of_answer(response: Any) -> Fault:
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in CREDENTIAL_CODES or code == "400":  # S3 reports expired keys as 400 if the answer has no body (HEAD)
        return Fault.CREDENTIALS
    if code in THROTTLING_CODES or status in (408, 429) or status >= 500:
        return Fault.TRANSIENT
    if code in ("NoSuchKey", "NoSuchBucket", "NoSuchVersion") or status == 404:
        return Fault.MISSING
    if status == 412:
        return Fault.CHANGED
    return Fault.DENIED if status in (401, 403) else Fault.PERMANENT


def wait_seconds(attempt: int) -> float:
    """Seconds to wait after failure number `attempt` (1, 2, …): exponential back-off with full jitter, so that many
    workers do not retry at the same moment.
    """
    return random.uniform(0.0, min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**attempt))


def own_words(error: BaseException) -> str:
    """An error's message without the text about attempts that Ray Data appends."""
    return re.split(r"\n?Failed to [^\n]*attempts \(total backoff", str(error), maxsplit=1)[0]


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = without_secrets(" ".join(own_words(error).split()))[:300]
    if not text and isinstance(error, TimeoutError):
        text = "no answer in time"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def fetch_error(error: Exception, requests: int) -> FetchError:
    """The error of an image that could not be fetched after `requests` requests."""
    fault = kind(error)
    message = reason(error) if requests == 1 else f"{reason(error)} (after {requests} requests)"
    error_class = {
        Fault.MISSING: ObjectMissingError,
        Fault.CHANGED: ObjectChangedError,
        Fault.DENIED: ObjectDeniedError,
    }.get(fault, FetchError)
    result = error_class(message)
    result.requests = requests
    result.may_be_outage = fault in (Fault.TRANSIENT, Fault.CREDENTIALS, Fault.MISSING)
    return result


def root_cause(error: BaseException) -> BaseException:
    """The original error behind one that Ray passed on from a task or an actor."""
    for _ in range(20):  # a chain of causes may be circular
        inner = getattr(error, "cause", None)
        if not isinstance(inner, BaseException) and type(error).__module__.partition(".")[0] == "ray":
            inner = error.__cause__
        if not isinstance(inner, BaseException) or inner is error or type(inner).__name__ == RAY_DATA_MARK:
            break
        error = inner
    return error


def explain(error: BaseException) -> str | None:
    """One line that names the failure of a store or of this machine and its remedy; None: a bug of this program."""
    error = root_cause(error)
    name = type(error).__name__
    if isinstance(error, NsnetError):
        return own_words(error)
    if name in OUT_OF_MEMORY and type(error).__module__.partition(".")[0] == "torch":
        return f"{_detail(error)}: out of GPU memory; use a smaller --batch-size, or --separate-models in nsnet score"
    if name in OUT_OF_MEMORY or isinstance(error, MemoryError):
        return f"{_detail(error)}: out of memory; end other programs, or use a larger machine or a smaller --batch-size"
    if isinstance(error, RecursionError):
        return f"{_detail(error)}: data in a file are nested too deeply ({_last_line(error)})"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return f"{_detail(error)} Set HOME to a writable folder"
    if code := errno.ENOSPC if name in OUT_OF_DISK else _errno(error):
        return f"{_detail(error)}; {ADVICE[code]}"
    if "No usable temporary directory" in str(error):
        return f"{_detail(error)}; set TMPDIR to a writable folder"
    if type(error).__module__ in RAY_ERRORS and name not in CARRIERS and not getattr(error, "actor_init_failed", False):
        return f"the cluster failed: {reason(error)}"
    if kind(error) in (Fault.TRANSIENT, Fault.DENIED, Fault.CREDENTIALS) or isinstance(error, ClientError):
        return f"the store failed: {reason(error)}"
    return _detail(error) if isinstance(error, OSError | BotoCoreError) else None


def _errno(error: BaseException) -> int | None:
    """An error's key in `ADVICE`; found by its text if a library (DuckDB, safetensors, torch) drops the errno."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in ADVICE else None
    text = str(error)
    return next((code for code in ADVICE if os.strerror(code) in text), None)


def _detail(error: BaseException) -> str:
    """`file: reason` if the system gave both, else class and message."""
    if not isinstance(error, OSError) or not error.strerror:
        return reason(error)
    file = file_of(error)
    return without_secrets(f"{file}: {error.strerror}" if file else f"{type(error).__name__}: {error.strerror}")


def file_of(error: OSError) -> str | None:
    """The file that an OS error names, or None. Ray Data may write a text about attempts into the same field."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    return None if not name or "\n" in name else name


def _last_line(error: BaseException) -> str:
    """The innermost line of this program in an error's traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/jobs/" in frame.filename]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "unknown line"
