"""A Ray cluster of several nodes on this machine, its processes by their role, and `nsnet score` as a process.

Processes are found below the raylets that the cluster itself started and are killed by their ids, never by name.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from jobs.cluster.embedded import NODE_ENVIRONMENT
from tests.support.preloaded import COMMAND, processes_below
from tests.support.priority import preferred
from tests.support.tables import MARK

NODES: Final = 2
TRIES: Final = 5
STORE_BYTES: Final = 128 * 2**20
ROLES: Final = ("driver", "raylet", "model actor", "CPU worker", "spot node")
SPOT_NOTICE_SECONDS: Final = 5
"""Between the notice that a spot node leaves, and its end."""
TITLES: Final = {"model actor": "MapBatches(ModelActor)", "CPU worker": "MapBatches(Prepare"}
"""How Ray names the processes of the stages."""


class Nodes:
    """A head without CPUs, where drivers attach, and nodes that may be killed; `size`: of each, such as `num_gpus`."""

    def __init__(self, count: int = NODES, **size: int) -> None:
        from ray.cluster_utils import Cluster

        os.environ.update(NODE_ENVIRONMENT)  # as in the image of the nodes
        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster = _started(lambda: Cluster(initialize_head=True, head_node_args=head))
        self._size = {"num_cpus": 1, **size}
        for _ in range(count):
            self.add()

    def add(self) -> Any:
        """Another node; returns it."""
        settings = {**self._size, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        return _started(lambda: self.cluster.add_node(**settings))

    def remove(self, node: Any) -> None:
        """Kill the processes of a node."""
        self.cluster.remove_node(node, allow_graceful=False)

    @property
    def address(self) -> str:
        """What drivers connect to."""
        return str(self.cluster.address)

    def workers(self, role: str, of: Any = None) -> list[psutil.Process]:
        """Living worker processes that do the work of a role, of one node or of all."""
        found = []
        for node in self.cluster.worker_nodes if of is None else [of]:
            for process in processes_below(_raylet(node)):
                if TITLES[role] in title(process):
                    found.append(process)
        return found

    def kill(self, role: str, dice: random.Random) -> bool:
        """Kill -9 one process of a role; False: there is none at this moment."""
        if role in ("raylet", "spot node"):
            node = dice.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.node_id))
            if role == "spot node":
                self._tell_that_it_leaves(node)
                time.sleep(SPOT_NOTICE_SECONDS)
            self.remove(node)
            self.add()
            return True
        victims = self.workers(role)
        if not victims:
            return False
        dice.choice(victims).send_signal(signal.SIGKILL)
        return True

    def _tell_that_it_leaves(self, node: Any) -> None:
        arguments = {
            "address": self.address, "node-id": node.node_id, "reason": "DRAIN_NODE_REASON_PREEMPTION",
            "reason-message": "a spot node", "deadline-remaining-seconds": str(SPOT_NOTICE_SECONDS),
        }  # fmt: skip
        options = [text for name, value in arguments.items() for text in (f"--{name}", value)]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", *options], check=True, timeout=60)

    def stop(self) -> None:
        """Stop all nodes."""
        self.cluster.shutdown()


def _started(start: Callable[[], Any]) -> Any:
    """Start a node, again if it does not come up: a raylet waits only 15 s for its agents, whatever its settings."""
    for left in reversed(range(TRIES)):
        try:
            with preferred():
                return start()
        except Exception as error:  # Ray has no class for it
            if not left or "timed out during startup" not in str(error):
                raise
    raise AssertionError("unreachable")


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def title(process: psutil.Process) -> str:
    """Its command line; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Score:
    """`nsnet score` in a process of its own; its lines are collected, without time and run."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, module: str = "jobs.score") -> None:
        self.process = subprocess.Popen(
            [*COMMAND, module, *arguments],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **(env or {})},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if not line.startswith("summary {"):
                self.lines.append(MARK.sub("", line.rstrip("\n"), count=1))

    @property
    def prepared(self) -> int:
        """Number of prepared images in the last line of progress."""
        return self._progress("prepared ", ",")

    @property
    def scored(self) -> int:
        """Number of scored images in the last line of progress."""
        return self._progress("scored ", "/")

    def _progress(self, before: str, after: str) -> int:
        lines = [line for line in self.lines if line.startswith("score: scored ")]
        return int(lines[-1].partition(before)[2].partition(after)[0]) if lines else 0

    def wait_for(self, condition: Any, seconds: float) -> bool:
        """Wait until a condition holds; False: the process ended before."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """Kill -9 the process and what it started itself."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.end(60)

    def end(self, seconds: float) -> int:
        """Wait for the end; the exit code."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"not ended within {seconds} s\n{self.text()}") from None
        finally:
            self._reader.join(timeout=10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def text(self) -> str:
        """The last lines."""
        return "\n".join(self.lines[-40:])


@contextmanager
def running(*arguments: str, env: dict[str, str] | None = None, module: str = "jobs.score") -> Iterator[Score]:
    """A scoring process that does not outlive the block; `env`: variables beside this process's own."""
    score = Score(*arguments, env=env, module=module)
    try:
        yield score
    finally:
        if score.process.poll() is None:
            score.kill()
