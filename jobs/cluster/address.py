"""Check that a Ray cluster, or its dashboard, answers before a run starts: Ray's own clients retry for many minutes."""

import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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
            f"{named} is the address for Ray jobs (`nsnet submit … --address {address}`); give the "
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


class _NoAnswer(Exception):
    """Why nothing answers."""


def _answer(host: str, port: int, greeting: bytes | None) -> bytes:
    """The first bytes that a server sends after a greeting; without one, only the connection is tried. Raises
    `_NoAnswer`.
    """
    try:
        with socket.create_connection((host, port), timeout=PROBE_SECONDS) as connection:
            if greeting is None:
                return b""
            connection.sendall(greeting)
            return connection.recv(FRAME_HEADER_BYTES)
    except socket.gaierror as error:
        raise _NoAnswer(f"the host name {host} is unknown ({error.strerror})") from error
    except UnicodeError as error:  # a part of the name is empty or too long
        raise _NoAnswer(f"{host} is not a host name ({error})") from error
    except TimeoutError as error:
        raise _NoAnswer(f"no answer from {host}:{port} within {PROBE_SECONDS:g} s") from error
    except OSError as error:
        raise _NoAnswer(f"{host}:{port}: {error.strerror or error}") from error


def _is_grpc(answer: bytes) -> bool:
    return len(answer) >= 4 and answer[3] == SETTINGS_FRAME


def _problem(host: str, port: int) -> str | None:
    """The reason why no gRPC server (a Ray cluster is one) answers here; None if one answers."""
    has_tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")  # it does not answer plain text
    try:
        answer = _answer(host, port, None if has_tls else GREETING)
    except _NoAnswer as reason:
        return str(reason)
    if has_tls or _is_grpc(answer):
        return None
    if answer.startswith(b"HTTP/"):
        return f"{host}:{port} is a web server, such as Ray's dashboard; the cluster uses another port, such as 6379"
    return f"{host}:{port} is not a Ray cluster"


def check_dashboard(address: str, named: str) -> None:
    """Raise `StorageError` unless a web server answers at an address `http[s]://host[:port]`, `UsageError` if it is no
    such address. `named`: what messages call it. Behind a proxy nothing is tried.
    """
    if holds_secrets(address):
        raise UsageError(f"{named}: an address must not contain a user or password; set RAY_AUTH_TOKEN_PATH instead")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host, port = None, 0
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UsageError(f"{named} is no address of a dashboard: give http://HOST:8265, the head's")
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return
    greeting = f"GET /api/version HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() if parts.scheme == "http" else None
    problem = _within(2 * PROBE_SECONDS, lambda: _dashboard_problem(host, port, greeting))
    if problem is not None:
        raise StorageError(f"no dashboard answers at {named}: {problem}. Check the address, and that the cluster runs")


def _dashboard_problem(host: str, port: int, greeting: bytes | None) -> str | None:
    try:
        answer = _answer(host, port, greeting)
    except _NoAnswer as reason:
        return str(reason)
    if greeting is None or answer.startswith(b"HTTP/"):
        return None
    if _is_grpc(answer):
        return f"{host}:{port} is the cluster itself; jobs are submitted to its dashboard, such as http://{host}:8265"
    return f"{host}:{port} is no web server"
