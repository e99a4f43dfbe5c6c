"""Check that a Ray cluster answers before a run starts, because Ray's own client retries for many minutes."""

import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import Final

from jobs.storage.redaction import holds_secrets, shown
from nsnet.errors import StorageError, UsageError

PROBE_SECONDS: Final = 5.0
"""Timeout for name lookup plus connection, and again for the first answer."""

GREETING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a gRPC client sends first (RFC 9113, 3.4): the preface of HTTP/2 and an empty SETTINGS frame."""
FRAME_HEADER_BYTES: Final = 9
SETTINGS_FRAME: Final = 4


def check_address(address: str | None) -> None:
    """Raise `StorageError` unless the cluster of `--address` or `RAY_ADDRESS` answers, `UsageError` if the address is
    invalid. Does nothing if an embedded cluster would be started.
    """
    cluster_address = address or os.environ.get("RAY_ADDRESS")
    if not cluster_address or cluster_address == "local":
        return
    name = "--address" if address else "RAY_ADDRESS"
    named = f"{name} {shown(cluster_address)}"
    host, port = _host_and_port(cluster_address, named)
    problem = _within(2 * PROBE_SECONDS, lambda: _problem(host, port))
    if problem is not None:
        raise StorageError(
            f"the Ray cluster of {named} cannot be reached: {problem}. Check that it runs (`ray status`), or "
            f"omit {name} for an embedded cluster"
        )


def _host_and_port(address: str, named: str) -> tuple[str, int]:
    scheme, separator, rest = address.partition("://")
    if holds_secrets(address):
        raise UsageError(f"{named}: an address must not contain a user or password; set RAY_AUTH_TOKEN_PATH instead")
    if separator and scheme in ("http", "https"):
        raise UsageError(
            f"{named} is the address for Ray jobs (`ray job submit --address {address} -- nsnet …`); give the "
            "cluster's own address, such as host:6379"
        )
    if separator and scheme != "ray":
        raise UsageError(f"{named}: give host:port, ray://host:port, auto or local")
    place = rest if separator else _resolved_by_ray(address, named)
    host, colon, port = place.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise UsageError(f"{named} has no valid port: give host:port, such as host:6379")
    return host.strip("[]"), int(port)


def _resolved_by_ray(address: str, named: str) -> str:
    """Resolve an address as Ray does: `auto` is the cluster that `ray start` recorded, localhost this machine's IP."""
    import ray._private.services as services

    try:
        resolved = services.canonicalize_bootstrap_address(address)
    except ConnectionError as error:
        raise StorageError(f"{named}: no Ray cluster runs on this machine: start one, or omit the address") from error
    except ValueError:  # the caller reports an invalid address
        return address
    return str(resolved or address)


def _within(seconds: float, find: Callable[[], str | None]) -> str | None:
    """Run a function with a timeout, because a name lookup can take longer than any socket timeout."""
    results: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=lambda: results.put(find()), daemon=True).start()
    try:
        return results.get(timeout=seconds)
    except queue.Empty:
        return f"no answer within {seconds:g} s"


def _problem(host: str, port: int) -> str | None:
    """The reason why no gRPC server (a Ray cluster is one) answers here; None if one answers."""
    try:
        with socket.create_connection((host, port), timeout=PROBE_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return None  # a TLS server does not answer plain text
            connection.sendall(GREETING)
            answer = connection.recv(FRAME_HEADER_BYTES)
    except socket.gaierror as error:
        return f"the host name {host} is unknown ({error.strerror})"
    except UnicodeError as error:  # a part of the name is empty or too long
        return f"{host} is not a host name ({error})"
    except TimeoutError:
        return f"no answer from {host}:{port} within {PROBE_SECONDS:g} s"
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    if answer.startswith(b"HTTP/"):
        return f"{host}:{port} is a web server, such as Ray's dashboard; the cluster uses another port, such as 6379"
    is_grpc = len(answer) >= 4 and answer[3] == SETTINGS_FRAME
    return None if is_grpc else f"{host}:{port} is not a Ray cluster"
