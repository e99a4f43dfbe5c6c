"""A Ray cluster of nodes as `ray start` makes them, each with processes and ports of its own, with token
authentication and a dashboard that takes jobs. Nodes can be added and taken away.
"""

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from jobs.cluster.embedded import START_ENVIRONMENT
from tests.support.preloaded import COMMAND, REPO_ROOT
from tests.support.priority import preferred

BIN: Final = Path(sys.executable).parent
START_SECONDS: Final = 240.0
"""Ray's own timeouts for a node."""
ALL_TRIES_SECONDS: Final = 600.0
"""Timeout for a node with all its tries; a test that hangs is ended after 900 s (`faulthandler_timeout`)."""
STORE_BYTES: Final = 128 * 2**20
LOGS: Final = ("raylet.out", "raylet.err", "dashboard_agent.log", "dashboard_agent.err", "runtime_env_agent.log")
AGENT_PORTS: Final = (
    "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
)  # fmt: skip
OWN: Final = ("RAY_", "AWS_", "PYTHONPATH")
"""Variables of a test's process that its nodes do not inherit begin with these."""


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


def commands_above(process: psutil.Process) -> list[str]:
    """Command lines of a process and of those that started it."""
    with contextlib.suppress(psutil.Error):
        return [" ".join(one.cmdline()) for one in (process, *process.parents())]
    return []


def has_lost_its_raylet(node: subprocess.Popen[bytes]) -> bool:
    """Whether the raylet of a node has ended, while its `ray start` runs on."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(node.pid).children():
            if child.name() == "raylet" and child.status() == psutil.STATUS_ZOMBIE:
                return True
    return False


class TokenCluster:
    """A head without CPUs, where drivers run, and nodes."""

    def __init__(self, folder: Path) -> None:
        """`folder`: its path must be short, because Ray's sockets lie below it."""
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.token = secrets.token_hex(32)
        self.token_file = folder / "token"
        self.token_file.write_text(self.token)
        self.token_file.chmod(0o600)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port, self._dashboard = free_ports(2)
        self.address = f"http://127.0.0.1:{self._dashboard}"

    def start(self, nodes: int) -> None:
        """Start the head and this many nodes, and wait for each."""
        (client,) = free_ports(1)
        self._start(
            "--head", f"--port={self._port}", "--num-cpus=0", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard}", f"--temp-dir={self.session.parent}",
            f"--ray-client-server-port={client}", "--no-monitor",  # the autoscaler's, whose start takes seconds
        )  # fmt: skip
        for _ in range(nodes):
            self.add()

    @property
    def session(self) -> Path:
        """What Ray writes on this machine: logs, sockets, copies of uploaded code."""
        return self.folder / "ray" / "session_latest"

    def add(self, *options: str, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Start another node and wait until it belongs to the cluster.

        Its folder is its own: each node unpacks a job's code anew, and in one folder would remove that of running jobs.
        """
        own = f"--temp-dir={self.folder}/ray-{len(self._processes)}"
        return self._start(f"--address={self.gcs_address()}", f"--num-cpus={cpus}", own, *options)

    def remove(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node with everything below it."""
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(node.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(timeout=30)

    def others_below(self, pid: int) -> set[int]:
        """All processes below one, but for those of the cluster."""
        nodes = [psutil.Process(node.pid) for node in self._processes if node.poll() is None]
        own = {process.pid for node in nodes for process in (node, *node.children(recursive=True))}
        return {process.pid for process in psutil.Process(pid).children(recursive=True)} - own

    def gcs_address(self) -> str:
        """What nodes and drivers connect to, in the file where Ray notes it."""
        return (self.session.parent / "ray_current_cluster").read_text().strip()

    def alive(self) -> list[dict[str, Any]]:
        """The nodes that are alive, in the words of Ray's state API."""
        nodes = json.loads(self.get("/api/v0/nodes"))["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def get(self, path: str) -> str:
        """What the dashboard answers."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())

    def environment(self) -> dict[str, str]:
        """Variables by which nodes, and commands that talk to the cluster, hold its token; nothing of a store."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
        return kept | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_raylet_start_wait_time_s": f"{START_SECONDS:.0f}",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{START_SECONDS:.0f}",
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": f"{START_SECONDS:.0f}",
            **START_ENVIRONMENT,
        }

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start a node, again if its raylet ended because its agent took too long: `ray start` waits for it in vain."""
        before = 0 if "--head" in options else len(self.alive())
        end = time.monotonic() + ALL_TRIES_SECONDS
        while time.monotonic() < end:
            with preferred():
                node = self._launch(*options)
                while time.monotonic() < end and node.poll() is None and not has_lost_its_raylet(node):
                    with contextlib.suppress(OSError, LookupError, ValueError):
                        if len(self.alive()) > before and self.gcs_address():
                            return node
                    time.sleep(0.3)
            self.remove(node)
        raise AssertionError(f"a node did not start within {ALL_TRIES_SECONDS:.0f} s\n{self.logs()}")

    def _launch(self, *options: str) -> subprocess.Popen[bytes]:
        command = [
            *COMMAND, "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            f"--object-store-memory={STORE_BYTES}",
        ]  # fmt: skip
        # an embedded cluster of other tests may hold the agent's usual port: the node would then never take a job
        ports = [f"--{name}={port}" for name, port in zip(AGENT_PORTS, free_ports(len(AGENT_PORTS)), strict=True)]
        with (self.folder / f"node-{len(self._processes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [*command, "--node-ip-address=127.0.0.1", *ports, *options],
                cwd=REPO_ROOT, env=self.environment(), stdout=log, stderr=log, process_group=0,
            )  # fmt: skip
        self._processes.append(node)
        return node

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop what jobs run on the nodes meanwhile: a node comes up in time, and the jobs are as far as before."""
        below = [process for node in self.workers for process in psutil.Process(node.pid).children(recursive=True)]
        jobs = [process for process in below if any(command.startswith("ray::") for command in commands_above(process))]
        for process in jobs:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        try:
            yield
        finally:
            for process in jobs:
                with contextlib.suppress(psutil.Error):
                    process.resume()

    @property
    def workers(self) -> list[subprocess.Popen[bytes]]:
        """The nodes that run beside the head."""
        return [node for node in self._processes[1:] if node.poll() is None]

    def logs(self) -> str:
        """The ends of what the nodes, and the raylet and the agent of the last one, said."""
        last = max(self.folder.glob("ray*/session_2*/logs"), key=lambda folder: folder.stat().st_ctime, default=None)
        own = [last / name for name in LOGS if (last / name).exists()] if last else []
        paths = [*sorted(self.folder.glob("*.log")), *own]
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in paths)

    def stop(self) -> None:
        """End all processes, by the groups that were started."""
        for node in self._processes:
            self.remove(node)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def token_cluster(nodes: int) -> Iterator[TokenCluster]:
    """A cluster of a head and this many nodes, removed afterwards."""
    cluster = TokenCluster(Path("/tmp") / f"nsnet-{os.getpid()}")
    try:
        cluster.start(nodes)
        yield cluster
    finally:
        cluster.stop()
