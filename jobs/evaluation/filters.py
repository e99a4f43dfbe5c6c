"""Select the verdicts to compare, by detector, split and transforms, or decide them by another threshold."""

from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs.console.output import say
from jobs.evaluation import groups
from nsnet.errors import ConfigError

EVERY_SPLIT: Final = "all"


def of_detector(table: pa.Table, detector_id: str | None, uri: str) -> pa.Table:
    """The verdicts of one detector. Raises `ConfigError` if there are none, or several detectors to choose from."""
    if detector_id is not None:
        table = table.filter(pc.equal(table.column("detector_id"), detector_id))
        if table.num_rows == 0:
            raise ConfigError(f"{uri} holds no verdict of detector {detector_id}")
    detectors = sorted(pc.unique(table.column("detector_id")).to_pylist(), key=str)
    if len(detectors) > 1:
        raise ConfigError(
            f"verdicts of several detectors ({', '.join(map(str, detectors))}): choose one with --detector-id"
        )
    return table


def of_split(table: pa.Table, split: str | None, uri: str) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of a split, and the `rows` entry of the result, whose `seen` names splits that training has used."""
    splits = table.column("split") if "split" in table.column_names else pa.array([None] * table.num_rows)
    present: set[Any] = set(pc.unique(splits).to_pylist())
    named = sorted(present - {None})
    chosen = ("test" if "test" in named else EVERY_SPLIT) if split is None else split
    if chosen == EVERY_SPLIT:
        # a benchmark may have only one split: then all rows belong to it
        only_split = named[0] if present == {*named} and len(named) == 1 else None
        return table, {"split": only_split, "used": table.num_rows, "left_out": 0, "seen": _seen(named)}
    if chosen not in named:
        available = f"choose from {', '.join(named)}" if named else "its rows have no split"
        raise ConfigError(f"{uri} holds no verdict of the split {chosen}: {available}")
    kept = table.filter(pc.equal(splits, chosen))
    say(f"rows: {kept.num_rows:,} of the split {chosen}; {table.num_rows - kept.num_rows:,} others are left out")
    left_out = table.num_rows - kept.num_rows
    return kept, {"split": chosen, "used": kept.num_rows, "left_out": left_out, "seen": _seen([chosen])}


def _seen(splits: Sequence[str]) -> list[str]:
    """The splits that training, or the choice of its threshold, has used."""
    return [name for name in splits if name in ("train", "val")]


def decided(table: pa.Table, threshold: float) -> pa.Table:
    """The same rows with verdicts by this threshold; none is uncertain."""
    verdicts = pc.if_else(pc.greater_equal(table.column("prob_fake"), threshold), "fake", "real")
    table = table.set_column(table.schema.get_field_index("verdict"), "verdict", verdicts)
    thresholds = pa.array([threshold] * table.num_rows, pa.float64())
    kept = table.drop_columns("threshold") if "threshold" in table.column_names else table
    return kept.append_column("threshold", thresholds)


def of_chains(table: pa.Table, chains: Sequence[str], uri: str) -> pa.Table:
    """The rows of untransformed images and of these transforms. Raises `ConfigError` if a transform has no rows."""
    present = groups.transforms_of(table)
    missing = [chain for chain in chains if chain not in set(pc.unique(present).to_pylist())]
    if missing:
        raise ConfigError(
            f"--align, --robustness: {uri} holds no verdicts under {', '.join(missing)}; give the source of the "
            "images, and --detector to score them"
        )
    return table.filter(pc.is_in(present, pa.array([groups.UNTRANSFORMED, *chains])))
