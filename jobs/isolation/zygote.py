"""The process from which guarded children are forked: it has imported what they need, and reads nothing of strangers.

    python -I zygote.py '{"path": […], "service": "jobs.pipeline.decoding", "control": 5}'

A child is thus ready within milliseconds, with no import to wait for. `service` is a module with `preload()`, which
imports all that is needed later (a child can open no file), and `serve(requests, answers, settings)`.

Commands come as JSON on the control socket, each with an answer:

    {"fork": settings, "memory_bytes": n}   with two descriptors, for requests and answers   ->  {"pid": n}
    {"end": pid}                            kill this child                                  ->  {"status": n}

Children are reaped only on command, so that a process id that was given out is not used again before. At the end of the
control socket, when the parent is gone, this process ends, and the kernel ends its children.
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
    """The loop over commands."""
    given = json.loads(sys.argv[1])
    sys.path[:] = given["path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal goes to all of its processes
    control = socket.socket(fileno=given["control"])
    service = importlib.import_module(given["service"])
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
        # a child must not outlive the parent, not even inside a decoder that hangs
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            _become_child(service, command, descriptors)
    finally:
        os._exit(0)


def _become_child(service: Any, command: dict[str, Any], descriptors: list[int]) -> None:
    from jobs.isolation import frames, sandbox

    for descriptor, place in zip(descriptors, (0, 1), strict=True):
        os.dup2(descriptor, place)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    requests, answers = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    sandbox.limit(command["memory_bytes"])
    frames.send(answers, {"ready": True, "unconfined": sandbox.confine()})
    service.serve(requests, answers, command["fork"])


if __name__ == "__main__":
    main()
