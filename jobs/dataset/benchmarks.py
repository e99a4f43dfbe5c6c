"""Recognise the folder layout of a source: label, generator and split of its images, and known benchmarks.

One path is often enough (`path_labels`): `0_real|1_fake`, `nature|ai`, `real|fake` folders are labels, the folder above
is the generator (or the one below if none is above), `train`, `val` and `test` are splits. `recognise` handles layouts
that need all folders of a source: words such as `human` beside `ai`, partitions such as `label=0`, and the object
classes that ForenSynths and AIGIBench have in place of the generator.
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
from jobs.dataset.path_labels import STABLE_DIFFUSION, _generator, _is_name, _labels, _own_names, _plain, _read_path

MAX_GENERATORS: Final = 200
"""Maximum folders below labels that count as generators: data sets have tens of generators, but thousands of classes
or persons."""

OBJECTS: Final = frozenset(
    "airplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa tvmonitor bedroom church apple orange summer winter zebra".split()
)
"""Object classes in ForenSynths. `train` is one too: beside other classes it is not a split."""
TRAINED: Final = frozenset({"car", "cat", "chair", "horse"})
"""The classes that AIGIBench, and most papers, train on."""
OBJECT_GENERATORS: Final = frozenset({"progan", "stylegan", "stylegan2", "cyclegan", "biggan", "gaugan", "stargan"})
"""Generators of ForenSynths whose folders may hold object classes."""
PROGAN: Final = "ProGAN"
"""Generator of all class-wise training fakes in ForenSynths and AIGIBench; spelled as in AIGIBench's test set."""

AIGIBENCH: Final = "AIGIBench"
FORENSYNTHS: Final = "ForenSynths"
UNIVERSAL: Final = "UniversalFakeDetect"
GENIMAGE: Final = "GenImage"
DALLE: Final = "DALLE Recognition"
BENCHMARKS: Final = {
    "aigibench": AIGIBENCH, "forensynths": FORENSYNTHS, "cnndetection": FORENSYNTHS, "universalfakedetect": UNIVERSAL,
    "genimage": GENIMAGE, "dallerecognition": DALLE,
}  # fmt: skip
"""Prefix of a folder's plain name -> benchmark."""

DALL_E: Final = "DALL-E"
"""Generator of DALLE Recognition: its folders name none, and kagglehub stores it in a folder called 7."""
DALLE_FAKES: Final = ("fakev2", "fake-v2")
"""Nested folders that only DALLE Recognition has."""
PAIRED_REALS: Final = {"guided": "imagenet", "ldm_*": "laion", "glide_*": "laion", "dalle": "laion"}
"""Diffusion sets of UniversalFakeDetect: folder with fakes only -> folder with the reals to compare it with, as in its
`dataset_paths.py`."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The recognised layout of a source."""

    name: str | None = None
    """Names of the benchmarks, separated by commas; None: no known benchmark."""
    labels: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    """`Labels.folder` -> generator and split, if they differ from those of its own path."""
    decided: dict[str, int] = field(default_factory=dict)
    """`Labels.folder` -> label, if only all folders together determine it."""
    remarks: tuple[str, ...] = ()
    """Messages for the user about folders without a label or generator, with the reason."""
    lone: dict[Parts, int] = field(default_factory=dict, compare=False)
    """Folders whose label folders all have the same label (`folders.lone_labels`)."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A folder with a label."""

    folder: str
    own: int
    """How many of `names` belong to the source's own path."""
    names: tuple[str, ...]
    """Folders from the start of the source's path to the one above the label."""
    run: tuple[str, ...]
    """The label's folders, in lower case."""

    @property
    def child(self) -> str:
        """The folder in the generator's position, in lower case."""
        return self.names[-1].lower() if self.names else ""

    @property
    def family(self) -> tuple[str, ...]:
        """The folders that contain `child`."""
        return self.names[:-1]

    def split(self, but_child: bool = False) -> str | None:
        """The split named by a folder below the source; `but_child`: ignore the child folder."""
        skipped = len(self.names) - 1 - self.own if but_child else None
        parts = [part.lower() for i, part in enumerate(split_path(self.folder)) if i != skipped]
        return next((SPLIT_FOLDERS[part] for part in parts if part in SPLIT_FOLDERS), None)


_Recognised = Iterator[tuple[_Place, str, str, str | None]]
"""Places with their benchmark, generator and split."""


def recognise(folders: Collection[str], source: str = "") -> Layout:
    """Recognise the layout and the benchmarks of a source from all its folders (`Labels.folder`) and its own path."""
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
    for recognised in (_by_objects(places), _of_dalle(places)):
        for place, benchmark, generator, split in recognised:
            names.add(benchmark)
            from_path = _labels(place.folder, source)
            if (generator, split) != (from_path.generator, from_path.split):
                labels[place.folder] = generator, split
    return Layout(
        name=", ".join(sorted(names)) or None,
        labels=labels,
        decided={paths[path]: decision.label for path, decision in decided.items()},
        remarks=(*remarks, *more),
        lone=lone_labels(paths, decided),
    )


def _generators(
    paths: Mapping[Parts, str], decided: Mapping[Parts, Decided], source: str
) -> tuple[dict[str, tuple[str | None, str | None]], list[str]]:
    """Folder -> generator and split where they change, because its label was `decided` or because too many folders are
    below labels; and remarks.
    """
    changed, below = {}, {}
    for path, folder in paths.items():
        run = label_run(path)
        if undecided(path):
            if path not in decided:
                continue
            run = range(decided[path].place, decided[path].place + 1)
        path_says = _read_path(path, run, source)
        if path in decided and (path_says.generator, path_says.split) != _labels(folder, source)[1:3]:
            changed[folder] = path_says.generator, path_says.split
        if path_says.is_below:
            below[folder] = path_says
    count = len({path_says.generator for path_says in below.values()})
    if count <= MAX_GENERATORS:
        return changed, []
    own = _generator([*filter(_is_name, _own_names(source))])
    changed |= {folder: (own, path_says.split) for folder, path_says in below.items()}
    return changed, [f"the {count:,} folders below labels are too many for generators: none counts as a generator"]


def _place(folder: str, own: tuple[str, ...]) -> _Place:
    parts = split_path(folder)
    run = label_run(parts)
    label = tuple(part.lower() for part in parts[run.start : run.stop])
    return _Place(folder=folder, own=len(own), names=(*own, *parts[: run.start]), run=label)


def _by_objects(places: list[_Place]) -> _Recognised:
    """Places with an object class in the generator's position: ForenSynths, and AIGIBench's training part of it."""
    families: dict[tuple[str, ...], list[_Place]] = defaultdict(list)
    children: dict[tuple[tuple[str, ...], bool], set[str]] = defaultdict(set)
    for place in places:
        if place.child and set(place.run) <= NUMBERED:
            families[place.family].append(place)
            children[_base(place.family)].add(place.child)  # of all splits together, as one may lack a class
    for family, members in families.items():
        children_beside = children[_base(family)]
        benchmark_and_generator = _object_generator(family, children_beside, inside=len(family) > members[0].own)
        if benchmark_and_generator is None:
            continue
        is_split = children_beside & (SPLIT_FOLDERS.keys() - {"train"})
        for place in members:
            if place.child in OBJECTS or (place.child == "train" and not is_split):
                yield place, *benchmark_and_generator, place.split(but_child=True)


def _object_generator(family: tuple[str, ...], beside: set[str], inside: bool) -> tuple[str, str] | None:
    """Benchmark and generator of a folder that holds object classes; the folder may be in the source or above it.

    The folder itself is the generator, unless it is a benchmark or a split: then the generator is ProGAN. Other data
    sets have horses and cars too, so a benchmark's name or its set of classes is required.
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


def _of_dalle(places: list[_Place]) -> _Recognised:
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
    """Names without trailing splits, and whether there were any."""
    end = len(names)
    while end and names[end - 1].lower() in SPLIT_FOLDERS:
        end -= 1
    return names[:end], end < len(names)


@lru_cache(maxsize=4096)
def _benchmark(name: str) -> str | None:
    plain = _plain(name)
    return next((benchmark for words, benchmark in BENCHMARKS.items() if plain.startswith(words)), None)


def paired_reals(generators: Collection[str]) -> dict[str, str]:
    """Generator with fakes only -> generator with the reals to compare it with (`PAIRED_REALS`), if both are present.

    Compares names only, without checking whether a generator has reals of its own.
    """
    present = {name.lower(): name for name in sorted(generators)}
    return {
        fake: present[real]
        for fake in sorted(generators)
        for pattern, real in PAIRED_REALS.items()
        if fnmatchcase(fake.lower(), pattern) and real in present
    }
