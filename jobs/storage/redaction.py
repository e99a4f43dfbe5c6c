"""Remove secrets from texts that came from an argument, the environment or an error.

All output of the program passes through `without_secrets`: the console, rows, records, logs and tracebacks.
"""

import logging
import os
import re
import traceback
from collections.abc import Iterator
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

HIDDEN: Final = "***"
REFUSED: Final = "holds a user, a password or a signature, which is not allowed in an address"
"""Error text for an address that `holds_secrets`."""
MIN_SECRET_LENGTH: Final = 8
"""Shortest value of a secret variable that is hidden: hiding every `test` or `token` would spoil messages."""

SECRET_WORD: Final = re.compile(
    r"(^|_)([A-Z0-9]*(SECRET|TOKEN|PASSWORD|PASSWD|APIKEY)|PASS|PASSPHRASE|KEY|CREDENTIALS?|SAS|SIGNATURE|AUTH|"
    r"CONNECTION_STRING)(_|$)", re.IGNORECASE,
)  # fmt: skip
"""In the name of an environment variable: its value is a secret."""
PUBLIC_END: Final = re.compile(
    r"_(PATH|FILE|DIR|URL|URI|ENDPOINT|REGION|MODE|SOCK|NAME|TYPE|TIMEOUT|LENGTH|SIZE|COUNT|ENABLED)$", re.IGNORECASE
)
"""Such a variable says something about a secret, as `…_TOKEN_PATH` does."""

USER_OF_URL: Final = re.compile(
    r"""(?<=://)(?:[^/\s'"<>@:]{0,200}:(?!\d{1,5}(?:[/?#\s]|$))[^\s'"<>]{0,999}@|[^/\s'"<>]{0,999}@)"""
)
"""`user:password@` after a scheme. A password may contain `/` and `@`, as S3's do; a port is not a password. All
repetitions are bounded, because an error may quote untrusted text."""
USER_OF_HOST: Final = re.compile(
    r"""(?<![\w.-])[^\s/:@'"<>=,()\[\]]{1,200}:(?!//|\d+[/:])[^\s'"<>]{1,999}@(?=[\w\[*])"""
)
"""`user:password@` without a scheme."""
ENCODED_USER: Final = re.compile(r"(?<=%3A%2F%2F)[^\s/&'\"<>]{1,999}%40", re.IGNORECASE)
"""`user:password@` in an address that is a URL-encoded parameter of another address."""
BREAKS: Final = re.compile(r"""[\s'"<>]""")
"""Characters that end an address within a text."""
SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://")
USER: Final = re.compile(r"[^/]*:(?!\d{1,5}$)")
"""Start of an address's part before the first `/` if it names a user, not only host and port."""
QUERY: Final = re.compile(r"""(https?://[^\s'"<>?]{0,999})\?[^\s'"<>]*""", re.IGNORECASE)
PARAMETER: Final = re.compile(
    r"""(?:(?<![A-Za-z0-9/])|(?<=%3F)|(?<=%26))"""
    r"""(X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|(?:SharedAccess)?Signature|sig|"""
    r"""(?:[a-z]{1,20}[_-])?token|password|passwd|(?:client_)?secret|api[_-]?key|account[_-]?key|"""
    r"""(?:aws_)?(?:secret_)?access_key)(=|%3D)[^&\s'"<>]+""",
    re.IGNORECASE,
)
"""A parameter of a signed address, such as `X-Amz-Signature=…`."""
HEADER: Final = re.compile(
    r"""\b(bearer\s{1,9}|authorization['"]?\s{0,9}[:=]\s{0,9}['"]?(?:basic\s{1,9})?)[\w.~+/=-]{8,}""", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """Replace passwords and keys in a text by `***`.

    These are: users and passwords of addresses (with a scheme or without), queries of http addresses, parameters that
    sign a request, bearer tokens, and the values of this process's secret variables.
    """
    for secret in _secrets(tuple(os.environ.items())):
        text = text.replace(secret, HIDDEN)
    if "@" in text:
        text = USER_OF_HOST.sub(f"{HIDDEN}@", USER_OF_URL.sub(f"{HIDDEN}@", text))
    text = ENCODED_USER.sub(f"{HIDDEN}%40", text)
    text = PARAMETER.sub(rf"\1\2{HIDDEN}", QUERY.sub(rf"\1?{HIDDEN}", text))
    return HEADER.sub(rf"\1{HIDDEN}", text)


def shown(address: str) -> str:
    """An address without secrets, for messages. Its password may contain any character, unlike one within a text."""
    return without_secrets(_decoded(address) if holds_secrets(address) else address)


def _decoded(address: str) -> str:
    """Decode the part of an address that may hold a password. `%3A` marks a password only before the path: a path may
    be an encoded page name, such as `https%3A%2F%2Fexample.com%2Fa.jpg%3Fid%3D1`.
    """
    if "://" not in address:
        decoded = unquote(address)
        return BREAKS.sub("_", decoded if SCHEME.match(decoded) else address)
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    if USER.match(unquote(host)):
        host, path = unquote(host), unquote(path)
    return BREAKS.sub("_", f"{scheme}://{host}{slash}{path}")


def holds_secrets(uri: str) -> bool:
    """Whether an address holds a user, a password or a signature; never for a path that begins with `/`, `.` or `~`."""
    if uri.startswith(("/", ".", "~")):
        return False
    decoded = _decoded(uri)
    if "://" not in decoded:
        return USER_OF_HOST.match(uri) is not None
    return (
        USER_OF_URL.search(decoded) is not None
        or QUERY.match(uri) is not None
        or ("?" in uri and PARAMETER.search(uri.partition("?")[2]) is not None)
    )


def names_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, as far as its name tells."""
    return SECRET_WORD.search(name) is not None and PUBLIC_END.search(name) is None


def quotes_secret(text: str) -> bool:
    """Whether a text holds the value of a secret variable of this process."""
    return any(secret in text for secret in _secrets(tuple(os.environ.items())))


@lru_cache(maxsize=1)  # a million bad rows need the same list
def _secrets(environment: tuple[tuple[str, str], ...]) -> list[str]:
    """Secret values of the environment, longest first, because one may contain another."""
    secrets: set[str] = set()
    for name, value in environment:
        if names_secret(name):
            secrets.add(value.strip())
        elif "@" in value:
            secrets.update(_passwords(value))
    return sorted((value for value in secrets if len(value) >= MIN_SECRET_LENGTH), key=len, reverse=True)


def _passwords(value: str) -> Iterator[str]:
    """The password of an address such as a proxy's, as written and URL-decoded."""
    user, separator, _ = value.rpartition("@")
    password = user.rpartition("://")[2].partition(":")[2]
    if separator and password and not re.search(r"\s", password):
        yield password
        yield unquote(password)


class SecretsFilter(logging.Filter):
    """Removes secrets from a handler's log records: messages, arguments and tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = without_secrets("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        return True


def guard_logs(*names: str | None) -> None:
    """Remove secrets in all handlers of these loggers; None is the root logger."""
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(existing, SecretsFilter) for existing in handler.filters):
                handler.addFilter(SecretsFilter())


def traceback_text(error: BaseException) -> str:
    """An error's traceback without secrets."""
    return without_secrets("".join(traceback.format_exception(error))).rstrip("\n")
