"""What a person, a log or a record may see of a text that came from an argument, the environment or an error.

Every place where text leaves the program calls `without_secrets`: the console, rows, records, logs and tracebacks.
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
REFUSED: Final = "holds a user, a password or a signature, which no address may"
"""What is wrong with an address that `holds_secrets`."""
MIN_SECRET_LENGTH: Final = 8
"""Fewest letters of a secret variable's value: to hide every `test` or `token` would spoil messages."""

SECRET_NAME: Final = re.compile(
    r"(SECRET|SECRET_KEY|SECRET_ACCESS_KEY|ACCESS_KEY_ID|TOKEN|PASSWORD|PASSWD|API_KEY|PRIVATE_KEY)$", re.IGNORECASE
)
"""Environment variables whose value is a secret; names such as `…_TOKEN_PATH` hold none."""

USER_OF_URL: Final = re.compile(
    r"""(?<=://)(?:[^/\s'"<>@:]{0,200}:(?!\d{1,5}(?:[/?#\s]|$))[^\s'"<>]{0,999}@|[^/\s'"<>]{0,999}@)"""
)
"""`user:password@` after a scheme. A password may hold `/` and `@`, as S3's do; a port is no password. All repetitions
are bounded: an error may quote what a stranger wrote."""
USER_OF_HOST: Final = re.compile(
    r"""(?<![\w.-])[^\s/:@'"<>=,()\[\]]{1,200}:(?!//|\d+[/:])[^\s'"<>]{1,999}@(?=[\w\[*])"""
)
"""`user:password@` without a scheme."""
ENCODED_USER: Final = re.compile(r"(?<=%3A%2F%2F)[^\s/&'\"<>]{1,999}%40", re.IGNORECASE)
"""`user:password@` of an address that is a parameter of another one."""
BREAKS: Final = re.compile(r"""[\s'"<>]""")
"""Where an address ends that stands in a text."""
SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://")
USER: Final = re.compile(r"[^/]*:(?!\d{1,5}$)")
"""How the part before the first `/` of an address begins that names a user, and not only host and port."""
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
    """A text with `***` in the place of passwords and keys.

    That is: users and passwords of addresses (with a scheme or without), queries of http addresses, parameters that
    sign a request, bearer tokens, and the values of secret variables of this process, wherever they stand.
    """
    for secret in _secrets(tuple(os.environ.items())):
        text = text.replace(secret, HIDDEN)
    if "@" in text:
        text = USER_OF_HOST.sub(f"{HIDDEN}@", USER_OF_URL.sub(f"{HIDDEN}@", text))
    text = ENCODED_USER.sub(f"{HIDDEN}%40", text)
    text = PARAMETER.sub(rf"\1\2{HIDDEN}", QUERY.sub(rf"\1?{HIDDEN}", text))
    return HEADER.sub(rf"\1{HIDDEN}", text)


def shown(address: str) -> str:
    """An address for people. Alone, unlike in a text, its password may hold anything."""
    return without_secrets(_whole(address) if holds_secrets(address) else address)


def _whole(address: str) -> str:
    """An address as its password is meant. Only before its path is `%3A` the sign of one: paths may be names of pages,
    such as `https%3A%2F%2Fexample.com%2Fa.jpg%3Fid%3D1`.
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
    """Whether an address holds a user, a password or a signature. A path that begins with `/`, `.` or `~` does not."""
    if uri.startswith(("/", ".", "~")):
        return False
    whole = _whole(uri)
    if "://" not in whole:
        return USER_OF_HOST.match(uri) is not None
    return (
        USER_OF_URL.search(whole) is not None
        or QUERY.match(uri) is not None
        or ("?" in uri and PARAMETER.search(uri.partition("?")[2]) is not None)
    )


@lru_cache(maxsize=1)  # a million bad rows ask for the same
def _secrets(environment: tuple[tuple[str, str], ...]) -> list[str]:
    """Secret values of the environment, the longest first: one may hold another."""
    found: set[str] = set()
    for name, value in environment:
        if SECRET_NAME.search(name):
            found.add(value.strip())
        elif "@" in value:
            found.update(_passwords(value))
    return sorted((value for value in found if len(value) >= MIN_SECRET_LENGTH), key=len, reverse=True)


def _passwords(value: str) -> Iterator[str]:
    """The password of an address such as a proxy's, as it is written and as it is meant."""
    user, separator, _ = value.rpartition("@")
    password = user.rpartition("://")[2].partition(":")[2]
    if separator and password and not re.search(r"\s", password):
        yield password
        yield unquote(password)


class SecretsFilter(logging.Filter):
    """Takes secrets out of what a handler logs: messages, arguments and tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = without_secrets("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        return True


def guard_logs(*names: str | None) -> None:
    """Let no secret through the handlers of these loggers; None is the root."""
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(known, SecretsFilter) for known in handler.filters):
                handler.addFilter(SecretsFilter())


def traceback_text(error: BaseException) -> str:
    """An error's traceback without secrets."""
    return without_secrets("".join(traceback.format_exception(error))).rstrip("\n")
