"""The process that stands for the program's driver: it runs the cases that it is given, one line each.

    python -m tests.fuzz.driver KIND FOLDER        stdin: a number a line; stdout: the outcome, as JSON, a line

Whatever code of a file could do is watched by an audit hook: unpickling, connections, programs, code from the folder.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Final

from tests.fuzz import ESCAPE

MORE_MEMORY: Final = 4 * 2**30
"""Address space beside what the process has when it begins."""
MAX_GROWTH_BYTES: Final = 2**28
"""Memory that one case may take of the driver."""
MAX_SECONDS: Final = 10.0
"""Of the driver's own computing, for one case."""
FORBIDDEN: Final = (
    "pickle.find_class", "socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn", "os.fork",
)  # fmt: skip


class Watch:
    """Notes what no file may make a process do."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self.active = False
        self.escapes: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        program = event == "subprocess.Popen" and arguments[0] != sys.executable  # the guard starts its processes
        code = event == "exec" and getattr(arguments[0], "co_filename", "").startswith(self._folder)
        bait = event == "open" and "bait" in str(arguments[0])
        if event in FORBIDDEN or program or code or bait:
            self.escapes.append(f"{event} {str(arguments)[:200]}")


def main() -> None:
    """The loop over cases."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    module = importlib.import_module(f"tests.fuzz.{kind}")
    watch = Watch(folder)
    with tempfile.TemporaryDirectory() as first, contextlib.suppress(Exception):
        module.write(0, Path(first))  # what is imported and built at first use
        module.run(Path(first))
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + MORE_MEMORY, resource.RLIM_INFINITY))
    before = _counts()
    for line in sys.stdin:
        seed = int(line)
        case = folder / str(seed)
        case.mkdir()
        module.write(seed, case)
        print(json.dumps(_result(module, watch, case)), file=answers, flush=True)
    module.close()
    left = {name: (was, now) for name, was in before.items() if (now := _counts()[name]) > was}
    print(json.dumps({"left": str(left or "")}), file=answers, flush=True)


def _result(module: Any, watch: Watch, case: Path) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted anew
    before, computed, begun = status("VmHWM"), time.process_time(), time.monotonic()
    failure, outcome, watch.escapes, watch.active = "", "failed", [], True
    try:
        outcome = module.run(case)
    except Exception:  # this is what is looked for
        failure = traceback.format_exc(limit=-12)
    watch.active = False
    peak, took = status("VmHWM"), time.process_time() - computed
    if made := [place for place in (ESCAPE, f"/{ESCAPE}") if os.path.exists(place)]:
        os.rmdir(made[0])
    if watch.escapes or made:
        failure += f"ESCAPE: {watch.escapes + made}"
    if peak - before > MAX_GROWTH_BYTES:
        failure += f"{(peak - before) / 2**20:.0f} MiB more memory"
    if took > MAX_SECONDS:
        failure += f"{took:.1f} s of computing"
    seconds = time.monotonic() - begun
    return {"outcome": outcome, "failure": failure, "grown": peak - before, "peak": peak, "seconds": seconds}


def status(name: str) -> int:
    """A number of bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _counts() -> dict[str, int]:
    """Open files and processes."""
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return {"files": len(os.listdir("/proc/self/fd")), "processes": sum(map(len, children))}


if __name__ == "__main__":
    main()
