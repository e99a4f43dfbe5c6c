"""A job is followed to its end: its lines once each, its own exit code, and connections that break are made again."""

from collections.abc import AsyncGenerator, Iterator

import aiohttp
import pytest

from jobs.submission import following
from jobs.submission.client import API_SERVER, JobServer
from jobs.submission.following import Log, follow
from nsnet.errors import StorageError, UsageError
from tests.support.job_server import FakeJobServer, fake_job_server
from tests.support.models import closed_address

LINES = ["one\ntwo\n", "thr", "ee\nfour\n"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJobServer]:
    monkeypatch.setenv(API_SERVER, "")
    monkeypatch.setattr(following, "RETRY_SECONDS", 0.01)
    with fake_job_server() as server:
        server.logs = [LINES]
        server.has("night", "SUCCEEDED", 0)
        yield server


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("code", [1, 2, 3, 4, 130, 143])
def test_code_of_a_job_is_that_of_its_command(
    code: int, fake: FakeJobServer, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.has("night", "FAILED", code)
    assert follow(JobServer(fake.address), "night", None) == code
    assert capfd.readouterr().err == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize(
    ("code", "message", "said"),
    [
        (-9, "", "its process was killed by signal 9"),
        (137, "", "its process ended with code 137"),
        (None, "Failed to set up runtime environment: no disk\nTraceback …\n", "runtime environment: no disk"),
    ],
)
def test_job_that_ended_otherwise_is_code_1_with_the_reason(
    code: int | None, message: str, said: str, fake: FakeJobServer
) -> None:
    fake.has("night", "FAILED", code, message)
    with pytest.raises(StorageError, match=f"night failed: .*{said}") as caught:
        follow(JobServer(fake.address), "night", None)
    assert caught.value.exit_code == 1


def test_job_that_was_stopped_is_143(fake: FakeJobServer) -> None:
    fake.has("night", "STOPPED")
    assert follow(JobServer(fake.address), "night", None) == 143


def test_job_that_the_server_does_not_know_is_said(fake: FakeJobServer) -> None:
    with pytest.raises(UsageError, match="knows no job other"):
        follow(JobServer(fake.address), "other", None)


@pytest.mark.parametrize("missing", ["No module named 'jobs'", "No module named jobs.submission"])
def test_image_without_this_program_is_code_2(missing: str, fake: FakeJobServer) -> None:
    fake.logs = [[f"/usr/bin/python: Error while finding module specification ({missing})\n"]]
    fake.has("night", "FAILED", 1)
    with pytest.raises(UsageError, match="has no nsnet"):
        follow(JobServer(fake.address), "night", None)


def test_connection_that_breaks_is_made_again_and_no_line_is_printed_twice(
    fake: FakeJobServer, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.logs = [LINES[:1], LINES[:2], [*LINES, "five"]]
    assert follow(JobServer(fake.address), "night", None) == 0
    assert capfd.readouterr().err == "one\ntwo\nthree\nfour\nfive\n"


def test_connection_without_a_line_is_made_again(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(following, "SILENCE_SECONDS", 0.3)
    fake.logs = [["one\n", ""], LINES]
    assert follow(JobServer(fake.address), "night", None) == 0
    assert capfd.readouterr().err == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize("silent", [True, False])
def test_job_that_has_ended_is_not_followed_for_ever_over_a_bad_connection(
    silent: bool, fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A proxy may hold the connection open; a firewall may drop it."""
    monkeypatch.setattr(following, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(following, "SILENCE_AFTER_END_SECONDS", 0.2)
    server, tries = JobServer(fake.address), list[str]()
    held = server.tail

    async def dropped(name: str) -> AsyncGenerator[str, None]:
        raise aiohttp.ConnectionTimeoutError(f"Connection timeout to host {name}")
        yield ""

    def tail(name: str) -> AsyncGenerator[str, None]:
        tries.append(name)
        assert len(tries) < 20
        return held(name) if silent else dropped(name)

    fake.logs = [["one\n", ""]] * 20
    monkeypatch.setattr(server, "tail", tail)
    fake.has("night", "FAILED", 3)
    assert follow(server, "night", None) == 3
    err = capfd.readouterr().err
    assert err.count("the log of night cannot be read for now") == 1 and len(tries) <= 6


def test_job_whose_log_cannot_be_read_ends_with_its_code(
    fake: FakeJobServer, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.logs = [LINES[:1]] * 20
    fake.has("night", "FAILED", 3)
    assert follow(JobServer(fake.address), "night", None) == 3
    err = capfd.readouterr().err
    assert err.count("one\n") == 1 and err.count("the log of night cannot be read for now") == 1


def test_server_that_stays_away_ends_the_following_but_not_the_job(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = JobServer(fake.address)
    monkeypatch.setattr(following, "OUTAGE_SECONDS", 0.2)
    monkeypatch.setattr(server._client, "_address", closed_address())
    with pytest.raises(StorageError, match="night goes on: `nsnet submit --follow night"):
        follow(server, "night", None)
    assert capfd.readouterr().err.count("trying again for 0.2 s; the job goes on") == 1


@pytest.mark.parametrize("answer", [True, False, None])
def test_ctrl_c_stops_the_job_only_if_the_operator_says_so(
    answer: bool | None, fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.has("night", "RUNNING")
    monkeypatch.setattr(following, "relay", interrupt)
    ask = None if answer is None else lambda: answer is True
    assert follow(JobServer(fake.address), "night", ask) == 130
    assert fake.stopped == (["night"] if answer else [])
    err = capfd.readouterr().err
    assert ("night has ended" in err) == (answer is True) and ("night goes on: " in err) == (answer is not True)


def test_second_ctrl_c_at_the_question_leaves_the_job_running(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "relay", interrupt)
    assert follow(JobServer(fake.address), "night", interrupt) == 130  # type: ignore[arg-type]
    assert fake.stopped == []


def test_sigterm_leaves_the_job_running(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def terminate(*_: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(following, "relay", terminate)
    with pytest.raises(SystemExit):
        follow(JobServer(fake.address), "night", lambda: True)
    assert fake.stopped == [] and "night goes on" in capfd.readouterr().err


def test_lines_of_a_log_cannot_command_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log()
    log.add("a\tb \x1b[31mred\x1b[0m s3://AKIA:wJalrXUtnFEMI@bucket\n")
    assert capfd.readouterr().err == "a       b ?[31mred?[0m s3://***@bucket\n"
