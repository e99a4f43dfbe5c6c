"""`nsnet score` on nodes that pretend to have GPUs: places are counted by GPUs, and models compute on the CPU."""

from dataclasses import replace
from typing import Any

from jobs.console import main
from jobs.pipeline import stream
from jobs.score import command


def _on_the_cpu(value: Any, **changes: Any) -> Any:
    return replace(value, **{name: "cpu" if name == "device" else change for name, change in changes.items()})


if __name__ == "__main__":
    stream.replace = _on_the_cpu  # type: ignore[attr-defined]
    main.program(command, "nsnet score")
