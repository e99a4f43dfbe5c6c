"""What the path of one image says of it: label, generator, split.

`0_real|1_fake`, `nature|ai`, `real|fake` folders are labels, the folder above is the generator, or that below where
there is none, `train`, `val` and `test` are splits. What needs the folders beside it is in `benchmarks`.
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
"""Plain name of the folder that GenImage's archives have between generator and split, as `imagenet_ai_0419_sdv4`."""
STABLE_DIFFUSION: Final = {word: re.compile(rf"(?:sd|stablediffusion)v?1?{word[-1]}") for word in ("sdv4", "sdv5")}
"""Last word of it -> plain names of its generator; the others are called like the word."""


class Labels(NamedTuple):
    """What folders say of an image; each None where they say nothing."""

    label: int | None
    generator: str | None
    split: str | None
    folder: str | None
    """The folders below the source that say it; None without a label, unless other folders may make it one."""


def labels_from_path(relative: str, source: str = "") -> Labels:
    """What the folders of a path below the source say.

    A partition as `generator=sdxl` says it. Else the generator is the last folder above the label that is no split;
    without one in the source, the folder below the label, as in `fake/sdxl`; else one of the source's own path. That
    says neither label nor split: who names a part of a data set wants this part, to be split anew.
    """
    return _labels(relative.rpartition("/")[0], source)


@lru_cache(maxsize=4096)
def _labels(folder: str, source: str) -> Labels:
    parts = split_path(folder)
    if places := undecided(parts):
        said = [_said(parts, range(place, place + 1), source) for place in places]
        generator = said[-1].generator if partitions(parts, "generator") else None
        return Labels(None, generator, said[-1].split, "/".join(parts[: max(one.end for one in said)]))
    run = label_run(parts)
    one = _said(parts, run, source)
    if not run:
        return Labels(None, one.generator, one.split, None)
    return Labels(LABEL_FOLDERS[parts[run.start].lower()], one.generator, one.split, "/".join(parts[: one.end]))


class _Said(NamedTuple):
    """What a path says beside its label."""

    generator: str | None
    split: str | None
    end: int
    """Number of the folders that say it, with those above them and the label."""
    is_below: bool
    """Whether the generator is a folder below the label."""


def _said(parts: Parts, run: range, source: str) -> _Said:
    """What the folders of a path say, of which those in `run` are the label; empty: there is none."""
    split, split_end = _split(parts, run)
    generator, generator_end, is_below = _generator_in(parts, run, source)
    return _Said(generator, split, max(run.stop, split_end, generator_end), is_below)


def _split(parts: Parts, run: range) -> tuple[str | None, int]:
    """The split, and the number of folders that end with the last one that says any."""
    if given := partitions(parts, "split"):
        return SPLIT_FOLDERS.get((given[max(given)] or "").lower()), max(given) + 1
    if splits := [place for place, part in enumerate(parts) if is_split(part)]:
        return SPLIT_FOLDERS[parts[splits[0]].lower()], splits[-1] + 1
    return next((split for place in run if (split := paired_split(parts[place]))), None), 0


def _generator_in(parts: Parts, run: range, source: str) -> tuple[str | None, int, bool]:
    """The generator, the number of folders that end with it (0: it lies above the label), whether it lies below."""
    if given := partitions(parts, "generator"):
        return given[max(given)], max(given) + 1, False
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
    """Folders of the source's own path, without those of a version: kagglehub fetches to `<name>/versions/7`."""
    path = re.sub(r"/versions/\d+(?=/|$)", "", source.partition("://")[2] or source)
    parts = split_path(re.sub(r"\.(tar|parquet)$", "", path, flags=re.IGNORECASE))
    named = partitions(parts, "generator")
    return tuple(named.get(place) or part for place, part in enumerate(parts))


def _generator(names: list[str]) -> str | None:
    """The last name; of GenImage's folder between the one above, if that is called like the generator in it."""
    if len(names) > 1 and (between := GENIMAGE_BETWEEN.fullmatch(_plain(names[-1]))):
        word = between[1]
        if STABLE_DIFFUSION.get(word, re.compile(word)).fullmatch(_plain(names[-2])):
            return names[-2]
    return names[-1] if names else None


def _plain(name: str) -> str:
    """Letters and digits of a name, small: there are `stable_diffusion_v_1_4` and `Stable-Diffusion v1.4`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
