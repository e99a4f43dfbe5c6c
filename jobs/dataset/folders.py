"""Interpret folder names: a label, a split, a Hive partition, a generator, or nothing.

Some names are always labels (`LABEL_FOLDERS`). Others, such as `human` or `generated`, are ambiguous: they are labels
if a folder of the other label, such as `ai` or `real`, is beside them (`decide`).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import unquote

from jobs.dataset import labels
from jobs.dataset.labels import NOUNS, paired_label, words_of

LABEL_FOLDERS: Final = {
    "0_real": 0, "real": 0, "nature": 0, "1_fake": 1, "fake": 1, "ai": 1, "fakev2": 1, "fake-v2": 1,
}  # fmt: skip
"""Folder names that are always labels."""
NUMBERED: Final = frozenset({"0_real", "1_fake"})
"""Label folders of ForenSynths and of data sets with its layout."""
LABEL_NAMES: Final = ("real", "fake")
SPLIT_FOLDERS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

SHARDS: Final = frozenset("all batch chunk dir folder group misc other others part seed shard split sub subset".split())
"""Names, numbered or not, of folders that only divide a large number of files."""
SPLIT_WORDS: Final = {**SPLIT_FOLDERS, "training": "train", "testing": "test"}

SHORT: Final = re.compile(r"[0-9a-f]{1,2}|\d+x\d+")
"""Prefixes of hexadecimal names, and image sizes."""

PARTITION: Final = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
"""A partition folder of Hive or Spark."""
NO_VALUE: Final = "__HIVE_DEFAULT_PARTITION__"
MAX_SHOWN: Final = 5
CACHE_ENTRIES: Final = 2**16
"""Cache size for names and paths."""

Parts = tuple[str, ...]
"""Folders of a path below the source."""


class Decided(NamedTuple):
    """The label of a path and its position."""

    place: int
    """Index of the folder."""
    label: int


# One folder.


def partition(name: str) -> tuple[str, str | None] | None:
    """Lower-case key and unescaped value (None: null) of `key=value`; None: not a partition."""
    if "=" not in name or (match := PARTITION.fullmatch(name)) is None:
        return None
    return match[1].lower(), None if match[2] == NO_VALUE else labels.text(unquote(match[2]))


def is_split(name: str) -> bool:
    """Whether a folder's whole name is a split."""
    return name.lower() in SPLIT_FOLDERS


def paired_split(name: str) -> str | None:
    """The split within the name of a label folder such as `train_real`."""
    return next((SPLIT_WORDS[word] for word in words_of(name) if word in SPLIT_WORDS), None)


@lru_cache(maxsize=CACHE_ENTRIES)
def may_be_generator(name: str) -> bool:
    """Whether a folder below a label may name a generator: not a split, partition, number, shard or label."""
    if is_split(name) or partition(name) is not None or paired_label(name) is not None:
        return False
    words = [word.rstrip("0123456789") for word in words_of(name)]
    return not SHORT.fullmatch(name.lower()) and any(word and word not in NOUNS | SHARDS for word in words)


# The folders of one path.


def split_path(folder: str) -> Parts:
    """Split a path into its folders."""
    return tuple(part for part in folder.split("/") if part not in ("", "."))


def partitions(parts: Parts, key: str) -> dict[int, str | None]:
    """Index -> value of the partitions with this key."""
    if "=" not in "".join(parts):
        return {}
    pairs = {place: partition(name) for place, name in enumerate(parts)}
    return {place: pair[1] for place, pair in pairs.items() if pair is not None and pair[0] == key}


@lru_cache(maxsize=CACHE_ENTRIES)
def label_run(parts: Parts) -> range:
    """Indices of the last label folder and of those of the same label directly above it; empty: no label.

    Contradictory folders give no label, because a class of images may be called `nature`. Only `0_real` and `1_fake`
    still count then.
    """
    folder_labels = [LABEL_FOLDERS.get(part.lower()) for part in parts]
    if {0, 1} <= {*folder_labels}:
        folder_labels = [
            label if part.lower() in NUMBERED else None for part, label in zip(parts, folder_labels, strict=True)
        ]
        if {0, 1} <= {*folder_labels}:
            return range(0)
    start = stop = next((i + 1 for i in reversed(range(len(parts))) if folder_labels[i] is not None), 0)
    while start > 0 and folder_labels[start - 1] == folder_labels[stop - 1]:
        start -= 1
    return range(start, stop)


@lru_cache(maxsize=CACHE_ENTRIES)
def undecided(parts: Parts) -> Sequence[int]:
    """Indices of folders that are labels if the source's other folders agree (`decide`).

    These are `label=…` partitions; without these and without `LABEL_FOLDERS`, words such as `human`.
    """
    if places := [*partitions(parts, "label")]:
        return places
    if any(part.lower() in LABEL_FOLDERS for part in parts):
        return []
    return [place for place, part in enumerate(parts) if paired_label(part) is not None]


# All folders of a source.


def decide(paths: Collection[Parts]) -> tuple[dict[Parts, Decided], list[str]]:
    """Labels of the paths that need the source's other folders, and remarks for the user about folders without a label.

    All values of `label=…` partitions are interpreted together (`labels.meanings`). A word is a label if a folder of
    the other label is beside it; splits are ignored in this comparison, because one of them may lack a class.
    """
    values = {value for path in paths for value in partitions(path, "label").values() if value is not None}
    meanings = labels.meanings(values)
    labels_below: dict[Parts, set[int]] = defaultdict(set)
    for path in paths:
        for place, label in _words_of(path).items():
            labels_below[base(path[:place])].add(label)
    decided = {}
    for path in paths:
        place_labels: dict[int, int | None]
        if partition_values := partitions(path, "label"):
            place_labels = {place: (meanings or {}).get(value) for place, value in partition_values.items()}
        else:
            words = _words_of(path) if undecided(path) else {}
            place_labels = {
                place: word for place, word in words.items() if 1 - word in labels_below[base(path[:place])]
            }
        if len(distinct := {*place_labels.values()}) == 1 and (only := distinct.pop()) is not None:
            decided[path] = Decided(max(place_labels), only)
    return decided, _remarks(values, meanings or {})


def _remarks(values: set[str], meanings: Iterable[str]) -> list[str]:
    unknown = sorted(values - {*meanings})
    if not unknown:
        return []
    shown = ", ".join(f"label={value[:40]}" for value in unknown[:MAX_SHOWN])
    more = f" and {len(unknown) - MAX_SHOWN:,} more" if len(unknown) > MAX_SHOWN else ""
    return [f"folders {shown}{more} are neither real nor fake (0 and 1 alone, or words): their images have no label"]


def _words_of(path: Parts) -> dict[int, int]:
    """Index -> label of the folders of a path that are labels or may be labels."""
    if partitions(path, "label"):
        return {}
    if run := label_run(path):
        return {run.start: LABEL_FOLDERS[path[run.start].lower()]}
    return {place: label for place in undecided(path) if (label := paired_label(path[place])) is not None}


def base(parts: Parts) -> Parts:
    """Folders without splits, in lower case."""
    return tuple(part.lower() for part in parts if not is_split(part))


def lone_labels(paths: Iterable[Parts], decided: Mapping[Parts, Decided]) -> dict[Parts, int]:
    """Folder (`base`) whose label folders all have the same label -> that label."""
    labels_below: dict[Parts, set[int]] = defaultdict(set)
    for path in paths:
        words = _words_of(path) if label_run(path) else {}
        if path in decided and not partitions(path, "label"):
            words = {decided[path].place: decided[path].label}
        for place, label in words.items():
            labels_below[base(path[:place])].add(label)
    return {parent: below.pop() for parent, below in labels_below.items() if len(below) == 1}


def beside(lone: Mapping[Parts, int], unlabelled: Mapping[str, int]) -> list[str]:
    """Remarks for the user about images without a label beside folders of only one label (`lone_labels`).

    `unlabelled`: folder -> number of its images without a label.
    """
    counts: dict[Parts, Counter[str]] = defaultdict(Counter)
    for folder, count in sorted(unlabelled.items()):
        parts = split_path(folder)
        for place, name in enumerate(parts):
            if not is_split(name) and (parent := base(parts[:place])) in lone:
                counts[parent][name] += count
    remarks = []
    for parent, names in counts.items():
        where = f"in {'/'.join(parent)}" if parent else "at the top of the source"
        shown = [name[:40] for name, _ in names.most_common(MAX_SHOWN)] + ["…"] * (len(names) > MAX_SHOWN)
        remarks.append(
            f"{where}, only folders of {LABEL_NAMES[lone[parent]]} images are known: {names.total():,} images in "
            f"{', '.join(shown)} have no label; call the folders real and fake, or give labels in a manifest"
        )
    return remarks
