"""The metrics of a stream, from its progress board: the driver reports them, so that no worker has series of its own.

Counts of workers that died stay, and the number of series does not grow with the number of processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from jobs.telemetry import export, series
from jobs.telemetry.series import TABLE, Key
from nsnet import errors

DONE: Final = ""
"""In the place of an error class: the image passed the stage."""
CLASSES: Final = {name for name, value in vars(errors).items() if isinstance(value, type)}
"""Error classes that may be labels: one that an earlier run remembered comes from a file."""
OTHER: Final = "other"
STAGES: Final = {"prepared": "preparing", "captioned": "captioning", "embedded": "embedding", "scored": "scoring"}
"""Count of a progress line -> the stage that it counts."""
COUNTED: Final = {"fetched_bytes": series.FETCHED_BYTES, "requests_repeated": series.REQUESTS_REPEATED}
"""Count of the board -> its series."""


@dataclass(frozen=True)
class Snapshot:
    """What a board holds."""

    counts: dict[str, int]
    seconds: dict[str, float]
    """Seconds of processes, by stage."""
    images: dict[tuple[str, str], int]
    """Images by stage and error class, or `DONE`."""
    lines: list[str]
    """Lines for the console since the last snapshot."""
    added: dict[Key, float] = field(default_factory=dict)
    """Counters that workers report under their own names: those of a training."""
    put: dict[Key, float] = field(default_factory=dict)
    """Gauges, likewise."""
    measured: dict[str, int] = field(default_factory=dict)
    """Images that the seconds of a model stage were spent on."""


class StreamMetrics:
    """Reports the snapshots of one stream."""

    def __init__(self, work: str, total: int, counts: Sequence[str]) -> None:
        """`work`: verb of the stream, such as `score`. `counts`: those of its progress line, in their order."""
        self._work, self._total, self._counts = work, total, counts
        self._before: dict[tuple[str, Any], float] = {}

    def report(self, snapshot: Snapshot) -> None:
        """Report what came since the last snapshot, and what is waiting."""
        for (stage, error), grown in self._grown("images", snapshot.images):
            outcome, known = ("done", DONE) if error == DONE else ("failed", error if error in CLASSES else OTHER)
            export.add(series.IMAGES, grown, work=self._work, stage=stage, outcome=outcome, error_class=known)
        for stage, grown in self._grown("seconds", snapshot.seconds):
            export.add(series.STAGE_SECONDS, grown, work=self._work, stage=stage)
        for name, grown in self._grown("counts", {name: snapshot.counts.get(name, 0) for name in COUNTED}):
            export.add(COUNTED[name], grown, work=self._work)
        for (name, *labels), grown in self._grown("added", snapshot.added):
            export.add(TABLE[name], grown, **dict(zip(TABLE[name].labels, labels, strict=True)))
        for (name, *labels), value in snapshot.put.items():
            export.put(TABLE[name], value, **dict(zip(TABLE[name].labels, labels, strict=True)))
        arrived = self._total
        for name in self._counts:
            passed = min(self._total, snapshot.counts.get(name, 0))
            if name in STAGES:
                export.put(series.QUEUE_IMAGES, max(0, arrived - passed), work=self._work, stage=STAGES[name])
            arrived = passed
        export.put(series.PLANNED, self._total, work=self._work)
        export.put(series.DONE, arrived, work=self._work)

    def _grown(self, kind: str, values: Mapping[Any, float]) -> list[tuple[Any, float]]:
        """Keys whose values grew, and by how much. A board that was started again counts from 0."""
        grown = []
        for key, value in values.items():
            before = self._before.get((kind, key), 0)
            grown.append((key, value - before if value >= before else value))
            self._before[kind, key] = value
        return [(key, more) for key, more in grown if more > 0]
