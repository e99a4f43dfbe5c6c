"""What an error of a store means, and how long to wait before asking again."""

import asyncio
import errno
import random
import re
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

from nsnet.errors import FetchError, ObjectChangedError, ObjectDeniedError, ObjectMissingError

ATTEMPTS: Final = 6
"""How often an object is asked for before it counts as unreadable."""
FIRST_WAIT_SECONDS: Final = 0.25
LONGEST_WAIT_SECONDS: Final = 10.0
OUTAGE_SECONDS: Final = 120.0
"""How long the store of the pictures may be away before a run stops."""


class Fault(Enum):
    """Kinds of errors, by what helps."""

    MISSING = "missing"
    CHANGED = "changed"
    DENIED = "denied"
    CREDENTIALS = "credentials"
    """The keys are expired or wrong: new ones help, and nothing else can be read either."""
    TRANSIENT = "transient"
    """Throttling, resets, cut and slow bodies, server errors: asking again helps."""
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


class ChangedError(Exception):
    """The object that was sent is not the version that was asked for."""


class CutError(Exception):
    """The body ended before its announced length."""


def kind(error: BaseException) -> Fault:
    """What an error of botocore, aiohttp or the operating system means."""
    if isinstance(error, ChangedError):
        return Fault.CHANGED
    answer = error.__cause__ if isinstance(error, OSError) else error  # s3fs makes an OSError of it, and loses a part
    if isinstance(answer, ClientError):
        return _kind_of_answer(answer.response)
    if isinstance(error, NoCredentialsError | CredentialRetrievalError):
        return Fault.CREDENTIALS
    if isinstance(error, ParamValidationError):
        return Fault.PERMANENT
    # botocore's other errors are about connections and unreadable answers
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
    if code in CREDENTIAL_CODES or code == "400":  # S3 tells of expired keys so where an answer has no body (HEAD)
        return Fault.CREDENTIALS
    if code in THROTTLING_CODES or status in (408, 429) or status >= 500:
        return Fault.TRANSIENT
    if code in ("NoSuchKey", "NoSuchBucket", "NoSuchVersion") or status == 404:
        return Fault.MISSING
    if status == 412:
        return Fault.CHANGED
    return Fault.DENIED if status in (401, 403) else Fault.PERMANENT


def wait_seconds(attempt: int) -> float:
    """How long to wait after the `attempt`-th failure (1, 2, …): doubling, with full jitter, so that many workers do
    not come back at the same moment.
    """
    return random.uniform(0.0, min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**attempt))


def without_secrets(text: str) -> str:
    """A text without the user names and passwords that URLs in it may hold."""
    return re.sub(r"://[^/\s]*@", "://", text)


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = without_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300] or 'no answer in time'}"


def fetch_error(error: Exception, requests: int) -> FetchError:
    """The error of a picture whose bytes could not be had with so many requests."""
    fault = kind(error)
    told = reason(error) if requests == 1 else f"{reason(error)} (asked {requests} times)"
    which = {
        Fault.MISSING: ObjectMissingError,
        Fault.CHANGED: ObjectChangedError,
        Fault.DENIED: ObjectDeniedError,
    }.get(fault, FetchError)
    result = which(told)
    result.requests = requests
    result.may_be_outage = fault in (Fault.TRANSIENT, Fault.CREDENTIALS, Fault.MISSING)
    return result
