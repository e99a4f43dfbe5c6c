"""Whether a Ray cluster answers, before anything is locked or waited for: Ray's own client tries for many minutes."""

import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import Final

from jobs.storage.redaction import holds_secrets, shown
from nsnet.errors import StorageError, UsageError

PROBE_SECONDS: Final = 5.0
"""Longest wait for each of: the address of a name and a connection together, and the first answer."""

GREETING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a gRPC client sends first (RFC 9113, 3.4): the preface of HTTP/2 and an empty SETTINGS frame."""
FRAME_HEADER_BYTES: Final = 9
SETTINGS_FRAME: Final = 4


def check_address(address: str | None) -> None:
    """Raise `StorageError` unless the cluster of `--address`, or of `RAY_ADDRESS`, answers; `UsageError` where it is no
    address of one. Nothing is asked where an embedded cluster would be started.
    """
    given = address or os.environ.get("RAY_ADDRESS")
    if not given or given == "local":
        return
    name = "--address" if address else "RAY_ADDRESS"
    named = f"{name} {shown(given)}"
    host, port = _host_and_port(given, named)
    problem = _within(2 * PROBE_SECONDS, lambda: _problem(host, port))
    if problem is not None:
        raise StorageError(
            f"the Ray cluster of {named} cannot be reached: {problem}. See whether it runs (`ray status`), or "
            f"leave {name} out for an embedded one"
        )


def _host_and_port(address: str, named: str) -> tuple[str, int]:
    scheme, separator, rest = address.partition("://")
    if holds_secrets(address):
        raise UsageError(f"{named}: a cluster's address holds no user or password; its token is in RAY_AUTH_TOKEN_PATH")
    if separator and scheme in ("http", "https"):
        raise UsageError(
            f"{named} is where Ray takes jobs (`ray job submit --address {address} -- nsnet …`); here it must be the "
            "cluster itself, such as host:6379"
        )
    if separator and scheme != "ray":
        raise UsageError(f"{named}: give host:port, ray://host:port, auto or local")
    place = rest if separator else _as_ray_reads_it(address, named)
    host, colon, port = place.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise UsageError(f"{named} names no port: give host:port, such as host:6379")
    return host.strip("[]"), int(port)


def _as_ray_reads_it(address: str, named: str) -> str:
    """`auto` is what `ray start` wrote down, and localhost this machine's own address."""
    import ray._private.services as services

    try:
        found = services.canonicalize_bootstrap_address(address)
    except ConnectionError as error:
        raise StorageError(f"{named}: no Ray cluster runs on this machine: start one, or leave it out") from error
    except ValueError:  # what it is not is said by the caller
        return address
    return str(found or address)


def _within(seconds: float, find: Callable[[], str | None]) -> str | None:
    """What a function finds, if it comes in time: looking up a name can take longer than any timeout of a socket."""
    found: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=lambda: found.put(find()), daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return f"no answer within {seconds:g} s"


def _problem(host: str, port: int) -> str | None:
    """Why this is no gRPC server, which a cluster is; None: it is one."""
    try:
        with socket.create_connection((host, port), timeout=PROBE_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return None  # it would not answer in clear text
            connection.sendall(GREETING)
            answer = connection.recv(FRAME_HEADER_BYTES)
    except socket.gaierror as error:
        return f"the name {host} is not known ({error.strerror})"
    except UnicodeError as error:  # a part of the name is empty or too long
        return f"{host} is no host name ({error})"
    except TimeoutError:
        return f"no answer from {host}:{port} within {PROBE_SECONDS:g} s"
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    if answer.startswith(b"HTTP/"):
        return f"{host}:{port} is a web server, such as Ray's dashboard; the cluster has another port, such as 6379"
    is_grpc = len(answer) >= 4 and answer[3] == SETTINGS_FRAME
    return None if is_grpc else f"{host}:{port} is no Ray cluster"
