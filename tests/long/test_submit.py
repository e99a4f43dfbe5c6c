"""The same `score` through `ray job submit` on a local cluster."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.dataset import synthetic
from jobs.runs import catalog
from nsnet import recipes
from nsnet.captioner import save_tiny_captioner
from nsnet.detector import Detector

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds, below those that the kernel gives to sockets without a port of their own.

    Ray's daemons open many such sockets as they start. An agent that finds its port taken by one of them goes on
    without a job server, and its cluster never takes a job.
    """
    free: list[int] = []
    for port in random.SystemRandom().sample(range(21_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise RuntimeError(f"{count} free ports are needed, and {len(free)} of 100 are")


@pytest.fixture
def job_server(tmp_path: Path) -> Iterator[str]:
    """Address of the job server of a cluster of this machine, ended by its own process group."""
    port, dashboard, agent = free_ports(3)
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    # Ray's sockets live below its temporary folder, whose path must be short
    folder = Path("/tmp") / f"nsnet-job-{os.getpid()}"
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        # an embedded cluster of other tests may hold the agent's usual port: the node would then never take a job
        f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    log = (tmp_path / "head.log").open("wb")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(360):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/version", timeout=2):
                break
            assert head.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        else:
            pytest.fail(f"no answer from {address} in three minutes:\n{(tmp_path / 'head.log').read_text()}")
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(timeout=30)
        log.close()
        subprocess.run(["rm", "-rf", str(folder)], check=False)


def submit(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Submit a job. The job server answers some seconds before the node's agent, without which it takes no job."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    for _ in range(10):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(2)
    return done


def test_score_runs_as_a_submitted_job(job_server: str, tmp_path: Path) -> None:
    source, bundle, out = tmp_path / "pictures", tmp_path / "detector", tmp_path / "scored"
    synthetic.write_bucket(source, range(4), seed=0, size_px=128, processes=1)
    (tmp_path / "captioner").mkdir()
    save_tiny_captioner(tmp_path / "captioner", seed=0)
    Detector.build(recipes.TINY.detector).save(bundle, captioner=tmp_path / "captioner")
    command = [
        str(BIN / "ray"), "job", "submit", "--address", job_server, "--submission-id", "night-1", "--working-dir", ".",
        "--", "python", "-m", "jobs.score", str(source), "--detector", str(bundle), "--out", str(out),
    ]  # fmt: skip
    done = submit(command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = catalog.verdicts(str(out)).to_table().to_pylist()
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"scored"}
