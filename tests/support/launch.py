"""Start a Ray worker as Ray's `setup_worker.py` does, but as a fork of a process that has imported (`preloaded.py`):
importing torch and the models takes ten seconds for each worker.

A raylet runs this file by its path. It imports little, stays until the fork ends, ends as that does, and takes it along
when it is killed. A worker whose runtime environment sets more than variables and a folder is left to Ray, and so is
one whose variable `ADDRESS` is empty.
"""

import json
import os
import shlex
import signal
import socket
import sys
from typing import Any, Final, NoReturn

ADDRESS: Final = "NSNET_TESTS_PRELOADED"
"""Variable with the path of the socket of the process that forks."""
RAYS_OWN: Final = "NSNET_TESTS_SETUP_WORKER"
"""Variable with the path of Ray's own script."""
NAME: Final = "fork "
"""What the name of a launcher begins with; the process id of its fork follows."""
CONTEXT: Final = "--serialized-runtime-env-context="
LANGUAGE: Final = "--language="


def main(arguments: list[str]) -> None:
    context: dict[str, Any] = {}
    kept = []
    for argument in arguments:
        if argument.startswith(CONTEXT):
            context = json.loads(argument.removeprefix(CONTEXT) or "{}")
        elif argument.startswith(LANGUAGE):
            if argument != LANGUAGE + "PYTHON":
                leave_to_ray(arguments)
        else:
            kept.append(argument)
    environment = {**os.environ, **context.pop("env_vars", {})}
    folder = folder_of(context.pop("command_prefix", []))
    is_other = context.pop("py_executable", sys.executable) != sys.executable or any(context.values())
    if is_other or folder is None or not environment[ADDRESS]:
        leave_to_ray(arguments)
    request = {"arguments": kept, "environment": environment, "folder": folder}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        try:
            server.connect(os.environ[ADDRESS])
            socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
            pid = int(server.recv(64))
        except (OSError, ValueError):  # the process that forks has ended, which its parent reports
            leave_to_ray(arguments)
        with open("/proc/self/comm", "w") as name:
            name.write(f"{NAME}{pid}")
        status = int(server.recv(64) or b"1")
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


def folder_of(prefix: list[str]) -> str | None:
    """The folder where a worker starts, by what Ray puts before its command in a shell; None: it does more."""
    if not prefix:
        return os.getcwd()
    command, *folder, end = prefix
    return shlex.split(folder[0])[0] if (command, len(folder), end) == ("cd", 1, "&&") else None


def leave_to_ray(arguments: list[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, os.environ[RAYS_OWN], *arguments])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(sys.argv[1:])
