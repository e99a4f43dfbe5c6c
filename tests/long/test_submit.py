"""Commands as jobs of a Ray cluster of three nodes with token authentication: `nsnet submit` and `ray job submit`.

One cluster serves all tests. Its nodes know nothing of the S3 server: address and keys come with each job. What a job
leaves anywhere is then searched for those keys.
"""

import base64
import json
import os
import pty
import re
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.dataset import synthetic
from jobs.runs import catalog
from jobs.runs.lock import Lock
from jobs.storage import filesystems
from jobs.storage.uris import Uri
from tests.support.launch import ADDRESS
from tests.support.nodes import BIN, TokenCluster, token_cluster
from tests.support.swift import SwiftServer
from tests.support.tables import image_file, new_bucket, parquet_bytes, put, save_bundle

ROOT: Final = Path(__file__).resolve().parents[2]
KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
STORE: Final = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED")
JOB_SECONDS: Final = 400
SIGNED: Final = secrets.token_hex(32)
URI_SECRET, ENDPOINT_SECRET = secrets.token_hex(20), secrets.token_hex(20)


class Submitter:
    """`nsnet submit` in processes of its own, with the variables of the store; what they said is kept."""

    def __init__(self, cluster: TokenCluster, store: dict[str, str]) -> None:
        self.cluster = cluster
        self.environment = cluster.environment() | store | {"PYTHONPATH": str(ROOT)}
        self.said = ""

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start a submission; `env`: variables beside the usual ones."""
        names = [] if "--follow" in arguments else [part for name in (*KEYS, *STORE) for part in ("--env", name)]
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "submit", *arguments, "--address", self.cluster.address, *names],
            cwd=self.cluster.home, env=self.environment | options.pop("env", {}), text=True, stdout=subprocess.PIPE,
            **{"stderr": subprocess.PIPE} | options,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        out, err = process.communicate(timeout=JOB_SECONDS)
        self.said += out + err
        return process.returncode, out, err

    def __call__(self, *arguments: str, **options: Any) -> tuple[int, str, str]:
        return self.end(self.start(*arguments, **options))


@pytest.fixture(scope="module")
def cluster(forked_workers: None) -> Iterator[TokenCluster]:
    with token_cluster(nodes=2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def submit(cluster: TokenCluster, s3_environment: SwiftServer) -> Submitter:
    return Submitter(cluster, s3_environment.environment())


@pytest.fixture(scope="module")
def bucket(s3_environment: SwiftServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with labelled images."""
    folder, place = tmp_path_factory.mktemp("drawn"), new_bucket()
    synthetic.write_bucket(folder, range(12), seed=0, size_px=128, processes=1)
    put(place, {f"images/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*.jpg")})
    return place


@pytest.fixture(scope="module")
def trained(submit: Submitter, bucket: str) -> str:
    """A detector that a submitted job has trained, in the bucket."""
    arguments = [f"{bucket}/images", "--out", f"{bucket}/detector", "--recipe", "tiny", "--epochs", "1"]
    code, out, err = submit("train", *arguments, "--set", "micro_batch=4")
    assert code == 0, err
    assert out == "" and err.count("train: ") > 1
    return f"{bucket}/detector"


class Night:
    """A night of scoring: what it was given, what it said, and what was seen of it while it ran."""

    def __init__(self, submit: Submitter, bucket: str, detector: str) -> None:
        self.out = f"{bucket}/verdicts"
        system, path = filesystems.filesystem(f"{bucket}/images")
        rows = [f"s3://{name}" for name in system.find(path)[:8]]
        rows.append(f"https://store.example/x.jpg?X-Amz-Signature={SIGNED}&X-Amz-Credential=AKIA")
        rows.append(f"s3://AKIA:{URI_SECRET}@bucket/x.jpg")
        put(bucket, {"incoming.parquet": parquet_bytes({"uri": rows})})
        self.arguments = ["score", f"{bucket}/incoming.parquet", "--detector", detector, "--out", self.out]
        self.seen: list[str] = []
        process = submit.start(*self.arguments)
        excluded = {os.getpid(), *submit.cluster.others_below(os.getpid())}
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended, excluded))
        watcher.start()
        try:
            self.code, self.printed, self.log = submit.end(process)
        finally:
            ended.set()
            watcher.join()

    def _watch(self, ended: threading.Event, excluded: set[int]) -> None:
        """Look at command line and first environment of every process of this machine, but for those `excluded`: this
        one, whose environment holds the keys, and what it has started beside the cluster, such as the submitters.
        """
        while not ended.wait(0.3):
            for folder in Path("/proc").iterdir():
                if folder.name.isdecimal() and int(folder.name) not in excluded:
                    with suppress(OSError):
                        for name in ("cmdline", "environ"):
                            text = (folder / name).read_bytes().decode(errors="replace")
                            if found(text):
                                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                                self.seen.append(f"{name} of {command[:200]}")


@pytest.fixture(scope="module")
def night(submit: Submitter, bucket: str, trained: str) -> Night:
    return Night(submit, bucket, trained)


def forms(secret: str) -> Iterator[str]:
    """A secret as text, in addresses, and as base64 at each of its three offsets."""
    yield secret
    yield quote(secret, safe="")
    for offset in range(3):
        whole = base64.b64encode(b"\0" * offset + secret.encode()).decode()
        yield whole[4 if offset else 0 : -4]


def secret_texts() -> list[str]:
    own = [SwiftServer.access_key.partition(":")[2], SwiftServer.secret_key, SIGNED, URI_SECRET, ENDPOINT_SECRET]
    return [form for secret in own for form in forms(secret)]


def found(text: str) -> list[str]:
    """The secrets that a text holds."""
    return [secret for secret in secret_texts() if secret in text]


def traces(texts: Iterable[tuple[str, str]]) -> list[str]:
    """Names of the texts that hold a secret."""
    return [name for name, text in texts if found(text)]


def files_below(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and contents of all files, also of those that grow."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), f"{path}\n{path.read_bytes().decode(errors='replace')}"


def objects_of(bucket: str, except_for: str) -> Iterator[tuple[str, str]]:
    """Names and contents of all objects; of Parquet files the values of all columns."""
    system, path = filesystems.filesystem(bucket)
    for name in system.find(path):
        data = system.cat_file(name)
        if name.endswith(except_for):
            continue
        if name.endswith(".parquet"):
            data += repr(pq.read_table(pa.BufferReader(data)).to_pylist()).encode()
        yield name, f"{name}\n{data.decode(errors='replace')}"


KEPT_BY_RAY: Final = """
import json, ray
from ray.dashboard.modules.job.sdk import JobSubmissionClient
from ray._raylet import GcsClient
import sys
client = JobSubmissionClient(sys.argv[1])
print(client.list_jobs())
gcs = GcsClient(address=sys.argv[2])
for namespace in (None, b"job", b"fun", b"cls", b"dashboard", b"session", b"cluster", b"autoscaler", b"tracing"):
    for key in gcs.internal_kv_keys(b"", namespace):
        print(namespace, key, gcs.internal_kv_get(key, namespace))
"""
STATES: Final = "jobs actors tasks workers nodes objects runtime_envs placement_groups cluster_events".split()


def kept_by_ray(cluster: TokenCluster) -> Iterator[tuple[str, str]]:
    """Job metadata, the key-value store of the cluster, its state API, and the metrics of each node."""
    done = subprocess.run(
        [sys.executable, "-c", KEPT_BY_RAY, cluster.address, cluster.gcs_address()], env=cluster.environment(),
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "nsnet-score-" in done.stdout and "NSNET_SEALED" in done.stdout
    yield "jobs and key-value store", done.stdout
    yield "/api/jobs", cluster.get("/api/jobs/")
    for state in STATES:
        yield state, cluster.get(f"/api/v0/{state}?detail=true&limit=10000")
    targets = json.loads((cluster.session.parent / "prom_metrics_service_discovery.json").read_text())
    for target in targets[0]["targets"]:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        assert "ray_" in text, target
        yield f"metrics of {target}", text


def test_night_is_scored_from_and_to_the_bucket_and_its_exit_code_3_arrives(night: Night) -> None:
    assert night.code == 3, night.log
    assert night.printed == ""
    rows = catalog.verdicts(night.out).to_table().to_pylist()
    assert sorted(row["status"] for row in rows) == ["failed"] * 2 + ["scored"] * 8
    assert "2 of 10 images failed" in night.log
    assert not re.search(r"^\S+Z (\S+ )?\d{4}-\d\d-\d\dT", night.log, re.MULTILINE), "lines have one time each"


def test_second_submission_of_the_night_leaves_with_4_and_says_how_to_look_at_the_first(
    submit: Submitter, night: Night
) -> None:
    code, out, err = submit(*night.arguments)
    assert (code, out) == (4, "")
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert "was submitted before" in line and "exit code 3" in line and "nsnet submit --follow nsnet-score-" in line


def test_followed_again_a_job_ends_with_its_code(submit: Submitter, night: Night) -> None:
    name = re.search(r"submitted (nsnet-score-\S+) to", night.log)[1]  # type: ignore[index]
    code, _, err = submit("--follow", name)
    assert code == 3 and "2 of 10 images failed" in err


def test_output_that_another_run_writes_to_is_exit_code_4_of_the_job(
    submit: Submitter, bucket: str, trained: str
) -> None:
    out = f"{bucket}/taken"
    lock = Lock(Uri(out))
    lock.acquire()
    try:
        code, _, err = submit("score", f"{bucket}/images", "--detector", trained, "--out", out)
    finally:
        lock.release()
    assert code == 4, err
    assert "Running entrypoint" in err and "error: " in err


def test_endpoint_with_a_password_is_exit_code_2_of_the_job(submit: Submitter, bucket: str, trained: str) -> None:
    endpoint = f"http://somebody:{ENDPOINT_SECRET}@store.example:9000"
    arguments = ["score", f"{bucket}/images", "--detector", trained, "--out", f"{bucket}/none"]
    code, _, err = submit(*arguments, env={"AWS_ENDPOINT_URL": endpoint})
    assert code == 2, err
    assert "it must not contain a user or password" in err and "Running entrypoint" in err


@pytest.mark.parametrize("argument", [f"s3://AKIA:{URI_SECRET}@bucket/x", f"https://store.example/x?sig={SIGNED}"])
def test_secret_in_an_argument_is_refused_before_a_job_exists(submit: Submitter, bucket: str, argument: str) -> None:
    code, _, err = submit("score", argument, "--detector", bucket, "--out", f"{bucket}/none")
    assert code == 2 and "is not allowed in an address" in err and "submitted" not in err


def test_wrong_token_is_one_line_with_its_remedy(submit: Submitter, night: Night, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    code, out, err = submit(*night.arguments, env={"RAY_AUTH_TOKEN_PATH": str(wrong)})
    assert (code, out) == (2, "") and "Traceback" not in err
    (line,) = err.splitlines()
    assert "refuses the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in line
    assert wrong.read_text() not in err and submit.cluster.token not in err


def test_interrupted_follower_leaves_the_job_running_or_stops_it_as_the_operator_says(
    submit: Submitter, bucket: str, trained: str
) -> None:
    arguments = ["score", f"{bucket}/images", "--detector", trained, "--out", f"{bucket}/stopped", "--wait"]
    lock = Lock(Uri(f"{bucket}/stopped"))  # for which the job waits
    lock.acquire()
    try:
        process = submit.start(*arguments, stdin=subprocess.DEVNULL)
        name = _wait_for_line(process, "submitted ").split("submitted ")[1].split()[0]
        _wait_for_line(process, "Running entrypoint")
        process.send_signal(signal.SIGINT)
        code, _, err = submit.end(process)
        assert code == 130 and f"{name} goes on" in err
        assert _status(submit.cluster, name) == "RUNNING"
        with _terminal() as (terminal, keyboard):
            process = submit.start("--follow", name, stdin=terminal, stderr=terminal)
            shown = _read_until(process, keyboard, "Running entrypoint")
            process.send_signal(signal.SIGINT)
            shown += _read_until(process, keyboard, "[y/N]")
            os.write(keyboard, b"y\n")
            submit.said += shown + _read_until(process, keyboard, f"{name} has ended")
            assert process.wait(timeout=60) == 130
            assert process.stdout is not None
            process.stdout.close()
    finally:
        lock.release()
    assert _status(submit.cluster, name) == "STOPPED"


def _wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"ended without {text!r}")


@contextmanager
def _terminal() -> Iterator[tuple[int, int]]:
    keyboard, terminal = pty.openpty()
    try:
        yield terminal, keyboard
    finally:
        os.close(keyboard)
        os.close(terminal)


def _read_until(process: subprocess.Popen[str], keyboard: int, text: str) -> str:
    """What a process shows on its terminal until a text."""
    shown = ""
    end = time.monotonic() + JOB_SECONDS
    while text not in shown:
        assert time.monotonic() < end, shown
        if select.select([keyboard], [], [], 1.0)[0]:
            shown += os.read(keyboard, 4096).decode(errors="replace")
        else:
            assert process.poll() is None, shown
    return shown


def _status(cluster: TokenCluster, name: str) -> str:
    return str(json.loads(cluster.get(f"/api/jobs/{name}"))["status"])


def test_score_runs_as_a_job_that_ray_submits(cluster: TokenCluster, tmp_path: Path) -> None:
    """Its workers start as Ray starts them, with imports of their own."""
    put(str(tmp_path / "pictures"), {f"{i}.png": image_file(i) for i in range(8)})
    bundle, out = save_bundle(tmp_path / "detector"), tmp_path / "scored"
    command = [
        str(BIN / "ray"), "job", "submit", "--address", cluster.address, "--submission-id", "night-1",
        "--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": {ADDRESS: ""}}),
        "--", "python", "-m", "jobs.score", str(tmp_path / "pictures"),
        "--detector", str(bundle), "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment(), capture_output=True, text=True, timeout=JOB_SECONDS
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = catalog.verdicts(str(out)).to_table().to_pylist()
    assert [row["status"] for row in rows] == ["scored"] * 8


def test_no_secret_is_left_anywhere(submit: Submitter, night: Night, bucket: str) -> None:
    """After all tests above: a search that finds what a job is given openly, and nothing of what is secret."""
    cluster = submit.cluster
    assert night.seen == []
    assert traces([("submitters", submit.said)]) == []
    kept = dict(kept_by_ray(cluster))
    assert traces(kept.items()) == []
    files = dict(files_below(cluster.folder))  # session folder, uploaded code, HOME
    assert sum("job-driver-nsnet-score" in name for name in files) >= 2
    assert sum("/worker-" in name for name in files) >= 4
    assert traces(files.items()) == []
    objects = dict(objects_of(bucket, except_for="/incoming.parquet"))
    assert sum("/verdicts/" in name for name in objects) >= 2
    assert traces(objects.items()) == []


def scored_until(process: subprocess.Popen[str], text: str, said: list[str]) -> int:
    """Read a job's log until a line holds a text; the number of scored images in the last line of progress."""
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if text in line:
            break
    else:
        pytest.fail("".join(said[-40:]))
    progress = [line for line in said if ": scored " in line]
    return int(progress[-1].partition(": scored ")[2].partition("/")[0]) if progress else 0


def test_node_that_comes_during_a_night_scores_and_those_of_its_start_may_leave(
    submit: Submitter, cluster: TokenCluster, bucket: str, trained: str
) -> None:
    """The last test: the nodes of the others are gone. What is scored after that was scored on the new node."""
    images, left = 1500, 400
    put(bucket, {"many.parquet": parquet_bytes({"bytes": [image_file(i, "JPEG", 160, 120) for i in range(images)]})})
    out, said = f"{bucket}/grown", list[str]()
    process = submit.start("score", f"{bucket}/many.parquet", "--detector", trained, "--out", out)
    try:
        scored_until(process, "score: scored 1", said)
        first = cluster.workers
        with cluster.paused():
            cluster.add(cpus=8)
        scored_until(process, "the cluster has places for 2 model actors", said)
        scored_until(process, ": scored ", said)
        time.sleep(5.0)  # the new actor loads its models
        for node in first:
            cluster.remove(node)
        assert scored_until(process, ": scored ", said) < images - left, "".join(said[-20:])
        code, _, _ = submit.end(process)
    finally:
        process.kill()
        process.wait()
    assert code == 0, "".join(said[-20:])
    rows = catalog.verdicts(out).to_table(columns=["image_id", "status"]).to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows) == images
    assert {row["status"] for row in rows} == {"scored"}
