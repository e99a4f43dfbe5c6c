"""The last line of a command is one JSON object, for each exit code."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.console import main, output, summary

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, signal, sys
from jobs import cli
from jobs.console import main, summary
from nsnet import errors

def invoke(*_, **__):
    summary.note_item("runs", run_id="r", rows=10)
    {body}

cli.group.invoke = invoke
sys.argv = ["nsnet", "score"]
main.program(cli.group, "nsnet")
"""


def last_line(body: str, **environment: str) -> tuple[int, str]:
    """Exit code and last line of a command with this body."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("return 0", 0, None),
        ("raise errors.StorageError('no\\nstore')", 1, "no store"),
        ("raise errors.UsageError('no source')", 2, "no source"),
        ("return main.exit_code({'status': {'failed': 2}}, 10, 0.1)", 3, None),
        ("raise errors.LockedError('held')", 4, "held"),
        ("os.kill(os.getpid(), signal.SIGINT)", 128 + signal.SIGINT, "stopped"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM, "stopped"),
    ],
)
def test_summary_has_the_exit_code_and_the_error(body: str, code: int, error: str | None) -> None:
    ended, line = last_line(body)
    assert line.startswith("summary {")
    values = json.loads(line.removeprefix("summary "))
    assert ended == code == values["exit_code"]
    assert (values["command"], values.get("error"), values["runs"]) == ("score", error, [{"run_id": "r", "rows": 10}])
    assert values["seconds"] >= 0.0
    assert values.get("failed_share") == (0.2 if code == 3 else None)


def test_summary_of_wrong_arguments_names_them_without_secrets(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.score", "s3://me:s3cret@bucket/x", "--speed", "fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    values = json.loads(done.stderr.splitlines()[-1].removeprefix("summary "))
    assert done.returncode == values["exit_code"] == 2 and "--speed" in values["error"]
    assert "s3cret" not in done.stderr


def finished(capsys: pytest.CaptureFixture[str], command: str, **values: Any) -> str:
    output.begin_lines(command)
    summary.begin()
    summary.note(**values)
    summary.finish(command, 0)
    return capsys.readouterr().err


def test_summary_stays_short(capsys: pytest.CaptureFixture[str]) -> None:
    line = finished(capsys, "score", text="x" * 100_000, runs=[{"run_id": i} for i in range(1000)])
    values = json.loads(line.removeprefix("summary "))
    assert len(values["text"]) == summary.MAX_LETTERS and len(values["runs"]) == summary.MAX_ITEMS
    line = finished(
        capsys, "score", runs=[{"record": "y" * 1000} for _ in range(1000)] * 2, rows=[["z" * 400] * 16] * 16
    )
    values = json.loads(line.removeprefix("summary "))
    assert values["shortened"] and values["exit_code"] == 0 and "runs" not in values and len(line) < summary.MAX_BYTES


def test_failures_of_several_runs_are_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    output.begin_lines("score")
    summary.begin()
    for failed in (1, 5, 0):
        main.exit_code({"status": {"failed": failed}}, 10, 0.01)
    capsys.readouterr()
    summary.finish("score", 3)
    assert json.loads(capsys.readouterr().err.removeprefix("summary "))["failed_share"] == 0.5


def test_command_for_persons_and_terminal_have_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finished(capsys, "predict") == ""
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    assert finished(capsys, "score") == ""
