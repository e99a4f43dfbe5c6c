"""Pass variables to a job so that only a holder of the cluster's token can read their values.

Ray shows the variables of a job to everybody: in its metadata, in the logs of each node, in the command line and in the
first environment of each worker. So they travel encrypted, in one variable, with a key that is derived from the token:
submitter and all nodes hold it. Driver and workers set the values within their own process, where neither
`/proc/PID/environ` nor Ray sees them.
"""

import base64
import json
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from jobs.storage.redaction import holds_secrets, names_secret
from nsnet.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SEALED: Final = "NSNET_SEALED"
"""The variable that holds the others."""
HOOK: Final = "jobs.submission.sealing.unseal_environment"
"""What each worker of the job calls first."""
MAX_SEALED_BYTES: Final = 96 * 2**10
"""Largest sealed text. Ray puts variables into an argument of each worker, which the kernel limits to 128 KiB."""
SALT_BYTES: Final = 16
NONCE_BYTES: Final = 12
NODES_OWN: Final = re.compile(r"RAY_|PYTHON|LD_|NSNET_SEALED$")
"""Variables that are read when a process starts, and belong to the nodes."""
VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def chosen(names: Iterable[str]) -> dict[str, str]:
    """The named variables of this process with their values. Raises `UsageError` for one that is unset or the nodes'
    own, and for a value instead of a name.
    """
    values = {}
    for name in names:
        if VARIABLE.fullmatch(name) is None:
            raise UsageError("--env takes the name of a variable, not its value: export it, then give --env NAME")
        if NODES_OWN.match(name):
            raise UsageError(f"--env {name}: processes read it when they start: set it in the nodes' environment")
        if name not in os.environ:
            raise UsageError(f"--env {name}: this variable is not set: export it, or omit the option")
        values[name] = os.environ[name]
    return values


def check_plain(values: dict[str, str]) -> None:
    """Raise `UsageError` if a value is a secret: without a token everybody could read it."""
    for name, value in values.items():
        if names_secret(name) or holds_secrets(value):
            raise UsageError(
                f"--env {name} looks like a secret, and this cluster has no token to seal it with: start the cluster "
                "with RAY_AUTH_MODE=token, or give its nodes a role or the variable itself"
            )


def seal(values: dict[str, str], token: str) -> str:
    """Encrypt variables as one line of text; no two are equal. Raises `UsageError` if it has too many bytes."""
    salt, nonce = os.urandom(SALT_BYTES), os.urandom(NONCE_BYTES)
    sealed = _cipher(token, salt).encrypt(nonce, json.dumps(values).encode(), SEALED.encode())
    text = base64.b64encode(salt + nonce + sealed).decode()
    if len(text) > MAX_SEALED_BYTES:
        raise UsageError(
            f"the variables of --env have {len(text)} bytes when sealed, at most {MAX_SEALED_BYTES} can be passed: "
            "give the nodes a file, and pass its path"
        )
    return text


def unseal(text: str, token: str) -> dict[str, str]:
    """The variables of `seal`; raises `UsageError` for another token, or if the text was changed."""
    from cryptography.exceptions import InvalidTag

    try:
        data = base64.b64decode(text, validate=True)
        salt, nonce, sealed = data[:SALT_BYTES], data[SALT_BYTES:][:NONCE_BYTES], data[SALT_BYTES + NONCE_BYTES :]
        values: dict[str, str] = json.loads(_cipher(token, salt).decrypt(nonce, sealed, SEALED.encode()))
    except (InvalidTag, ValueError) as error:  # ValueError: not what `seal` wrote
        raise UsageError(
            "the variables of --env cannot be opened here: this node's token is not the one of the submitter. Submit "
            "with the token of the cluster's nodes"
        ) from error
    return values


def _cipher(token: str, salt: bytes) -> "AESGCM":
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return AESGCM(HKDF(SHA256(), length=32, salt=salt, info=b"nsnet submit").derive(token.encode()))


def unseal_environment() -> None:
    """Set the sealed variables within this process, if there are any. The driver and each worker call it first."""
    text = os.environ.get(SEALED)
    if text:
        os.environ.update(unseal(text, cluster_token() or ""))


def cluster_token() -> str | None:
    """The token by which this process talks to its cluster; None if it uses none or has none."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    headers: dict[str, str] = get_auth_headers_if_auth_enabled({})
    return next(iter(headers.values())).partition(" ")[2] if headers else None
