"""Guarded children: what they may do, how long they may take, and how they end. Costs 5 s."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from jobs.isolation import frames, guard
from jobs.isolation.guard import Child, ChildTimeoutError, Clock, Zygote
from tests.support.services.poisoned import MARK

MEMORY = 2**30


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with closing(Zygote("tests.support.services.poisoned")) as zygote:
        yield zygote


@pytest.fixture
def child(zygote: Zygote) -> Iterator[Child]:
    child = zygote.fork({}, MEMORY)
    yield child
    child.end()


def ask(child: Child, what: str, seconds: float = 20.0, wall_seconds: float | None = None) -> dict[str, Any]:
    clock = Clock(child.pid, seconds, wall_seconds)
    image = MARK + what.encode()
    child.send(clock, {"size_bytes": len(image), "transform": "", "seed": 0}, image)
    return child.receive(clock)


# What a child may do.


@pytest.fixture
def escapes(zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What came of everything that a decoder has no business with."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-of-the-test")
    (tmp_path / "there").touch()
    with socket.create_server(("127.0.0.1", 0)) as server, closing(Zygote("tests.support.services.poisoned")) as zygote:
        child = zygote.fork({}, MEMORY)
        argument = json.dumps([os.getpid(), server.getsockname()[1], str(tmp_path)])
        found: dict[str, str] = json.loads(ask(child, f"escape {argument}")["error_message"])
        child.end()
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert os.listdir(tmp_path) == ["there"]
    return found


def test_child_computes_and_does_nothing_else(escapes: dict[str, str]) -> None:
    environment, threads = json.loads(escapes.pop("environment")), escapes.pop("start a thread")
    escapes.pop("status")
    assert {name for name, said in escapes.items() if said.startswith("done")} == set()
    assert environment == {} and threads == "done: it ran"


def test_environment_of_a_child_holds_no_secret(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-of-the-test")
    with closing(Zygote("tests.support.services.echo")) as fresh:
        child = fresh.fork({}, MEMORY)
        initial = Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
        names = {variable.partition(b"=")[0].decode() for variable in initial if variable}
        assert names <= guard.ENVIRONMENT.keys() | {*guard.INHERITED}
        status = Path(f"/proc/{child.pid}/status").read_text()
        assert "NoNewPrivs:\t1\n" in status and "Seccomp:\t2\n" in status
        assert sorted(os.listdir(f"/proc/{child.pid}/fd")) == ["0", "1", "2"]
        assert os.readlink(f"/proc/{child.pid}/cwd") == "/"
        child.end()


def test_child_that_cannot_be_confined_says_so_once(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')")
    monkeypatch.setattr(guard, "_import_path", lambda: [str(tmp_path), *sys.path])
    with closing(Zygote("tests.support.services.echo")) as zygote:
        for _ in range(2):
            zygote.fork({}, MEMORY).end()
    assert logged == ["guarded processes are not confined on this machine (RuntimeError: Unable to find libseccomp)"]


def test_memory_of_a_child_is_bounded(zygote: Zygote) -> None:
    child = zygote.fork({}, 200_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EOFError):
        ask(child, "memory")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    child.end()


def test_messages_longer_than_a_pipe_arrive_whole() -> None:
    """In several parts, which end anywhere; empty payloads are none."""
    parts = [os.urandom(size) for size in (3 * guard.PIPE_BYTES + 7, 0, 1, guard.PIPE_BYTES // 2)]
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as incoming, os.fdopen(writing, "wb") as outgoing:
        sender = threading.Thread(target=frames.send, args=(outgoing, {"n": 1}, *parts))
        sender.start()
        assert frames.receive(incoming) == {"n": 1}
        assert incoming.read(sum(map(len, parts))) == b"".join(parts)
        sender.join()
    with closing(Zygote("tests.support.services.echo")) as zygote:
        child = zygote.fork({}, MEMORY)
        clock, answer = Clock(child.pid, 20.0), frames.frame({"n": 2}) + b"".join(parts)
        requester = threading.Thread(target=child.send, args=(clock, {"size_bytes": len(answer)}, answer))
        requester.start()
        assert child.receive(clock) == {"n": 2}
        buffers = [bytearray(len(part)) for part in parts]
        child.read_into(buffers, clock)
        assert buffers == parts
        requester.join()
        child.end()


# How long it may take.


def test_computing_counts(child: Child) -> None:
    started = time.monotonic()
    with pytest.raises(ChildTimeoutError, match=r"^0\.3 s of CPU time$"):
        ask(child, "compute", 0.3)
    assert time.monotonic() - started > 0.25


def test_computing_counts_while_an_answer_trickles(child: Child) -> None:
    with pytest.raises(ChildTimeoutError, match=r"^0\.3 s of CPU time$"):
        ask(child, "trickle", 0.3)


def test_doing_nothing_counts(child: Child) -> None:
    with pytest.raises(ChildTimeoutError, match=r"^0\.3 s without activity$"):
        ask(child, "sleep", 0.3)


def test_waiting_for_a_processor_does_not_count(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine: the child is ready to run and gets no processor."""
    monkeypatch.setattr(guard, "_computed", lambda pid: 0.0)
    monkeypatch.setattr(guard, "_is_asleep", lambda pid: False)
    with pytest.raises(ChildTimeoutError, match=r"^0\.5 s, of which it had a CPU for 0\.0 s$"):
        ask(child, "sleep", 0.1, wall_seconds=0.5)  # five times its limit, until the far end by the wall clock


def test_far_end_by_the_wall_clock_grows_with_the_limit() -> None:
    assert Clock(os.getpid(), 30.0).wall_seconds == guard.WALL_FACTOR * 30.0 >= 600.0


def test_answer_that_is_there_is_taken_however_late(child: Child) -> None:
    """The parent, too, may get no processor for long: the child then sleeps, since it has answered."""
    clock = Clock(child.pid, 0.2, 0.3)
    image = MARK + b"answer"
    child.send(clock, {"size_bytes": len(image), "transform": "", "seed": 0}, image)
    time.sleep(0.5)
    assert child.receive(clock)["error_class"] == "ImageCorruptError"


# How it ends.


def test_zygote_that_was_killed_is_replaced(zygote: Zygote) -> None:
    first = zygote.fork({}, MEMORY)
    assert zygote._process is not None
    zygote._process.kill()
    zygote._process.wait()
    assert first.end() == -signal.SIGKILL
    child = zygote.fork({}, MEMORY)
    with pytest.raises(ChildTimeoutError):
        ask(child, "sleep", 0.1)
    assert child.end() == -signal.SIGKILL


def test_exit_codes_tell_how_a_child_ended(zygote: Zygote) -> None:
    child = zygote.fork({}, MEMORY)
    with pytest.raises(EOFError):
        ask(child, "segfault")
    code = child.end()
    assert code == -signal.SIGSEGV and guard.exit_reason(code) == "SIGSEGV"
    assert guard.exit_reason(3) == "exit code 3"


def test_children_of_many_threads_do_not_mix(zygote: Zygote) -> None:
    found: list[str] = []

    def one() -> None:
        child = zygote.fork({}, MEMORY)
        try:
            ask(child, "sleep", 0.1)
        except ChildTimeoutError as error:
            found.append(str(error))
        child.end()

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["0.1 s without activity"] * 8


def test_everything_ends_with_a_killed_parent() -> None:
    code = (
        "import os, time\n"
        "from jobs.isolation.guard import Zygote\n"
        "zygote = Zygote('tests.support.services.poisoned')\n"
        "child = zygote.fork({}, 2**30)\n"
        "print(zygote._process.pid, child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_zygote_has_one_thread(zygote: Zygote) -> None:
    """A fork copies no other: what one of them held would be held for ever."""
    with closing(Zygote("jobs.pipeline.decoding")) as decoders:
        for one in (zygote, decoders):
            one._running()
            assert one._process is not None
            assert len(os.listdir(f"/proc/{one._process.pid}/task")) == 1
