"""Messages as JSON: one object per event, whatever they contain, and nothing else on stderr."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.console import output

ROOT = Path(__file__).parents[2]


@pytest.fixture
def json_lines() -> Iterator[None]:
    output.begin_lines("score", "json")
    yield
    output.begin_lines()


@pytest.mark.usefixtures("json_lines")
def test_event_has_time_level_marks_message_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    output.say("begins")
    with output.lines_of_run("20261130T010203Z-abcdef"):
        output.mark(attempt=2, stage="planning")
        output.say("warning: slow", images=7, share=float("nan"))
        output.say("error: stopped")
    output.say("ends")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["level"] for event in events] == ["info", "warning", "error", "info"]
    assert all(event.pop("time").endswith("Z") for event in events)
    assert events[0] == {"level": "info", "command": "score", "message": "begins"}
    assert events[1] == {
        "level": "warning", "command": "score", "run_id": "20261130T010203Z-abcdef", "attempt": 2, "stage": "planning",
        "message": "warning: slow", "images": 7, "share": None,
    }  # fmt: skip
    assert set(events[3]) == set(events[0])


@pytest.mark.usefixtures("json_lines")
def test_text_of_strangers_and_secrets_are_harmless_in_every_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-long-s3cret")
    output.say('a "quote"\nand \x1b[2J', uri="http://me:pass@store/x", deep=[{"key": "a-long-s3cret"}], path=Path("/a"))
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert event["message"] == 'a "quote"\nand ?[2J'
    assert event["uri"] == "http://***@store/x" and event["deep"] == [{"key": "***"}] and event["path"] == "/a"
    assert "s3cret" not in line and line.isascii()


@pytest.mark.usefixtures("json_lines")
def test_log_of_a_library_is_an_event_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("a.library")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        output.format_logs("a.library")
        try:
            raise ValueError("http://me:pass@store failed")
        except ValueError:
            logger.exception("it failed:\n%s", "twice")
    finally:
        logger.removeHandler(handler)
    event = json.loads(capsys.readouterr().err)
    assert (event["level"], event["logger"]) == ("error", "a.library")
    assert event["message"].startswith("it failed:\ntwice\nTraceback") and "http://***@store failed" in event["message"]


def test_text_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    output.begin_lines("score")
    output.say("two\nlines", images=7)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("Z ")[2] for line in lines] == ["two", "lines"]


def test_line_of_native_code_is_an_event_and_messages_do_not_wait_for_it() -> None:
    code = (
        "import os\nfrom jobs.console import output\noutput.begin_lines('score', 'json')\n"
        "with output.native_lines('ray'):\n    os.write(2, b'[a C++ line]')\n    output.say('at once')\n"
        "output.say('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["message"] for event in events] == ["at once", "[a C++ line]", "after"]
    assert events[1]["logger"] == "ray"


NOISY = """
import logging, sys, threading, warnings
from jobs import cli
from jobs.console import main, output

def invoke(*_, **__):
    warnings.warn("old")
    logging.getLogger("lib").error("log")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    output.say("between")
    raise KeyError("bug")

cli.group.invoke = invoke
sys.argv = ["nsnet", "score"]
main.run(cli.group, "nsnet")
"""


def test_nothing_but_events_is_on_stderr_whatever_goes_wrong() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISY], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "NSNET_LOG_FORMAT": "json"},
    )  # fmt: skip
    assert done.returncode == 1
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["level"] for event in events] == ["warning", "error", "error", "info", "error", "info"]
    assert "ZeroDivisionError" in events[2]["message"] and events[4]["message"].endswith("KeyError: 'bug'")
    assert events[5]["summary"]["exit_code"] == 1 and events[5]["summary"]["error"] == "KeyError: 'bug'"


@pytest.mark.usefixtures("json_lines")
@pytest.mark.parametrize("line", ["{not json}", "{}", '{"message": "x"}', "[1]", "{" * 100_000, "plain"])
def test_line_of_another_log_that_is_no_event_becomes_one(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.relay(line)
    assert json.loads(capsys.readouterr().err)["message"] == line


@pytest.mark.usefixtures("json_lines")
def test_event_of_another_log_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    line = output.event("a message", level="info", images=7)
    output.relay(line)
    assert capsys.readouterr().err == f"{line}\n"
