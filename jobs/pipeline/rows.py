"""Rows between stages, as dictionaries and Arrow tables; failed rows; and the progress that stages report."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import pyarrow as pa

from jobs.pipeline.metrics import DONE
from jobs.storage.redaction import without_secrets
from nsnet.errors import ImageError

LEASE_POLL_SECONDS: Final = 0.25
RowDicts = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ProgressReporter:
    """Reports progress of stages to the `jobs.pipeline.progress.Board` of this name."""

    board_name: str | None = None

    def passed(self, stage: str, entered: int, errors: Sequence[str], **counts: int) -> None:
        """Report images that reached a stage, and the error classes of those that failed in it; and add to the counts.

        Call it once per block, not per image.
        """
        images = Counter((stage, error) for error in errors)
        images[stage, DONE] = entered - len(errors)
        self._add({**counts, "failed": len(errors)}, dict(images))

    def _add(self, counts: dict[str, int], images: dict[tuple[str, str], int]) -> None:
        if self.board_name is not None:
            board(self.board_name).add.remote(counts, images)

    def spend(self, images: int = 0, /, **seconds: float) -> None:
        """Add to the board's seconds by stage (`bottleneck`), and to the images that they were spent on, without
        waiting.
        """
        if self.board_name is not None:
            board(self.board_name).spend.remote(seconds, images)

    def lease(self, seconds: float) -> float:
        """Seconds granted to a slow image (`poison.Budget`), at most `seconds`; waits while others lease the rest."""
        if self.board_name is None:
            return seconds
        import ray  # not at the top: models are also measured on machines without Ray

        while (answer := ray.get(board(self.board_name).lease.remote(seconds))) is None:
            time.sleep(LEASE_POLL_SECONDS)
        return float(answer)

    def settle(self, leased: float, good: float, slow: float) -> None:
        """As `Budget.settle`, without waiting."""
        if self.board_name is not None:
            board(self.board_name).settle.remote(leased, good, slow)


@cache
def board(name: str) -> Any:
    """Handle of the board of this name."""
    import ray

    return ray.get_actor(name)


def failed(row: dict[str, Any], error: ImageError) -> dict[str, Any]:
    """The row, marked as failed."""
    return {
        **row,
        "status": "failed",
        "error_stage": error.stage,
        "error_class": type(error).__name__,
        "error_message": without_secrets(str(error))[:1000],
    }


def to_table(
    rows: RowDicts, schema: pa.Schema, columns: Mapping[str, pa.Array | pa.ChunkedArray] | None = None
) -> pa.Table:
    """Rows as a table of exactly this schema; missing values become null, other keys are dropped.

    `columns`: whole columns, which are not copied; each must be in the schema.
    """
    columns = columns or {}
    table = pa.Table.from_pylist(rows, schema=pa.schema([field for field in schema if field.name not in columns]))
    for name, values in columns.items():
        table = table.append_column(schema.field(name), values)
    return table.select(schema.names)
