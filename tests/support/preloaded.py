"""Ray workers that fork from a process which has imported already: their start costs no ten seconds of imports.

The price: a fork has the torch threads of that process (one), and a worker that lacks an import does not show it. The
job of `ray job submit` in `tests/long/test_submit.py` has workers as Ray starts them.

`preloaded()` starts that process, and lets the clusters of this process start their workers through `launch.py`.
`COMMAND` runs a module in a process of its own whose cluster does so too; so does `ray start`, as that module.
"""

import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partialmethod
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from tests.support.launch import ADDRESS, NAME, RAYS_OWN

LAUNCHER: Final = str(Path(__file__).with_name("launch.py"))
REPO_ROOT: Final = Path(__file__).parents[2]
COMMAND: Final = (sys.executable, "-m", "tests.support.driver")
"""To be followed by a module and its arguments, in place of `python -m`."""
MAX_REQUEST_BYTES: Final = 1 << 18
MODULES: Final = (
    "aiohttp", "botocore.session", "duckdb", "google.protobuf.json_format", "jsonschema", "msgpack", "nsnet.captions",
    "nsnet.detector", "open_clip", "pandas", "peft", "pillow_heif", "psutil", "pyarrow.compute", "pyarrow.dataset",
    "pyarrow.fs", "pyarrow.parquet", "pydantic", "requests", "s3fs", "scipy.optimize", "sklearn.metrics",
    "torch.distributed.fsdp", "torch.nn.parallel", "tqdm", "transformers",
    "transformers.models.blip.modeling_blip", "yaml",
)  # fmt: skip
"""What workers import, at once or when they are first used; not Ray, which reads its settings when it is imported."""


@contextmanager
def preloaded() -> Iterator[None]:
    """Within it, Ray nodes that this process starts fork their workers."""
    import ray
    from ray._private.parameter import RayParams

    with tempfile.TemporaryDirectory(prefix="nsnet-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADDRESS, f"{folder}/socket")
        patch.setenv(RAYS_OWN, str(Path(ray.__file__).parent / "_private/workers/setup_worker.py"))
        patch.setattr(RayParams, "__init__", partialmethod(RayParams.__init__, setup_worker_path=LAUNCHER))
        with subprocess.Popen(
            [sys.executable, "-m", "tests.support.preloaded", f"{folder}/socket"],
            cwd=REPO_ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as server:
            assert server.stdin is not None and server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            try:
                yield
            finally:
                server.stdin.close()
            assert server.wait() == 0, "the process that forks workers ended too early: its output says why"


def processes_below(pid: int) -> list[psutil.Process]:
    """All processes below one, with the forks of its launchers."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            found.append(child)
            with suppress(psutil.NoSuchProcess):
                if child.name().startswith(NAME):
                    found.append(psutil.Process(int(child.name().removeprefix(NAME))))
    return found


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each launcher that connects, until standard input ends; returns in each fork alone, with its request.

    A launcher that is killed takes its fork along; one whose fork ends exits as that did.
    """
    stdin = sys.stdin.fileno()
    launchers: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(stdin, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == stdin:
                for pid in launchers:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                launcher, _ = listener.accept()
                data, files, _, _ = socket.recv_fds(launcher, MAX_REQUEST_BYTES, 3)
                if not data:  # it was killed
                    launcher.close()
                elif pid := os.fork():
                    launchers[pid] = launcher
                    selector.register(launcher, selectors.EVENT_READ, pid)
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                    for file in files:
                        os.close(file)
                    send(launcher, pid)
                else:
                    launcher.close()
                    leave(selector)
                    os.setpgid(0, 0)  # Ray kills the process group of a worker that it loses: not that of the tests
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                        os.close(file)
                    request: dict[str, Any] = json.loads(data)
                    return request
            elif isinstance(key.fileobj, socket.socket):
                if launchers.get(key.data) is key.fileobj:  # else its fork ended as well, in the same round
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
            else:
                selector.unregister(key.fd)
                os.close(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                launcher = launchers.pop(key.data)
                with suppress(KeyError):  # it was killed, and the fork for it
                    selector.unregister(launcher)
                send(launcher, status)
                launcher.close()


def send(launcher: socket.socket, number: int) -> None:
    with suppress(OSError):  # it was killed
        launcher.send(str(number).encode())


def leave(selector: selectors.BaseSelector) -> None:
    """Close, in a fork, what it has of the process that forked."""
    for key in list(selector.get_map().values()):
        if isinstance(key.fileobj, socket.socket):
            key.fileobj.close()
        else:
            os.close(key.fd)
    selector.close()


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray does for its processes
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(sys.argv[1])
    listener.listen(64)
    print("ready", flush=True)  # launchers wait for the rest, while the cluster starts
    for name in MODULES:
        importlib.import_module(name)
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()
    request = serve(listener)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    sys.argv = request["arguments"]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
