"""A proxy in front of an S3 server that does what networks and busy stores do to one request in a few.

    with FaultyProxy(server.endpoint_url, RandomPolicy(rate=0.05, seed=1)) as proxy:
        os.environ.update(proxy.environment())

The client signs the Host header, which is forwarded unchanged: it must be pointed at the proxy from the start.
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Final, Literal, Self

import pytest
import s3fs
from botocore.retries.standard import ExponentialBackoff

from jobs.storage import errors
from tests.support.swift import SwiftServer

HOST: Final = "127.0.0.1"
UPSTREAM_SECONDS: Final = 120.0

TRICKLES: Final = 20

REFUSAL: Final = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    "<Error><Code>{code}</Code><Message>So the proxy says.</Message><RequestId>0</RequestId></Error>"
)

Kind = Literal["pass", "slow_down", "refuse", "reset", "lose_answer", "cut", "stall", "trickle"]
KINDS: Final[tuple[Kind, ...]] = ("slow_down", "reset", "cut", "stall")


@dataclass(frozen=True)
class Action:
    """What happens to one request.

    - pass: nothing.
    - slow_down: it is answered with 503 SlowDown, and the server never sees it.
    - refuse: it is answered with `status` and `code`, and the server never sees it.
    - reset: the connection is reset, and the server never sees it.
    - lose_answer: the server carries it out, then the connection is reset.
    - cut: the server carries it out, and the connection ends after `at` of the answer's body; an answer without a body
      (or of fewer bytes) is cut in its head.
    - stall: the server carries it out, and the answer rests for `seconds`, before its head or (where `at` is given)
      within its body.
    - trickle: the server carries it out, and the answer's body comes in small pieces over `seconds`.
    """

    kind: Kind = "pass"
    at: int | float | None = None
    """Bytes of the body; a float is a share of it."""
    seconds: float = 0.0
    status: int = 403
    code: str = "AccessDenied"


PASS: Final = Action()


@dataclass(frozen=True)
class Request:
    """What a policy sees of a request."""

    method: str
    target: str
    """Path and query as they were sent."""
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    """Names in lower case."""
    body: bytes = field(repr=False)
    """As it was sent, chunks and all."""
    raw_headers: bytes = field(repr=False)

    @property
    def path(self) -> str:
        """`/bucket/key`, decoded."""
        return urllib.parse.unquote(self.target.partition("?")[0])

    @property
    def operation(self) -> str:
        """GET, HEAD, PUT, POST, DELETE, or LIST for what is asked of a bucket, not of an object."""
        return "LIST" if self.method == "GET" and self.path.rstrip("/").count("/") < 2 else self.method

    @property
    def conditional(self) -> bool:
        """Whether it writes only where there is nothing."""
        return self.method == "PUT" and ("if-none-match", "*") in self.headers

    def header(self, name: str) -> str | None:
        """The value of a header, named in lower case."""
        return next((value for key, value in self.headers if key == name), None)


Policy = Callable[[Request], Action]


def let_pass(request: Request) -> Action:
    """The policy of a faultless network."""
    return PASS


class Script:
    """A policy that goes through a list of actions, one for each request that `wanted` chooses; then it lets all pass.

    `wanted`: a predicate, or a part of `OPERATION /bucket/key`, such as `GET ` or `/a.jpg`.
    """

    def __init__(self, *actions: Action, wanted: Callable[[Request], bool] | str = "") -> None:
        self._left = list(actions)
        self._wanted = wanted
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Action:
        with self._lock:
            return self._left.pop(0) if self._left and _is_wanted(request, self._wanted) else PASS


class Always:
    """A policy that does the same to each request that `wanted` chooses, as in `Script`."""

    def __init__(self, action: Action, wanted: Callable[[Request], bool] | str = "") -> None:
        self._action, self._wanted = action, wanted

    def __call__(self, request: Request) -> Action:
        return self._action if _is_wanted(request, self._wanted) else PASS


def _is_wanted(request: Request, wanted: Callable[[Request], bool] | str) -> bool:
    return wanted in f"{request.operation} {request.path}" if isinstance(wanted, str) else wanted(request)


class RandomPolicy:
    """A policy that harms a share of all requests, by a seed.

    The choice depends on the request and on how often it came before, not on the order in which threads come.
    """

    def __init__(
        self, rate: float, seed: int = 0, stall_seconds: float = 10.0, kinds: tuple[Kind, ...] = KINDS
    ) -> None:
        self.rate, self.seed, self.stall_seconds, self.kinds = rate, seed, stall_seconds, kinds
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Action:
        name = f"{request.method} {request.target} {request.header('range')}"
        with self._lock:
            self._seen[name] += 1
            chance = random.Random(f"{self.seed} {self._seen[name]} {name}")
        if chance.random() >= self.rate:
            return PASS
        kind = chance.choice(self.kinds)
        if kind == "stall":
            return Action("stall", chance.choice([None, chance.random()]), self.stall_seconds)
        return Action(kind, chance.random())


class FaultyProxy:
    """An HTTP/1.1 proxy to one server, on a port of its own from `start` to `stop`; a context manager.

    It may be stopped and started again: meanwhile connections to its port are refused. `policy` may be replaced at any
    time. `lock_conditional_puts`: writes with If-None-Match on one key are let through one after the other, which
    makes them atomic on a server that only compares and then writes.
    """

    def __init__(self, upstream_url: str, policy: Policy = let_pass, *, lock_conditional_puts: bool = False) -> None:
        parts = urllib.parse.urlsplit(upstream_url)
        assert parts.scheme == "http" and parts.hostname and parts.port, upstream_url
        self._upstream = (parts.hostname, parts.port)
        self.policy = policy
        self.counts: Counter[str] = Counter()
        """Kind of action -> requests."""
        self.log: list[tuple[str, str, Kind]] = []
        """Operation, path and kind of action of each request, in the order of their coming."""
        self._lock = threading.Lock()
        self._key_locks: defaultdict[str, threading.Lock] | None = (
            defaultdict(threading.Lock) if lock_conditional_puts else None
        )
        # Bound, never listening: the port stays ours while the proxy is stopped.
        self._reserved = self._bind()
        self._listener: socket.socket | None = None
        self._stopped = threading.Event()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._acceptor: threading.Thread | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://{HOST}:{self._reserved.getsockname()[1]}"

    def environment(self) -> dict[str, str]:
        """The variable that points S3 clients at the proxy; the others are the server's."""
        return {"AWS_ENDPOINT_URL": self.endpoint_url}

    def requests(self, wanted: str = "") -> int:
        """How many requests came whose `OPERATION /bucket/key` contains this."""
        with self._lock:
            return sum(wanted in f"{operation} {path}" for operation, path, _ in self.log)

    def forget(self) -> None:
        """Let all pass, and count anew."""
        self.policy = let_pass
        with self._lock:
            self.counts.clear()
            self.log.clear()

    def start(self) -> None:
        """Listen."""
        assert self._listener is None
        self._stopped.clear()
        self._listener = self._bind()
        self._listener.listen(512)
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), name="proxy", daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Refuse connections and end those that are open; harmless when stopped."""
        if self._listener is None or self._acceptor is None:
            return
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._acceptor.join()
        self._listener.close()
        self._listener = self._acceptor = None
        with self._lock:
            open_now = dict(self._open)
        for client in open_now:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in open_now.values():
            thread.join()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuse connections for a while."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def close(self) -> None:
        """Stop, and give the port back."""
        self.stop()
        self._reserved.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self) -> socket.socket:
        port = self._reserved.getsockname()[1] if hasattr(self, "_reserved") else 0
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((HOST, port))
        return bound

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = listener.accept()
            except OSError:  # stopped
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="proxy connection", daemon=True)
            with self._lock:
                self._open[client] = thread
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with client.makefile("rb") as incoming:
                while (request := _read_request(incoming, client)) is not None and self._carry_out(client, request):
                    pass
        except OSError:  # the client went away, or the proxy stops
            pass
        finally:
            with self._lock:
                del self._open[client]
            client.close()

    def _carry_out(self, client: socket.socket, request: Request) -> bool:
        """One request; whether the connection may be used again."""
        action = self.policy(request)
        with self._lock:
            self.counts[action.kind] += 1
            self.log.append((request.operation, request.path, action.kind))
        if action.kind == "reset":
            return _reset(client)
        if action.kind in ("slow_down", "refuse"):
            status, code = (503, "SlowDown") if action.kind == "slow_down" else (action.status, action.code)
            body = REFUSAL.format(code=code).encode()
            answer = _Answer(status, "Refused", [("Content-Type", "application/xml")], body)
        else:
            with self._key_lock(request):
                answer = self._ask(request)
        if action.kind == "lose_answer":
            return _reset(client)
        head, body = answer.head(request.method), b"" if request.method == "HEAD" else answer.body
        at = _bytes(action.at, len(body))
        if action.kind == "cut":
            client.sendall(head + body[:at] if at < len(body) else head[: len(head) // 2])
            return False
        if action.kind == "trickle":
            client.sendall(head)
            size = max(1, -(-len(body) // TRICKLES))
            for start in range(0, len(body), size):
                if self._stopped.wait(action.seconds / TRICKLES):
                    return False
                client.sendall(body[start : start + size])
        elif action.kind == "stall":
            first, then = (b"", head + body) if action.at is None else (head + body[:at], body[at:])
            client.sendall(first)
            if self._stopped.wait(action.seconds):
                return False
            client.sendall(then)
        else:
            client.sendall(head + body)
        return (request.header("connection") or "").lower() != "close"

    def _key_lock(self, request: Request) -> contextlib.AbstractContextManager[object]:
        if self._key_locks is None or not request.conditional:
            return contextlib.nullcontext()
        with self._lock:
            return self._key_locks[request.path]

    def _ask(self, request: Request) -> "_Answer":
        """The server's own answer."""
        head = f"{request.method} {request.target} HTTP/1.1\r\n".encode("latin-1") + request.raw_headers
        with socket.create_connection(self._upstream, timeout=UPSTREAM_SECONDS) as server:
            server.sendall(head + b"Connection: close\r\n\r\n" + request.body)
            answer = http.client.HTTPResponse(server, method=request.method)
            try:
                answer.begin()
                return _Answer(answer.status, answer.reason, answer.getheaders(), answer.read())
            except http.client.HTTPException as error:
                raise ConnectionError(f"the server's answer is no HTTP: {error!r}") from error
            finally:
                answer.close()


@contextmanager
def in_front_of(server: SwiftServer) -> Iterator[FaultyProxy]:
    """A proxy that the S3 clients of this process talk to, and clients that do not wait before they ask again."""
    with (
        pytest.MonkeyPatch.context() as patch,
        FaultyProxy(server.endpoint_url, lock_conditional_puts=True) as proxy,
    ):
        for name, value in (server.environment() | proxy.environment()).items():
            patch.setenv(name, value)
        patch.setattr(errors, "FIRST_WAIT_SECONDS", 0.001)
        patch.setattr(ExponentialBackoff, "delay_amount", lambda self, context: 0.001)
        # fsspec keeps its clients by their arguments; they hold the endpoint and the keys of their first moment
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


@dataclass(frozen=True)
class _Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def head(self, method: str) -> bytes:
        drop = {"connection", "keep-alive", "transfer-encoding"}
        if method != "HEAD":
            drop |= {"content-length"}
        lines = [f"HTTP/1.1 {self.status} {self.reason}"]
        lines += [f"{name}: {value}" for name, value in self.headers if name.lower() not in drop]
        if method != "HEAD" and self.status not in (204, 304):
            lines.append(f"Content-Length: {len(self.body)}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _bytes(at: int | float | None, length: int) -> int:
    return int(at * length) if isinstance(at, float) else at or 0


def _reset(client: socket.socket) -> bool:
    """Close with RST instead of FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def _read_request(incoming: BinaryIO, client: socket.socket) -> Request | None:
    """The next request of a connection, whole; None at its end, which may be in the middle of a request."""
    first = incoming.readline().decode("latin-1").split()
    if len(first) != 3:
        return None
    headers: list[tuple[str, str]] = []
    forwarded = b""
    while (line := incoming.readline()) != b"\r\n":
        if not line.endswith(b"\r\n"):
            return None
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name.lower(), value.strip()))
        if headers[-1][0] not in ("connection", "expect"):
            forwarded += line
    values = dict(headers)
    if values.get("expect", "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if values.get("transfer-encoding", "").lower() == "chunked":
        body = _read_chunks(incoming)
    else:
        length = int(values.get("content-length", 0))
        body = incoming.read(length)
        body = body if len(body) == length else None
    return None if body is None else Request(first[0], first[1], tuple(headers), body, forwarded)


def _read_chunks(incoming: BinaryIO) -> bytes | None:
    """A chunked body as it comes, trailers included; None if it is cut off."""
    body = b""
    size = -1
    while size:
        line = incoming.readline()
        if not line.endswith(b"\r\n"):
            return None
        size = int(line.partition(b";")[0], 16)
        body += line + (incoming.read(size + 2) if size else b"")
    while (line := incoming.readline()) != b"\r\n":
        if not line.endswith(b"\r\n"):
            return None
        body += line
    return body + line
