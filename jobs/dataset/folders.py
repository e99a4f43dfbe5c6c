"""What the name of one folder says: a label, a split, a Hive partition, a generator, or nothing.

Some names are labels wherever they stand (`LABEL_FOLDERS`). Others, as `human` or `generated`, may be anything: they
are labels where a folder of the other label stands beside them, as `ai` or `real`, which `decide` finds out.
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
"""Folders that are labels by themselves."""
NUMBERED: Final = frozenset({"0_real", "1_fake"})
"""Label folders of ForenSynths and of all that took its layout over."""
LABEL_NAMES: Final = ("real", "fake")
SPLIT_FOLDERS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

SHARDS: Final = frozenset("all batch chunk dir folder group misc other others part seed shard split sub subset".split())
"""Names, numbered or not, of what was divided for its number only."""
SPLIT_WORDS: Final = {**SPLIT_FOLDERS, "training": "train", "testing": "test"}

SHORT: Final = re.compile(r"[0-9a-f]{1,2}|\d+x\d+")
"""Beginnings of hexadecimal names, and sizes."""

PARTITION: Final = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
"""A folder as Hive and Spark name them."""
PARTITION_KEYS: Final = frozenset({"label", "generator", "split"})
NO_VALUE: Final = "__HIVE_DEFAULT_PARTITION__"
MAX_SHOWN: Final = 5
REMEMBERED: Final = 2**16
"""Names or paths of which it is remembered what they say."""

Parts = tuple[str, ...]
"""Folders of a path, from the source on."""


class Decided(NamedTuple):
    """Where the label of a path stands."""

    place: int
    """Number of the folder."""
    label: int


# One folder.


def partition(name: str) -> tuple[str, str | None] | None:
    """Key, small, and value of `key=value`, as Hive escapes it; no value: null. None: it is no partition."""
    if "=" not in name or (found := PARTITION.fullmatch(name)) is None:
        return None
    return found[1].lower(), None if found[2] == NO_VALUE else labels.text(unquote(found[2]))


def is_split(name: str) -> bool:
    """Whether a folder is a split by itself."""
    return name.lower() in SPLIT_FOLDERS


def paired_split(name: str) -> str | None:
    """The split that the name of such a folder holds, as `train_real` does."""
    return next((SPLIT_WORDS[word] for word in words_of(name) if word in SPLIT_WORDS), None)


@lru_cache(maxsize=REMEMBERED)
def may_be_generator(name: str) -> bool:
    """Whether a folder below a label may be named after a generator: no split, partition, number, shard or label."""
    if is_split(name) or partition(name) is not None or paired_label(name) is not None:
        return False
    words = [word.rstrip("0123456789") for word in words_of(name)]
    return not SHORT.fullmatch(name.lower()) and any(word and word not in NOUNS | SHARDS for word in words)


# The folders of one path.


def split_path(folder: str) -> Parts:
    """The folders of a path."""
    return tuple(part for part in folder.split("/") if part not in ("", "."))


def partitions(parts: Parts, key: str) -> dict[int, str | None]:
    """Place -> value of the partitions of a key."""
    if "=" not in "".join(parts):
        return {}
    found = {place: partition(name) for place, name in enumerate(parts)}
    return {place: said[1] for place, said in found.items() if said is not None and said[0] == key}


@lru_cache(maxsize=REMEMBERED)
def label_run(parts: Parts) -> range:
    """Where the nearest label folder is, with those of the same label directly above it; empty: nowhere.

    Folders that contradict each other are no label: a class of images may be called `nature`. Only `0_real` and
    `1_fake` are never anything else.
    """
    said = [LABEL_FOLDERS.get(part.lower()) for part in parts]
    if {0, 1} <= {*said}:
        said = [label if part.lower() in NUMBERED else None for part, label in zip(parts, said, strict=True)]
        if {0, 1} <= {*said}:
            return range(0)
    start = stop = next((i + 1 for i in reversed(range(len(parts))) if said[i] is not None), 0)
    while start > 0 and said[start - 1] == said[stop - 1]:
        start -= 1
    return range(start, stop)


@lru_cache(maxsize=REMEMBERED)
def undecided(parts: Parts) -> Sequence[int]:
    """Places of folders that are labels if the other folders of the source agree (`decide`).

    These are `label=…` partitions; without one, and without a folder that is a label by itself, words as `human`.
    """
    if found := [*partitions(parts, "label")]:
        return found
    if any(part.lower() in LABEL_FOLDERS for part in parts):
        return []
    return [place for place, part in enumerate(parts) if paired_label(part) is not None]


# All folders of a source.


def decide(paths: Collection[Parts]) -> tuple[dict[Parts, Decided], list[str]]:
    """The labels of those paths that cannot say them alone, and remarks on what gives none, for people.

    `label=…` partitions mean what all their values together mean (`labels.meanings`). A word is a label where a folder
    of the other label stands beside it; splits are looked through, since one of them may lack a class.
    """
    values = {value for path in paths for value in partitions(path, "label").values() if value is not None}
    meanings = labels.meanings(values)
    here: dict[Parts, set[int]] = defaultdict(set)
    for path in paths:
        for place, label in _words_of(path).items():
            here[base(path[:place])].add(label)
    decided = {}
    for path in paths:
        found: dict[int, int | None]
        if given := partitions(path, "label"):
            found = {place: (meanings or {}).get(value) for place, value in given.items()}
        else:
            words = _words_of(path) if undecided(path) else {}
            found = {place: word for place, word in words.items() if 1 - word in here[base(path[:place])]}
        if len(said := {*found.values()}) == 1 and (only := said.pop()) is not None:
            decided[path] = Decided(max(found), only)
    return decided, _remarks(values, meanings or {})


def _remarks(values: set[str], meanings: Iterable[str]) -> list[str]:
    strange = sorted(values - {*meanings})
    if not strange:
        return []
    shown = ", ".join(f"label={value[:40]}" for value in strange[:MAX_SHOWN])
    more = f" and {len(strange) - MAX_SHOWN:,} more" if len(strange) > MAX_SHOWN else ""
    return [f"folders {shown}{more} are neither real nor fake (0 and 1 alone, or words): their images have no label"]


def _words_of(path: Parts) -> dict[int, int]:
    """Place -> label of the words of a path that are one, or may be one."""
    if partitions(path, "label"):
        return {}
    if run := label_run(path):
        return {run.start: LABEL_FOLDERS[path[run.start].lower()]}
    return {place: label for place in undecided(path) if (label := paired_label(path[place])) is not None}


def base(parts: Parts) -> Parts:
    """Folders without splits, small."""
    return tuple(part.lower() for part in parts if not is_split(part))


def lone_labels(paths: Iterable[Parts], decided: Mapping[Parts, Decided]) -> dict[Parts, int]:
    """Folder (`base`) that holds label folders of one label only -> that label."""
    found: dict[Parts, set[int]] = defaultdict(set)
    for path in paths:
        words = _words_of(path) if label_run(path) else {}
        if path in decided and not partitions(path, "label"):
            words = {decided[path].place: decided[path].label}
        for place, label in words.items():
            found[base(path[:place])].add(label)
    return {parent: said.pop() for parent, said in found.items() if len(said) == 1}


def beside(lone: Mapping[Parts, int], unlabelled: Mapping[str, int]) -> list[str]:
    """Remarks for people on images without a label beside folders of one label (`lone_labels`).

    `unlabelled`: folder -> images in it that have no label.
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
