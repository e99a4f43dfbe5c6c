"""`nsnet submit`: arguments are checked by the command's own parser, before Ray is imported or anybody is asked."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from jobs import cli, submit
from jobs.console import output
from jobs.submission import client
from tests.support.job_server import FakeJobServer, fake_job_server
from tests.support.models import closed_address
from tests.support.tables import run_command

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCY"
SCORE = ("score", "s3://bucket/in", "--detector", "s3://bucket/d", "--out", "s3://bucket/out")


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def fake() -> Iterator[FakeJobServer]:
    with fake_job_server() as server:
        server.logs = [["2026-11-30T01:00:00Z a line of the job\n"]]
        yield server


def refused(*arguments: str) -> str:
    """What is said of a submission that ends with exit code 2."""
    code, out, err = run_command("submit", *arguments)
    assert (code, out) == (2, "") and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("name", submit.COMMANDS)
def test_wrong_usage_is_said_by_the_command_itself(name: str) -> None:
    assert f"Usage: nsnet submit {name} [OPTIONS]" in refused(name)
    assert "No such option '--nope'" in refused(name, "s3://a", "--nope", "--address", "http://head")


def test_no_option_of_the_submission_hides_one_of_a_command() -> None:
    own = {option for parameter in submit.command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name in submit.COMMANDS:
        command = cli.group.get_command(click.Context(cli.group), name)
        assert command is not None
        assert own & {option for parameter in command.params for option in parameter.opts} == {
            "--address",
            "--debug",
            "--log-format",
        }, name


def test_commands_that_run_on_a_cluster_are_named() -> None:
    assert "give one of train, caption, score, evaluate" in refused("predict", "x.jpg")
    assert run_command("submit")[0] == 2


def test_help_shows_the_options_of_the_command_and_of_the_submission() -> None:
    code, out, _ = run_command("submit", "score", "--help")
    assert code == 0 and "--max-failed SHARE" in out and out.count("--address") == out.count("--log-format") == 1
    assert out.index("--max-failed") < out.index("Options of the submission") < out.index("--no-wait")
    code, out, _ = run_command("submit", "--help")
    assert code == 0 and "--no-wait" in out and "--max-failed" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--detector", f"s3://AKIA:{SECRET}@bucket/d"),
        (f"--detector=s3://AKIA:{SECRET}@bucket/d",),
        ("--include", f"https://store.example/x?X-Amz-Signature={SECRET}"),
        ("--include", f"*{SECRET}*"),
        ("--env", f"AWS_SECRET_ACCESS_KEY={SECRET}"),
        ("--address", f"http://me:{SECRET}@head:8265"),
    ],
)
def test_secret_on_the_command_line_is_refused_and_not_repeated(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert SECRET not in refused(*SCORE, *arguments)


def test_operating_point_with_an_at_sign_is_no_secret(fake: FakeJobServer) -> None:
    arguments = ["train", "s3://bucket/in", "--out", "s3://bucket/d", "--operating-point", "cost=10:1@0.01"]
    assert run_command("submit", *arguments, "--no-wait", "--address", fake.address)[0] == 0
    assert "cost=10:1@0.01" in fake.submitted[0]["entrypoint"]


def test_address_is_that_of_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no cluster is named: give --address http://HOST:8265" in refused(*SCORE)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "no cluster is named" in refused(*SCORE)
    assert "--address head:8265 is no address of a dashboard" in refused(*SCORE, "--address", "head:8265")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:badport")
    assert "RAY_ADDRESS http://head:badport is no address" in refused(*SCORE)
    code, _, err = run_command("submit", *SCORE, "--address", closed_address())
    assert code == 1 and "no dashboard answers at --address" in err and "refused" in err


def test_address_of_the_cluster_itself_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("jobs.cluster.address._answer", lambda *_: bytes([0, 0, 18, 4, 0, 0, 0, 0, 0]))
        code, _, err = run_command("submit", *SCORE, "--address", f"http://127.0.0.1:{server.getsockname()[1]}")
    assert code == 1 and "is the cluster itself; jobs are submitted to its dashboard" in err


def test_submission_prints_the_id_alone_with_no_wait(fake: FakeJobServer) -> None:
    code, out, err = run_command("submit", *SCORE, "--no-wait", "--address", fake.address)
    assert code == 0 and re.fullmatch(r"nsnet-score-out-[0-9a-f]{8}-\d{8}\n", out)
    assert f"submitted {out.strip()} to {fake.address}: " in err and "a line of the job" not in err
    (job,) = fake.submitted
    assert job["entrypoint"] == "python -m jobs.submission.job " + " ".join(SCORE)
    code, out, err = run_command("submit", *SCORE, "--address", fake.address)
    assert (code, out) == (4, "") and "was submitted before" in err.splitlines()[-1]


def test_submission_ends_with_the_code_of_the_job(fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: client.JobServer, name: str, *_: Any) -> None:
        fake.has(name, "FAILED", 3)

    monkeypatch.setattr(client.JobServer, "submit", run)
    code, out, err = run_command("submit", *SCORE, "--address", fake.address)
    assert (code, out) == (3, "")
    assert "a line of the job" in err.splitlines()  # after its one time, which `run_command` removes
    name = err.partition("submitted ")[2].split()[0]
    assert run_command("submit", "--follow", name, "--address", fake.address)[0] == 3


def test_local_paths_are_made_absolute_and_named(
    fake: FakeJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("score", "in", "--detector=models/d", "--out", "s3://b/out", "--include", "*/in", "--limit", "5")
    code, _, err = run_command("submit", *arguments, "--no-wait", "--address", fake.address)
    assert code == 0 and f"every node must reach them: {tmp_path}/in, {tmp_path}/models/d" in err
    assert fake.submitted[0]["entrypoint"] == (
        f"python -m jobs.submission.job score {tmp_path}/in --detector={tmp_path}/models/d --out s3://b/out "
        "--include '*/in' --limit 5"
    )
    run_command("submit", "score", "file://in", *arguments[2:5], "--no-wait", "--again", "--address", fake.address)
    assert f" score {tmp_path}/in --detector" in fake.submitted[1]["entrypoint"]
    assert "spelled like another argument" in refused(*arguments[:6], "in", "--address", fake.address)


@pytest.mark.parametrize("name", submit.COMMANDS)
def test_each_command_is_submitted_with_its_least_arguments(name: str, fake: FakeJobServer) -> None:
    detector = ["--detector", "s3://b/d"] if name == "score" else []
    out = [] if name == "audit" else ["--out", "s3://b/out"]  # without it, an audit only prints
    arguments = [name, "s3://b/in", *detector, *out]
    code, printed, err = run_command("submit", *arguments, "--no-wait", "--address", fake.address)
    assert code == 0 and printed.startswith(f"nsnet-{name}-"), err
    assert fake.submitted[0]["entrypoint"].endswith(" ".join(arguments))


def test_settings_of_this_process_reach_the_job_as_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NSNET_WEIGHTS", "mirror")
    monkeypatch.setenv("NSNET_DEBUG", "1")
    output.begin_lines("submit", "json")
    try:
        found = submit._request("score", [*SCORE[1:]], (), None)
    finally:
        output.begin_lines()
    assert found.arguments == ["--debug", "--log-format", "json", "--weights", f"{tmp_path}/mirror", *SCORE[1:]]
    for name in ("NSNET_WEIGHTS", "NSNET_DEBUG"):
        monkeypatch.setenv(name, "")
    assert submit._request("score", [*SCORE[1:]], (), None).arguments == [*SCORE[1:]]


@pytest.mark.parametrize("place", [0, 1])
def test_options_of_messages_may_stand_anywhere(
    place: int, fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSNET_DEBUG", "")  # which --debug sets
    arguments = (*SCORE[:place], "--debug", *SCORE[place:])
    assert run_command("submit", *arguments, "--no-wait", "--address", fake.address)[0] == 0
    assert fake.submitted[0]["entrypoint"].endswith(" score --debug " + " ".join(SCORE[1:]))


def test_another_command_for_the_same_output_is_told_apart(fake: FakeJobServer) -> None:
    arguments = (*SCORE, "--no-wait", "--address", fake.address)
    run_command("submit", *arguments, "--limit", "5")
    code, _, err = run_command("submit", *arguments)
    assert code == 4 and f"with other arguments ({' '.join(SCORE)} --limit 5)" in err
    assert "with other arguments" not in run_command("submit", *arguments, "--limit", "5")[2]


@pytest.mark.parametrize("name", ["", "../x", "a b"])
def test_followed_job_has_the_id_of_a_job(name: str, fake: FakeJobServer) -> None:
    assert "is no submission id" in refused("--follow", name, "--address", fake.address)


@pytest.mark.parametrize("option", [("--env", "HOME"), ("--no-wait",), ("--again",), ("--code", "upload")])
def test_options_of_a_submission_are_refused_where_nothing_is_submitted(option: tuple[str, ...]) -> None:
    assert f"leave {option[0]} out" in refused("--follow", "night", *option)


def test_arguments_are_checked_without_ray() -> None:
    code = (
        "import sys, jobs.submit\n"
        "from jobs.submit import _request\n"
        f"_request('score', {list(SCORE[1:])}, (), None)\n"
        "print(sorted({'ray', 'torch', 'requests', 'cryptography'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_job_of_another_version_is_one_line(tmp_path: Path) -> None:
    for version, said in (("0.0.1", "the submitter 0.0.1: use an image of that version"), (None, "nope")):
        arguments = ["--version", version] if version else []
        done = subprocess.run(
            [sys.executable, "-m", "jobs.submission.job", *arguments, "evaluate", "--nope"],
            cwd=Path(__file__).parents[2], capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith('summary {"command": "evaluate", "exit_code": 2')


def test_metadata_holds_no_more_than_the_command(fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    run_command("submit", *SCORE, "--no-wait", "--address", fake.address)
    assert SECRET not in json.dumps(fake.submitted)
    assert SECRET not in refused(*SCORE, "--again", "--env", "AWS_SECRET_ACCESS_KEY", "--address", fake.address)
    assert len(fake.submitted) == 1
