"""What tests know of the nodes that they start with `ray start`, without a cluster. Costs half a second."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.nodes import has_lost_its_raylet

PARENT = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:])  # without a name it would be collected, and an ended child with it
print("started", flush=True)
time.sleep(60)
"""
"""As `ray start`: it starts a process, and does not look after it."""


@pytest.mark.parametrize(
    ("name", "seconds", "lost"), [("raylet", "0", True), ("raylet", "60", False), ("other", "0", False)]
)
def test_node_has_lost_its_raylet_once_that_has_ended(name: str, seconds: str, lost: bool, tmp_path: Path) -> None:
    program = shutil.copy(str(shutil.which("sleep")), tmp_path / name)
    with subprocess.Popen([sys.executable, "-c", PARENT, program, seconds], stdout=subprocess.PIPE) as node:
        try:
            assert node.stdout is not None and node.stdout.readline() == b"started\n"
            (child,) = psutil.Process(node.pid).children()
            try:
                end = time.monotonic() + 5
                while seconds == "0" and child.status() != psutil.STATUS_ZOMBIE:
                    assert time.monotonic() < end
                    time.sleep(0.01)
                assert has_lost_its_raylet(node) is lost
            finally:
                child.kill()
        finally:
            node.kill()
