"""The process that forks guarded children. It imports the modules that they need and reads no untrusted data.

    python -I zygote.py '{"path": […], "service": "jobs.pipeline.decoding", "control": 5}'

A child is thus ready within milliseconds, without waiting for imports. `service` is a module with two functions:
`preload()` imports everything that a child will need (a child can open no file), and
`serve(requests, answers, settings)` runs in the child.

Commands arrive as JSON on the control socket; each gets an answer:

    {"fork": settings, "memory_bytes": n}   with two descriptors, for requests and answers   ->  {"pid": n}
    {"end": pid}                            kill this child                                  ->  {"status": n}

Children are reaped only on command, so that the kernel does not reuse their process ids earlier. When the control
socket closes because the parent has ended, this process exits, and the kernel kills its children.
"""

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1
MAX_COMMAND_BYTES: Final = 1 << 16


def main() -> None:
    """Execute commands until the control socket closes."""
    arguments = json.loads(sys.argv[1])
    sys.path[:] = arguments["path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all of its processes
    control = socket.socket(fileno=arguments["control"])
    service = importlib.import_module(arguments["service"])
    service.preload()
    control.send(json.dumps({"ready": True}).encode())
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, MAX_COMMAND_BYTES, 2)
        if not data:
            return
        command = json.loads(data)
        if "end" in command:
            os.kill(command["end"], signal.SIGKILL)
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(command["end"], 0)[1])}
        else:
            answer = {"pid": _fork(service, command, descriptors, control)}
            for descriptor in descriptors:
                os.close(descriptor)
        control.send(json.dumps(answer).encode())


def _fork(service: Any, command: dict[str, Any], descriptors: list[int], control: socket.socket) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        control.close()
        # a child must not outlive the zygote, even while its decoder hangs
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            _become_child(service, command, descriptors)
    finally:
        os._exit(0)


def _become_child(service: Any, command: dict[str, Any], descriptors: list[int]) -> None:
    from jobs.isolation import frames, sandbox

    for descriptor, target in zip(descriptors, (0, 1), strict=True):
        os.dup2(descriptor, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    requests, answers = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    sandbox.limit(command["memory_bytes"])
    frames.send(answers, {"ready": True, "unconfined": sandbox.confine()})
    service.serve(requests, answers, command["fork"])


if __name__ == "__main__":
    main()
