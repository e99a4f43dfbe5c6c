"""What folders say of the pictures in them: label, generator and split, in anybody's way and in that of the benchmarks.

Mostly one path is enough: `0_real|1_fake`, `nature|ai`, `real|fake` folders are labels, the folder above is the
generator, `train`, `val` and `test` are splits. ForenSynths and AIGIBench have classes of objects where the generator
should be, which only the folders beside it tell: `recognise` asks all of them, once a source is listed.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Final, NamedTuple

LABEL_FOLDERS: Final = {
    "0_real": 0, "real": 0, "nature": 0, "1_fake": 1, "fake": 1, "ai": 1, "fakev2": 1, "fake-v2": 1,
}  # fmt: skip
SPLIT_FOLDERS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

NUMBERED: Final = frozenset({"0_real", "1_fake"})
"""Label folders of ForenSynths and of all that took its layout over."""
OBJECTS: Final = frozenset(
    "airplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa tvmonitor bedroom church apple orange summer winter zebra".split()
)
"""Classes of objects in ForenSynths. There is one more, `train`: where others of them are beside it, it is no split."""
TRAINED: Final = frozenset({"car", "cat", "chair", "horse"})
"""The classes that AIGIBench, and most papers, train on."""
OBJECT_GENERATORS: Final = frozenset({"progan", "stylegan", "stylegan2", "cyclegan", "biggan", "gaugan", "stargan"})
"""Generators of ForenSynths, whose folders may hold classes."""
PROGAN: Final = "ProGAN"
"""Generator of all fakes that ForenSynths and AIGIBench have for training by classes; as AIGIBench's test names it."""

AIGIBENCH: Final = "AIGIBench"
FORENSYNTHS: Final = "ForenSynths"
UNIVERSAL: Final = "UniversalFakeDetect"
GENIMAGE: Final = "GenImage"
DALLE: Final = "DALLE Recognition"
BENCHMARKS: Final = {
    "aigibench": AIGIBENCH, "forensynths": FORENSYNTHS, "cnndetection": FORENSYNTHS, "universalfakedetect": UNIVERSAL,
    "genimage": GENIMAGE, "dallerecognition": DALLE,
}  # fmt: skip
"""Beginning of a folder's plain name -> the benchmark in it."""

DALL_E: Final = "DALL-E"
"""Generator of DALLE Recognition, after its name: no folder of it says one, and kagglehub puts it into one called 7."""
DALLE_FAKES: Final = ("fakev2", "fake-v2")
"""Folders, one in the other, that nobody else has."""

GENIMAGE_BETWEEN: Final = re.compile(r"imagenet(?:ai\d{4})?(biggan|vqdm|sdv4|sdv5|wukong|adm|glide|midjourney)")
"""Plain name of the folder that GenImage's archives have between generator and split, as `imagenet_ai_0419_sdv4`."""
STABLE_DIFFUSION: Final = {word: re.compile(rf"(?:sd|stablediffusion)v?1?{word[-1]}") for word in ("sdv4", "sdv5")}
"""Last word of it -> plain names of its generator; the others are called like the word."""

PAIRED_REALS: Final = {"guided": "imagenet", "ldm_*": "laion", "glide_*": "laion", "dalle": "laion"}
"""Diffusion sets of UniversalFakeDetect: folders with fakes only -> the one with the reals that they are compared with,
as in its `dataset_paths.py`."""


class Labels(NamedTuple):
    """What folders say of a picture; each None where they say nothing."""

    label: int | None
    generator: str | None
    split: str | None
    folder: str | None
    """The folders below the source that say it; None without a label."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a source was recognised as."""

    name: str | None = None
    """The benchmark, or benchmarks one after the other; None: none that is known."""
    labels: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """`Labels.folder` -> generator and split, where its own path says other ones."""


# One path.


def labels_from_path(relative: str, source: str = "") -> Labels:
    """What the folders of a path below the source say.

    The generator is the last folder above the label that is no split, which may be one of the source's own path. That
    says neither label nor split: who names a part of a data set wants this part, to be split anew.
    """
    return _labels(relative.rpartition("/")[0], source)


@lru_cache(maxsize=4096)
def _labels(folder: str, source: str) -> Labels:
    parts = _parts(folder)
    splits = [i for i, part in enumerate(parts) if part.lower() in SPLIT_FOLDERS]
    split = SPLIT_FOLDERS[parts[splits[0]].lower()] if splits else None
    run = _label_run(parts)
    if not run:
        return Labels(None, None, split, None)
    names = [name for name in (*_own_names(source), *parts[: run.start]) if name.lower() not in SPLIT_FOLDERS]
    told = "/".join(parts[: max(run.stop - 1, *splits, 0) + 1])
    return Labels(LABEL_FOLDERS[parts[run.start].lower()], _generator(names), split, told)


def _parts(folder: str) -> tuple[str, ...]:
    return tuple(part for part in folder.split("/") if part not in ("", "."))


@lru_cache(maxsize=16)
def _own_names(source: str) -> tuple[str, ...]:
    """Folders of the source's own path, without those of a version: kagglehub fetches to `<name>/versions/7`."""
    path = re.sub(r"/versions/\d+(?=/|$)", "", source.partition("://")[2] or source)
    return _parts(re.sub(r"\.tar$", "", path, flags=re.IGNORECASE))


def _label_run(parts: tuple[str, ...]) -> range:
    """Where the nearest label folder is, with those of the same label directly above it; empty: nowhere.

    Folders that contradict each other are no label: a class of pictures may be called `nature`. Only `0_real` and
    `1_fake` are never anything else.
    """
    labels = [LABEL_FOLDERS.get(part.lower()) for part in parts]
    if {0, 1} <= {*labels}:
        labels = [label if part.lower() in NUMBERED else None for part, label in zip(parts, labels, strict=True)]
        if {0, 1} <= {*labels}:
            return range(0)
    start = stop = next((i + 1 for i in reversed(range(len(parts))) if labels[i] is not None), 0)
    while start > 0 and labels[start - 1] == labels[stop - 1]:
        start -= 1
    return range(start, stop)


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


# All folders of a source.


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A folder with a label."""

    folder: str
    own: int
    """How many of the names are the source's own."""
    names: tuple[str, ...]
    """From the beginning of the source's path to the folder above the label."""
    run: tuple[str, ...]
    """The label's folders, small."""

    @property
    def child(self) -> str:
        """The folder that is the generator, or should be; small."""
        return self.names[-1].lower() if self.names else ""

    @property
    def family(self) -> tuple[str, ...]:
        """Those that it lies in."""
        return self.names[:-1]

    def split(self, but_child: bool = False) -> str | None:
        """The split below the source; `but_child`: that folder says none."""
        skipped = len(self.names) - 1 - self.own if but_child else None
        parts = [part.lower() for i, part in enumerate(_parts(self.folder)) if i != skipped]
        return next((SPLIT_FOLDERS[part] for part in parts if part in SPLIT_FOLDERS), None)


_Told = Iterator[tuple[_Place, str, str, str | None]]
"""Places with their benchmark, generator and split."""


def recognise(folders: Collection[str], source: str = "") -> Layout:
    """The benchmarks in a source, by all its folders that carry a label (`Labels.folder`) and by its own path."""
    own = _own_names(source)
    places = [_place(folder, own) for folder in sorted(folders)]
    names = {benchmark for place in places for name in place.names[-4:] if (benchmark := _benchmark(name))}
    if any(set(place.run) <= {"ai", "nature"} and place.child in SPLIT_FOLDERS for place in places):
        names.add(GENIMAGE)
    if paired_reals({place.child for place in places if set(place.run) <= NUMBERED}):
        names.add(UNIVERSAL)
    labels: dict[str, tuple[str, str | None]] = {}
    for found in (_by_objects(places), _of_dalle(places)):
        for place, benchmark, generator, split in found:
            names.add(benchmark)
            said = _labels(place.folder, source)
            if (generator, split) != (said.generator, said.split):
                labels[place.folder] = generator, split
    return Layout(name=", ".join(sorted(names)) or None, labels=labels)


def _place(folder: str, own: tuple[str, ...]) -> _Place:
    parts = _parts(folder)
    run = _label_run(parts)
    label = tuple(part.lower() for part in parts[run.start : run.stop])
    return _Place(folder=folder, own=len(own), names=(*own, *parts[: run.start]), run=label)


def _by_objects(places: list[_Place]) -> _Told:
    """Classes of objects where the generator should be: ForenSynths, and what AIGIBench has of it for training."""
    families: dict[tuple[str, ...], list[_Place]] = defaultdict(list)
    children: dict[tuple[tuple[str, ...], bool], set[str]] = defaultdict(set)
    for place in places:
        if place.child and set(place.run) <= NUMBERED:
            families[place.family].append(place)
            children[_base(place.family)].add(place.child)  # of all splits together: one of them may lack a class
    for family, members in families.items():
        beside = children[_base(family)]
        found = _object_generator(family, beside, inside=len(family) > members[0].own)
        if found is None:
            continue
        is_split = beside & (SPLIT_FOLDERS.keys() - {"train"})
        for place in members:
            if place.child in OBJECTS or (place.child == "train" and not is_split):
                yield place, *found, place.split(but_child=True)


def _object_generator(family: tuple[str, ...], beside: set[str], inside: bool) -> tuple[str, str] | None:
    """Benchmark and generator of the classes of objects that lie in a folder, which may lie in the source or above it.

    The folder itself is the generator, unless it is a benchmark or a split: such parts are ProGAN's. Strangers have
    horses and cars too, so that it takes the names of a benchmark or its choice of classes.
    """
    base, in_split = _base(family)
    objects, name = beside & OBJECTS, base[-1] if base else ""
    if not objects:
        return None
    if _plain(name) in OBJECT_GENERATORS:
        return FORENSYNTHS, name
    benchmark = _benchmark(name)
    with_diffusion = any(STABLE_DIFFUSION["sdv4"].fullmatch(_plain(child)) for child in beside)
    if benchmark in (AIGIBENCH, FORENSYNTHS) or (objects >= TRAINED and (in_split or with_diffusion)):
        return benchmark or (AIGIBENCH if objects == TRAINED else FORENSYNTHS), PROGAN
    if in_split or beside - OBJECTS - {"train"}:
        return None
    return (FORENSYNTHS, name) if objects >= TRAINED or (inside and len(objects) > 1) else None


def _of_dalle(places: list[_Place]) -> _Told:
    bases = {
        base
        for place in places
        if (base := _base(place.names)[0])
        and (place.run == DALLE_FAKES or (place.child, *place.run) == DALLE_FAKES or _benchmark(base[-1]) == DALLE)
    }
    for place in places:
        if _base(place.names)[0] in bases:
            yield place, DALLE, DALL_E, place.split()


def _base(names: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Names without the splits at their end, and whether there were any."""
    end = len(names)
    while end and names[end - 1].lower() in SPLIT_FOLDERS:
        end -= 1
    return names[:end], end < len(names)


def _benchmark(name: str) -> str | None:
    return next((benchmark for words, benchmark in BENCHMARKS.items() if _plain(name).startswith(words)), None)


def paired_reals(generators: Collection[str]) -> dict[str, str]:
    """Generator with fakes only -> the one whose reals it is compared with (`PAIRED_REALS`), where both are there.

    Names alone are asked: a generator with reals of its own needs no pair.
    """
    here = {name.lower(): name for name in sorted(generators)}
    return {
        fake: here[real]
        for fake in sorted(generators)
        for pattern, real in PAIRED_REALS.items()
        if fnmatchcase(fake.lower(), pattern) and real in here
    }
