"""Layouts: what a path says of an image (label, generator and split), in anybody's way and in that of the benchmarks.

Mostly one path is enough: `0_real|1_fake`, `nature|ai`, `real|fake` folders are labels, the folder above is the
generator, or that below where there is none, `train`, `val` and `test` are splits. What needs the folders beside it,
`recognise` finds out once a source is listed: words as `human` beside `ai`, partitions as `label=0`, and the classes of
objects that ForenSynths and AIGIBench have where the generator should be.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Final

from jobs.dataset.folders import (
    NUMBERED,
    SPLIT_FOLDERS,
    Decided,
    Parts,
    decide,
    label_run,
    lone_labels,
    split_path,
    undecided,
)
from jobs.dataset.path_labels import STABLE_DIFFUSION, _generator, _is_name, _labels, _own_names, _plain, _said

MAX_GENERATORS: Final = 200
"""Folders below labels that are generators; data sets have tens, and thousands of classes or persons."""

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
PAIRED_REALS: Final = {"guided": "imagenet", "ldm_*": "laion", "glide_*": "laion", "dalle": "laion"}
"""Diffusion sets of UniversalFakeDetect: folders with fakes only -> the one with the reals that they are compared with,
as in its `dataset_paths.py`."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a source was recognised as."""

    name: str | None = None
    """The benchmark, or benchmarks one after the other; None: none that is known."""
    labels: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    """`Labels.folder` -> generator and split, where its own path says other ones."""
    decided: dict[str, int] = field(default_factory=dict)
    """`Labels.folder` -> label, where only all folders together say it."""
    remarks: tuple[str, ...] = ()
    """What folders do not say, and why; for people."""
    lone: dict[Parts, int] = field(default_factory=dict, compare=False)
    """Folders that hold label folders of one label only (`folders.lone_labels`)."""


# One path.


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
        parts = [part.lower() for i, part in enumerate(split_path(self.folder)) if i != skipped]
        return next((SPLIT_FOLDERS[part] for part in parts if part in SPLIT_FOLDERS), None)


_Told = Iterator[tuple[_Place, str, str, str | None]]
"""Places with their benchmark, generator and split."""


def recognise(folders: Collection[str], source: str = "") -> Layout:
    """What all folders of a source (`Labels.folder`) say together, and the benchmarks in them and in its own path."""
    paths = {split_path(folder): folder for folder in sorted(folders)}
    decided, remarks = decide(paths)
    labels, more = _generators(paths, decided, source)
    own = _own_names(source)
    places = [_place(folder, own) for path, folder in paths.items() if label_run(path) and not undecided(path)]
    names = {benchmark for place in places for name in place.names[-4:] if (benchmark := _benchmark(name))}
    if any(set(place.run) <= {"ai", "nature"} and place.child in SPLIT_FOLDERS for place in places):
        names.add(GENIMAGE)
    if paired_reals({place.child for place in places if set(place.run) <= NUMBERED}):
        names.add(UNIVERSAL)
    for found in (_by_objects(places), _of_dalle(places)):
        for place, benchmark, generator, split in found:
            names.add(benchmark)
            said = _labels(place.folder, source)
            if (generator, split) != (said.generator, said.split):
                labels[place.folder] = generator, split
    return Layout(
        name=", ".join(sorted(names)) or None,
        labels=labels,
        decided={paths[path]: found.label for path, found in decided.items()},
        remarks=(*remarks, *more),
        lone=lone_labels(paths, decided),
    )


def _generators(
    paths: Mapping[Parts, str], decided: Mapping[Parts, Decided], source: str
) -> tuple[dict[str, tuple[str | None, str | None]], list[str]]:
    """Folder -> generator and split, of what was `decided` and where too many lie below labels; remarks."""
    changed, below = {}, {}
    for path, folder in paths.items():
        run = label_run(path)
        if undecided(path):
            if path not in decided:
                continue
            run = range(decided[path].place, decided[path].place + 1)
        said = _said(path, run, source)
        if path in decided and (said.generator, said.split) != _labels(folder, source)[1:3]:
            changed[folder] = said.generator, said.split
        if said.is_below:
            below[folder] = said
    count = len({said.generator for said in below.values()})
    if count <= MAX_GENERATORS:
        return changed, []
    own = _generator([*filter(_is_name, _own_names(source))])
    changed |= {folder: (own, said.split) for folder, said in below.items()}
    return changed, [f"the {count:,} folders below labels are too many for generators: none is taken for one"]


def _place(folder: str, own: tuple[str, ...]) -> _Place:
    parts = split_path(folder)
    run = label_run(parts)
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


@lru_cache(maxsize=4096)
def _benchmark(name: str) -> str | None:
    plain = _plain(name)
    return next((benchmark for words, benchmark in BENCHMARKS.items() if plain.startswith(words)), None)


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
