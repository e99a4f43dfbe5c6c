"""The lock of an output: one holder at a time, and nobody waits for the dead longer than needed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs.runs import lock
from jobs.runs.lock import EXPIRY_SECONDS, Lock, hold
from jobs.storage import listing, reading, writing
from nsnet.errors import LockedError, StorageError
from tests.support.swift import SwiftServer
from tests.support.tables import new_bucket

PATIENCE_SECONDS = 60.0
"""Longest wait for something that takes a moment, on a machine under load."""

GONE = 2**22 + 1
"""A pid above the highest that Linux gives."""

HOLDER = """\
import sys, time
from jobs.runs import lock
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody competes in these buckets."""
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)


@pytest.fixture
def out(place: str) -> str:
    return place


@pytest.fixture
def on_disk(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def numbers(out: str) -> list[str]:
    """Names of the lock files."""
    return sorted(entry.uri.rpartition("/")[2] for entry in listing.list_files(f"{out}/locks"))


def content(out: str, number: int) -> Any:
    return json.loads(reading.read_bytes(f"{out}/locks/{number:08d}.json"))


def leave(out: str, holder: dict[str, Any] | bytes, number: int = 1) -> None:
    """A lock that somebody left."""
    data = holder if isinstance(holder, bytes) else json.dumps(holder).encode()
    writing.write_bytes(f"{out}/locks/{number:08d}.json", data)


def age(out: str, number: int = 1, seconds: float = EXPIRY_SECONDS + 5) -> None:
    """Let a lock on disk look as if it had been written some time ago."""
    then = time.time() - seconds
    os.utime(f"{out}/locks/{number:08d}.json", (then, then))


def this_process(**changes: Any) -> dict[str, Any]:
    """A holder that is this very process."""
    return {"token": "t", "host": "h", **lock._process(os.getpid()), **changes}


OTHER_MACHINE: dict[str, Any] = this_process(boot="00000000-0000-0000-0000-000000000000", host="elsewhere", pid=4711)


def assert_free(out: str) -> None:
    with hold(out):
        pass


def assert_held(out: str) -> None:
    with pytest.raises(LockedError, match="another run writes to"), hold(out):
        pytest.fail("two runs hold the lock")


def until(reached: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < end, f"{what} did not happen within {PATIENCE_SECONDS:g} s"
        time.sleep(0.02)


@contextmanager
def taken(out: str) -> Iterator[Lock]:
    """A lock that is held, to be lost in the body."""
    held = Lock(out)
    held.acquire()
    try:
        yield held
    finally:
        held.release()


# One holder at a time.


def test_second_run_is_refused_and_learns_who_writes(out: str) -> None:
    with hold(out) as held:
        with pytest.raises(LockedError) as caught:
            Lock(out).acquire()
        held.check()
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert message.startswith(f"another run writes to {out} (process {os.getpid()} on {os.uname().nodename});")
    assert "--wait" in message and "120 s" in message


def test_released_lock_is_free_at_once(out: str) -> None:
    for number in (1, 2, 3):
        with hold(out) as held:
            held.check()
            assert content(out, number)["pid"] == os.getpid()
        assert content(out, number) == {"released": True}


def test_lock_is_released_when_the_run_fails(on_disk: str) -> None:
    with pytest.raises(ValueError, match="a bug"), hold(on_disk):
        raise ValueError("a bug")
    assert_free(on_disk)


def test_numbers_only_grow_and_older_files_go(out: str) -> None:
    for number in range(1, 5):
        assert_free(out)
        assert numbers(out) == [f"{number:08d}.json"]
    leave(out, {"released": True}, 41)
    assert_free(out)
    assert numbers(out) == ["00000042.json"]


def test_number_of_a_holder_is_that_of_its_file(out: str) -> None:
    for number in (1, 2):
        with hold(out) as held:
            assert held.number == number and numbers(out) == [f"{number:08d}.json"]


def test_locks_of_different_outputs_are_different(tmp_path: Path) -> None:
    with hold(str(tmp_path / "a")), hold(str(tmp_path / "b")), hold(str(tmp_path / "a" / "c")):
        assert_held(str(tmp_path / "a"))


def test_lock_leaves_nothing_but_its_file(on_disk: str) -> None:
    with hold(on_disk) as held:
        assert_held(on_disk)
        held.check()
    assert [name for _, _, names in os.walk(on_disk) for name in names] == ["00000001.json"]


def test_other_files_beside_the_locks_are_no_locks(out: str) -> None:
    others = ("00000009.json.partial-1", "x00000009.json", "99.json", "00000009.jsonl", ".00000009.json", "note")
    for name in (*others, "old/00000009.json"):
        writing.write_bytes(f"{out}/locks/{name}", json.dumps(OTHER_MACHINE).encode())
    assert_free(out)
    assert_free(out)
    assert numbers(out) == sorted(["00000002.json", *(name.rpartition("/")[2] for name in (*others, "00000009.json"))])


@pytest.fixture
def unfair() -> Iterator[None]:
    """Threads that are interrupted at any place."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("before", ["nothing", "a released lock", "an expired lock", "a dead holder"])
def test_one_of_many_that_race_wins(before: str, on_disk: str, unfair: None) -> None:
    racers, rounds = 8, 12
    for round_ in range(rounds):
        out = f"{on_disk}-{round_}"
        if before == "a released lock":
            leave(out, {"released": True})
        elif before == "an expired lock":
            leave(out, OTHER_MACHINE)
            age(out)
        elif before == "a dead holder":
            leave(out, this_process(started=1))
        start, end = threading.Barrier(racers), threading.Barrier(racers)

        def race(out: str = out, start: threading.Barrier = start, end: threading.Barrier = end) -> bool:
            racer = Lock(out)
            start.wait(PATIENCE_SECONDS)
            try:
                racer.acquire()
                won = True
            except LockedError:
                won = False
            end.wait(PATIENCE_SECONDS)  # the winner holds it until all others have tried
            if won:
                racer.check()
            racer.release()
            return won

        with ThreadPoolExecutor(racers) as pool:
            outcomes = [racer.result() for racer in [pool.submit(race) for _ in range(racers)]]
        assert sum(outcomes) == 1
        assert_free(out)


# The dead.


def test_lock_of_a_killed_process_of_this_machine_is_free_at_once(on_disk: str) -> None:
    command = [sys.executable, "-c", HOLDER, on_disk]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            with pytest.raises(LockedError, match=rf"\(process {process.pid} on "):
                Lock(on_disk).acquire()
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert_free(on_disk)


def test_holder_whose_pid_was_given_to_another_process_is_dead(on_disk: str) -> None:
    leave(on_disk, this_process())
    assert_held(on_disk)
    leave(on_disk, this_process(started=this_process()["started"] + 1))
    assert_free(on_disk)


def test_zombie_is_dead(on_disk: str) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        leave(on_disk, this_process(**lock._process(process.pid)))
        assert_held(on_disk)
        assert process.stdin is not None
        process.stdin.close()
        stat = Path(f"/proc/{process.pid}/stat")
        until(lambda: ") Z " in stat.read_text(), "the end of the process")  # nobody has asked for its exit code
        assert_free(on_disk)


def test_process_that_is_gone_is_dead(on_disk: str) -> None:
    leave(on_disk, this_process(pid=GONE))
    assert_free(on_disk)


@pytest.mark.parametrize("answer", [None, PermissionError])
def test_process_that_lives_is_not_dead_where_proc_hides_it(
    answer: type[OSError] | None, on_disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def kill(pid: int, signal_number: int) -> None:
        asked.append((pid, signal_number))
        if answer is not None:
            raise answer

    monkeypatch.setattr(os, "kill", kill)
    leave(on_disk, this_process(pid=GONE))  # /proc has nothing of it
    assert_held(on_disk)
    assert asked and set(asked) == {(GONE, 0)}
    age(on_disk)
    assert_free(on_disk)


def test_later_process_of_another_user_is_not_the_holder(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, signal_number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    leave(on_disk, this_process(started=1))
    assert_free(on_disk)


@pytest.mark.parametrize(
    "changes",
    [
        {"boot": "00000000-0000-0000-0000-000000000000"},
        {"namespace": "pid:[1]"},  # a container beside this one: its pids say nothing here
        {"boot": None, "namespace": None, "started": None},  # a system that does not tell
    ],
)
def test_process_that_cannot_be_seen_from_here_is_not_taken_for_dead(changes: dict[str, Any], on_disk: str) -> None:
    leave(on_disk, this_process(pid=GONE, started=1) | changes)
    assert_held(on_disk)
    age(on_disk)
    assert_free(on_disk)


def test_lock_of_another_machine_holds_until_it_expires(on_disk: str) -> None:
    leave(on_disk, OTHER_MACHINE)
    with pytest.raises(LockedError, match=r"\(process 4711 on elsewhere\)"):
        Lock(on_disk).acquire()
    age(on_disk, seconds=EXPIRY_SECONDS / 2)
    assert_held(on_disk)
    age(on_disk, seconds=EXPIRY_SECONDS + 5)
    assert_free(on_disk)
    assert numbers(on_disk) == ["00000002.json"]


def test_lock_ages_by_the_clock_of_its_store(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    leave(out, OTHER_MACHINE)
    assert_held(out)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 1.5)

    def is_free() -> bool:
        try:
            assert_free(out)
        except LockedError:
            return False
        return True

    until(is_free, "expiry")
    assert time.monotonic() - started > 0.25  # S3 tells whole seconds


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b"{}", b'{"pid": null}', b"[" * 100_000,
        json.dumps(this_process(pid="../1")).encode(), json.dumps(this_process(pid=10**30)).encode(),
    ],
)  # fmt: skip
def test_damaged_lock_is_respected_until_it_expires(data: bytes, on_disk: str) -> None:
    leave(on_disk, data)
    assert_held(on_disk)
    age(on_disk)
    assert_free(on_disk)


@pytest.mark.parametrize("data", [b"20260101", b'{"locked_by": "another program"}', b"\xff", b"[]"])
def test_file_of_another_program_with_a_lock_s_name_stays(data: bytes, on_disk: str) -> None:
    leave(on_disk, data)
    age(on_disk)
    assert_free(on_disk)
    assert_free(on_disk)
    assert {path.name for path in Path(on_disk, "locks").iterdir()} == {"00000001.json", "00000003.json"}
    assert Path(on_disk, "locks", "00000001.json").read_bytes() == data


def test_file_with_the_last_number_is_named(on_disk: str) -> None:
    leave(on_disk, b"x", 99_999_999)
    age(on_disk, 99_999_999)
    with (
        pytest.raises(StorageError, match=r"locks/99999999.json has the largest lock number: remove this file"),
        hold(on_disk),
    ):
        pass


# The heartbeat, and those who lost the lock.


def test_heartbeat_keeps_a_lock_that_looked_old(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    with hold(on_disk) as held:
        before = content(on_disk, 1)
        for _ in range(3):
            age(on_disk)
            until(lambda: writing.age_seconds(f"{on_disk}/locks/00000001.json") < EXPIRY_SECONDS, "a heartbeat")
        assert content(on_disk, 1) == before
        assert_held(on_disk)
        held.check()


@pytest.mark.s3
def test_heartbeat_writes_the_lock_of_a_bucket_again(
    s3_environment: SwiftServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = new_bucket()
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    with hold(out) as held:
        first = listing.describe(f"{out}/locks/00000001.json").modified_at
        until(lambda: listing.describe(f"{out}/locks/00000001.json").modified_at > first, "a heartbeat")
        held.check()


def test_heartbeat_outlives_an_outage_of_the_store(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    failed = threading.Event()

    def away(uri: str, data: bytes) -> None:
        failed.set()
        raise OSError("the store is away")

    with hold(on_disk) as held:
        with monkeypatch.context() as patch:
            patch.setattr(writing, "write_bytes", away)
            assert failed.wait(PATIENCE_SECONDS)
        age(on_disk)
        until(lambda: writing.age_seconds(f"{on_disk}/locks/00000001.json") < EXPIRY_SECONDS, "a heartbeat")
        held.check()


def test_holder_whose_lock_was_taken_over_may_not_publish(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken(out) as slow:
        slow.check()
        with monkeypatch.context() as patch:
            patch.setattr(lock, "EXPIRY_SECONDS", -60.0)  # the slow one was not heard of for long
            fast = Lock(out)
            fast.acquire()
        for _ in range(2):
            with pytest.raises(LockedError, match=r"locks/00000001\.json was lost: .*; nothing was published"):
                slow.check()
        fast.check()
        slow.release()
        fast.check()  # a loser lets go of nothing but its own
        assert content(out, 2)["token"] and numbers(out) == ["00000002.json"]
        assert_held(out)
        fast.release()
    assert_free(out)


def test_loss_that_the_heartbeat_noticed_is_final(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    interrupted = threading.Event()
    with taken(on_disk) as slow:
        slow.interrupt = interrupted.set
        leave(on_disk, OTHER_MACHINE, 2)
        thread = slow._thread
        assert thread is not None
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive() and interrupted.is_set()
        writing.remove_file(f"{on_disk}/locks/00000002.json")  # whatever the other one did meanwhile
        with pytest.raises(LockedError, match="was lost"):
            slow.check()


LOSER = """\
import os, signal, sys, threading, time
from jobs.runs import lock
from nsnet.errors import LockedError
lock.HEARTBEAT_SECONDS = 0.02
before = signal.getsignal(signal.SIGINT), signal.getsignal(lock.SIGNAL)
try:
    with lock.hold(sys.argv[1]):
        assert signal.getsignal(signal.SIGINT) is before[0]
        print("held", flush=True)
        {work}
except LockedError as error:
    print(error)
assert (signal.getsignal(signal.SIGINT), signal.getsignal(lock.SIGNAL)) == before
"""


def as_a_script_starts_it() -> None:
    """In the background, where Ctrl-C is ignored; and a supervisor may block other signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {lock.SIGNAL})


@pytest.mark.parametrize("parent", [None, as_a_script_starts_it], ids=["a terminal", "a script"])
@pytest.mark.parametrize(
    "work", ["time.sleep(600)", "threading.Event().wait()", "while True: pass"], ids=["sleep", "wait", "compute"]
)
def test_loss_of_the_lock_interrupts_the_work(work: str, parent: Callable[[], None] | None, on_disk: str) -> None:
    command = [sys.executable, "-c", LOSER.format(work=work), on_disk]  # not here: pytest has this main thread
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, preexec_fn=parent
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            leave(on_disk, OTHER_MACHINE, 2)
            log, _ = process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "locks/00000001.json was lost: another run took it over" in log and "nothing was published" in log
    assert content(on_disk, 2) == OTHER_MACHINE  # the loser lets go of nothing but its own


def test_ctrl_c_stays_ignored_where_the_parent_wants_that(on_disk: str) -> None:
    code = LOSER.format(work="os.kill(os.getpid(), signal.SIGINT); print('worked', flush=True)")
    done = subprocess.run(
        [sys.executable, "-c", code, on_disk], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
        preexec_fn=as_a_script_starts_it, timeout=PATIENCE_SECONDS, check=True,
    )  # fmt: skip
    assert done.stdout == "held\nworked\n"


def lose(out: str, held: Lock) -> None:
    """Another run takes the lock over, and the heartbeat notices."""
    leave(out, OTHER_MACHINE, 2)
    thread = held._thread
    assert thread is not None
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_loss_is_raised_as_an_interruption_in_the_main_thread(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    seen: list[BaseException] = []
    with pytest.raises(LockedError, match="was lost"), hold(on_disk) as held:
        try:
            lose(on_disk, held)
        except KeyboardInterrupt as error:  # as a library that lets go of what it holds
            seen.append(error)
            raise
    assert [type(error) for error in seen] == [lock.LockLost]


def test_loss_of_the_outer_of_two_locks_is_its_own(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    with pytest.raises(LockedError, match=f"{on_disk}-outer/locks"), hold(f"{on_disk}-outer") as outer, hold(on_disk):
        lose(f"{on_disk}-outer", outer)
    assert_free(on_disk)


def test_lock_is_held_in_another_thread_without_signals(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    before = signal.getsignal(lock.SIGNAL)

    def work() -> None:
        with hold(on_disk) as held:
            assert signal.getsignal(lock.SIGNAL) == before
            lose(on_disk, held)
            held.check()

    with ThreadPoolExecutor(1) as pool, pytest.raises(LockedError, match="was lost"):
        pool.submit(work).result()


@pytest.mark.parametrize("error", [FileNotFoundError("rows"), ValueError("rows"), StorageError("the cluster failed")])
def test_failure_of_a_holder_without_its_lock_is_the_loss(error: Exception, on_disk: str) -> None:
    """Whoever took it over has removed the files that the loser still reads."""
    with pytest.raises(LockedError, match="was lost") as caught, hold(on_disk):
        leave(on_disk, OTHER_MACHINE, 2)
        raise error
    assert caught.value.__cause__ is error


def test_failure_stays_what_it_is_where_the_store_does_not_tell_of_the_lock(
    on_disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> None:
        raise OSError("the store is away")

    with pytest.raises(ValueError, match="rows"), hold(on_disk):
        monkeypatch.setattr(listing, "names_below", away)
        raise ValueError("rows")


def test_interruption_without_the_lock_is_its_loss(on_disk: str) -> None:
    with pytest.raises(LockedError, match="was lost"), hold(on_disk):
        leave(on_disk, OTHER_MACHINE, 2)
        raise KeyboardInterrupt


def test_interruption_by_a_person_stays_one(on_disk: str) -> None:
    with pytest.raises(KeyboardInterrupt), hold(on_disk):
        raise KeyboardInterrupt
    assert_free(on_disk)


def test_holder_that_keeps_its_lock_is_not_interrupted(on_disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    interrupted = threading.Event()
    with hold(on_disk) as held:
        held.interrupt = interrupted.set
        age(on_disk)
        until(lambda: writing.age_seconds(f"{on_disk}/locks/00000001.json") < EXPIRY_SECONDS, "a heartbeat")
    assert not interrupted.is_set()


def test_lock_whose_folder_is_gone_is_lost(on_disk: str) -> None:
    with taken(on_disk) as held:
        shutil.rmtree(f"{on_disk}/locks")
        with pytest.raises(LockedError, match="was lost"):
            held.check()
    assert not os.path.exists(f"{on_disk}/locks")


def test_lock_that_cannot_be_released_expires_and_the_result_counts(
    on_disk: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(uri: str, data: bytes) -> None:
        raise OSError("the store is away")

    with hold(on_disk):
        monkeypatch.setattr(writing, "write_bytes", away)
    assert (
        "warning: the lock was not released and expires in 120 s (OSError: the store is away)"
        in capsys.readouterr().err
    )


def test_slow_competitor_that_creates_a_number_of_the_past_has_not_won(
    on_disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(on_disk, {"released": True})
    slow, create = Lock(on_disk), writing.create

    def create_late(uri: str, data: bytes) -> bool:
        monkeypatch.setattr(writing, "create", create)
        assert_free(on_disk)  # others take number 2 and 3 and remove what is older
        fast.acquire()
        return create(uri, data)

    fast = Lock(on_disk)
    monkeypatch.setattr(writing, "create", create_late)
    with pytest.raises(LockedError):
        slow.acquire()
    fast.check()
    fast.release()


@pytest.mark.s3
def test_conditional_put_that_let_two_through_has_one_winner(
    s3_environment: SwiftServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = new_bucket()
    create = writing.create

    def create_and_lose(uri: str, data: bytes) -> bool:
        assert create(uri, data)
        leave(out, OTHER_MACHINE)  # the other one's put came through as well, and last
        return True

    monkeypatch.setattr(writing, "create", create_and_lose)
    with pytest.raises(LockedError, match=r"\(process 4711 on elsewhere\)"):
        Lock(out).acquire()
    assert content(out, 1) == OTHER_MACHINE


# Waiting.


def test_run_that_waits_goes_on_once_the_lock_is_released(
    out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)
    looked, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(lock, "say", lambda message: (print(message), looked.set()))

    def wait() -> None:
        with hold(out, wait=True) as held:
            held.check()
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        with hold(out) as first:
            waiting = pool.submit(wait)
            assert looked.wait(PATIENCE_SECONDS)
            time.sleep(0.1)  # a few more looks
            assert not begun.is_set()
            first.check()
        waiting.result(PATIENCE_SECONDS)
    assert begun.is_set()
    output = capsys.readouterr().out
    assert output == f"waiting for another run (process {os.getpid()} on {os.uname().nodename})\n"  # once


def test_run_that_need_not_wait_does_not(on_disk: str, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(on_disk, wait=True):
        pass
    assert capsys.readouterr().err == ""
