"""What is submitted, and how often: against a job server that starts nothing."""

import base64
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.submission import package, request, sealing
from jobs.submission.client import API_SERVER, JobServer
from jobs.submission.request import Request, submit
from nsnet.errors import LockedError, StorageError, UsageError
from tests.support.job_server import FakeJobServer, fake_job_server
from tests.support.models import closed_address

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCY"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJobServer]:
    monkeypatch.setenv(API_SERVER, "")
    with fake_job_server() as server:
        yield server


def night(**options: Any) -> Request:
    settings = {"command": "score", "arguments": ["s3://a b", "--out", "s3://o"], "wanted": "night", "code": "upload"}
    return Request(**(settings | options))


def test_job_runs_the_command_with_a_copy_of_the_source(fake: FakeJobServer) -> None:
    assert submit(JobServer(fake.address), night()) == "night"
    (job,) = fake.submitted
    assert job["entrypoint"] == "python -m jobs.submission.job score 's3://a b' --out s3://o"
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    ((name, content),) = fake.packages.items()
    assert job["runtime_env"]["working_dir"] == f"gcs://{name}" and content[:2] == b"PK"
    assert set(job["runtime_env"]) == {"env_vars", "working_dir"}


def test_installed_code_uploads_nothing_and_names_its_version(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "is_source_tree", lambda: False)
    monkeypatch.setattr(request, "installed_version", lambda: "1.2.3")
    submit(JobServer(fake.address), night(code="auto"))
    assert fake.submitted[0]["entrypoint"].startswith("python -m jobs.submission.job --version 1.2.3 score ")
    assert "working_dir" not in fake.submitted[0]["runtime_env"] and fake.packages == {}


def test_source_tree_is_uploaded_unless_told_otherwise() -> None:
    assert night(code="auto").uploads and not night(code="installed").uploads


@pytest.mark.parametrize(("status", "code"), [("PENDING", None), ("RUNNING", None), ("SUCCEEDED", 0), ("FAILED", 3)])
def test_night_that_is_done_or_under_way_is_not_submitted_again(
    status: str, code: int | None, fake: FakeJobServer
) -> None:
    fake.has("night", status, code)
    server = JobServer(fake.address)
    with pytest.raises(LockedError) as caught:
        submit(server, night())
    assert caught.value.exit_code == 4 and fake.submitted == []
    assert f"night was submitted before at 00:53 UTC ({status.lower()}" in str(caught.value)
    assert f"nsnet submit --follow night --address {fake.address}" in str(caught.value)
    assert submit(server, night(again=True)) == "night-2"


@pytest.mark.parametrize(("status", "code"), [("FAILED", code) for code in (1, 2, 4, None)] + [("STOPPED", None)])
def test_night_that_published_nothing_is_submitted_again_under_the_next_number(
    status: str, code: int | None, fake: FakeJobServer
) -> None:
    fake.has("night", status, code)
    fake.has("night-2", "FAILED", 1)
    assert submit(JobServer(fake.address), night()) == "night-3"
    with pytest.raises(LockedError, match="night-3 was submitted before"):
        submit(JobServer(fake.address), night())


@pytest.mark.parametrize("problem", [StorageError("no answer"), KeyboardInterrupt()])
def test_submission_without_an_answer_says_how_to_look_for_its_job(
    problem: BaseException, fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = JobServer(fake.address)

    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(server, "submit", fail)
    with pytest.raises(type(problem)):
        submit(server, night())
    assert f"night may have been started: `nsnet submit --follow night --address {fake.address}`" in (
        capfd.readouterr().err
    )


def test_of_two_submissions_in_one_moment_one_leaves_with_4(fake: FakeJobServer) -> None:
    fake.has("night", "PENDING")
    fake.hides = True
    with pytest.raises(LockedError, match="by another command in this moment"):
        submit(JobServer(fake.address), night())


def test_variables_travel_sealed_if_the_cluster_has_a_token(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = JobServer(fake.address)
    monkeypatch.setattr(server, "asks_for_token", lambda: True)
    monkeypatch.setattr(sealing, "cluster_token", lambda: "the token")
    submit(server, night(variables={"AWS_SECRET_ACCESS_KEY": SECRET, "NSNET_DEBUG": "1"}))
    (job,) = fake.submitted
    text = json.dumps(job) + capfd.readouterr().err
    assert SECRET not in text and "NSNET_DEBUG" in text  # which the line about the submission names
    assert base64.b64encode(SECRET.encode()).decode()[:-4] not in text
    sealed = job["runtime_env"]["env_vars"].pop(sealing.SEALED)
    assert sealing.unseal(sealed, "the token") == {"AWS_SECRET_ACCESS_KEY": SECRET, "NSNET_DEBUG": "1"}
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    module, _, function = job["runtime_env"]["worker_process_setup_hook"].rpartition(".")
    assert (module, function) == (sealing.__name__, sealing.unseal_environment.__name__)


def test_without_a_token_a_secret_is_refused_and_anything_else_passes(fake: FakeJobServer) -> None:
    server = JobServer(fake.address)
    with pytest.raises(UsageError, match="has no token to seal it with"):
        submit(server, night(variables={"AWS_SECRET_ACCESS_KEY": SECRET}))
    assert fake.submitted == []
    submit(server, night(variables={"NSNET_DEBUG": "1"}))
    assert fake.submitted[0]["runtime_env"]["env_vars"]["NSNET_DEBUG"] == "1"


def test_whether_a_cluster_asks_for_a_token_is_found_without_sending_one(fake: FakeJobServer) -> None:
    server = JobServer(fake.address)
    assert not server.asks_for_token()
    fake.asks = True
    assert server.asks_for_token()


def test_server_that_asks_for_a_token_refuses_it_or_fails_is_said_with_the_remedy(fake: FakeJobServer) -> None:
    fake.asks = True
    with pytest.raises(UsageError, match="asks for a token, and none was sent: set RAY_AUTH_MODE=token"):
        JobServer(fake.address)
    fake.asks, fake.answer = False, 403
    with pytest.raises(UsageError, match="refuses the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH"):
        JobServer(fake.address)
    fake.answer = 200
    server = JobServer(fake.address)
    fake.answer = 500
    with pytest.raises(StorageError, match=r"ValueError: the disk is full$"):
        server.info("night")


def test_connection_that_fails_is_one_line(fake: FakeJobServer) -> None:
    with pytest.raises(StorageError, match="no connection"):
        JobServer(closed_address())
    with pytest.raises(StorageError, match="no TLS connection") as caught:
        JobServer(fake.address.replace("http:", "https:"))
    assert "SSL_CERT_FILE" in str(caught.value) and "HTTPSConnectionPool" not in str(caught.value)


def test_address_that_is_given_wins_over_the_environment(fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_SERVER, closed_address())
    assert JobServer(fake.address).info("night") is None
    assert os.environ[API_SERVER] == fake.address
