"""Read label, generator and split of one image from its path.

`0_real|1_fake`, `nature|ai`, `real|fake` folders are labels, the folder above is the generator (or the one below if
none is above), `train`, `val` and `test` are splits. `benchmarks` handles layouts that need other folders too.
"""

import re
from functools import lru_cache
from typing import Final, NamedTuple

from jobs.dataset.folders import (
    LABEL_FOLDERS,
    SPLIT_FOLDERS,
    Parts,
    is_split,
    label_run,
    may_be_generator,
    paired_split,
    partition,
    partitions,
    split_path,
    undecided,
)

GENIMAGE_BETWEEN: Final = re.compile(r"imagenet(?:ai\d{4})?(biggan|vqdm|sdv4|sdv5|wukong|adm|glide|midjourney)")
"""Plain name of the folder between generator and split in GenImage's archives, such as `imagenet_ai_0419_sdv4`."""
STABLE_DIFFUSION: Final = {word: re.compile(rf"(?:sd|stablediffusion)v?1?{word[-1]}") for word in ("sdv4", "sdv5")}
"""Last word of that folder -> plain names of its generator; for other words the generator's name is the word."""


class Labels(NamedTuple):
    """Label, generator and split from an image's folders; None: the folders do not determine it."""

    label: int | None
    generator: str | None
    split: str | None
    folder: str | None
    """The folders below the source that determine them; None without a label, unless other folders may decide it."""


def labels_from_path(relative: str, source: str = "") -> Labels:
    """Read the labels from the folders of a path below the source.

    A partition such as `generator=sdxl` comes first. Else the generator is the last folder above the label that is not
    a split; without one in the source, the folder below the label, as in `fake/sdxl`; else a folder of the source's own
    path. The source's own path gives neither label nor split: a user who names a part of a data set wants only that
    part, split anew.
    """
    return _labels(relative.rpartition("/")[0], source)


@lru_cache(maxsize=4096)
def _labels(folder: str, source: str) -> Labels:
    parts = split_path(folder)
    if places := undecided(parts):
        readings = [_read_path(parts, range(place, place + 1), source) for place in places]
        generator = readings[-1].generator if partitions(parts, "generator") else None
        return Labels(None, generator, readings[-1].split, "/".join(parts[: max(reading.end for reading in readings)]))
    run = label_run(parts)
    reading = _read_path(parts, run, source)
    if not run:
        return Labels(None, reading.generator, reading.split, None)
    return Labels(
        LABEL_FOLDERS[parts[run.start].lower()], reading.generator, reading.split, "/".join(parts[: reading.end])
    )


def object_class(relative: str, generator: str | None) -> str | None:
    """Read the object class of an image from the folders of its path below the source; None: they name none.

    It is the last folder directly above the label or below it that is neither the generator, a split, a partition, a
    number nor a shard: `airplane` in `progan/airplane/0_real/1.png`, whose generator is `progan`.
    """
    parts = split_path(relative.rpartition("/")[0])
    run = label_run(parts)
    beside = [*parts[max(0, run.start - 1) : run.start], *parts[run.stop :]] if run else []
    known = (generator or "").lower()
    return next((part for part in reversed(beside) if may_be_generator(part) and part.lower() != known), None)


class _PathReading(NamedTuple):
    """Generator and split from a path."""

    generator: str | None
    split: str | None
    end: int
    """Number of leading folders up to the last one that is label, generator or split."""
    is_below: bool
    """Whether the generator is a folder below the label."""


def _read_path(parts: Parts, run: range, source: str) -> _PathReading:
    """Read generator and split from the folders of a path; those in `run` are the label (empty: no label)."""
    split, split_end = _split(parts, run)
    generator, generator_end, is_below = _generator_in(parts, run, source)
    return _PathReading(generator, split, max(run.stop, split_end, generator_end), is_below)


def _split(parts: Parts, run: range) -> tuple[str | None, int]:
    """The split, and the number of leading folders up to the last one that names a split."""
    if values := partitions(parts, "split"):
        return SPLIT_FOLDERS.get((values[max(values)] or "").lower()), max(values) + 1
    if splits := [place for place, part in enumerate(parts) if is_split(part)]:
        return SPLIT_FOLDERS[parts[splits[0]].lower()], splits[-1] + 1
    return next((split for place in run if (split := paired_split(parts[place]))), None), 0


def _generator_in(parts: Parts, run: range, source: str) -> tuple[str | None, int, bool]:
    """The generator, the number of leading folders up to it (0: it is above the label), and whether it is below."""
    if values := partitions(parts, "generator"):
        return values[max(values)], max(values) + 1, False
    if not run:
        return None, 0, False
    inside = [part for part in parts[: run.start] if _is_name(part)]
    below = next((place for place in range(run.stop, len(parts)) if _is_name(parts[place])), None)
    if not inside and below is not None and may_be_generator(parts[below]):
        return parts[below], below + 1, True
    return _generator([*filter(_is_name, _own_names(source)), *inside]), 0, False


def _is_name(part: str) -> bool:
    return not is_split(part) and partition(part) is None


@lru_cache(maxsize=16)
def _own_names(source: str) -> Parts:
    """Folders of the source's own path without version folders: kagglehub downloads to `<name>/versions/7`."""
    path = re.sub(r"/versions/\d+(?=/|$)", "", source.partition("://")[2] or source)
    parts = split_path(re.sub(r"\.(tar|parquet)$", "", path, flags=re.IGNORECASE))
    named = partitions(parts, "generator")
    return tuple(named.get(place) or part for place, part in enumerate(parts))


def _generator(names: list[str]) -> str | None:
    """The last name; for GenImage's folder below a generator, the name above it if both name the same generator."""
    if len(names) > 1 and (between := GENIMAGE_BETWEEN.fullmatch(_plain(names[-1]))):
        word = between[1]
        if STABLE_DIFFUSION.get(word, re.compile(word)).fullmatch(_plain(names[-2])):
            return names[-2]
    return names[-1] if names else None


def _plain(name: str) -> str:
    """Letters and digits of a name in lower case: equal for `stable_diffusion_v_1_4` and `Stable-Diffusion v1.4`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
