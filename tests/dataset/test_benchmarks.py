"""Layouts: what one path says, the benchmarks of the field from any of their folders, and strangers left alone."""

from collections.abc import Callable, Collection, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.dataset.benchmarks import (
    AIGIBENCH,
    DALLE,
    FORENSYNTHS,
    GENIMAGE,
    OBJECTS,
    PAIRED_REALS,
    UNIVERSAL,
    Layout,
    paired_reals,
    recognise,
)
from jobs.dataset.folders import LABEL_FOLDERS
from jobs.dataset.path_labels import labels_from_path

Labels = tuple[str | None, str | None]
"""Generator and split."""

# One path.

PATHS: dict[str, tuple[int | None, str | None, str | None]] = {
    # AIGIBench's test part
    "test/Midjourney-V6/1_fake/1.png": (1, "Midjourney-V6", "test"),
    "val/sdv1.4/1_fake/1.png": (1, "sdv1.4", "val"),
    # GenImage, as it is copied about and as it is unpacked
    "ADM/train/nature/1.JPEG": (0, "ADM", "train"),
    "ADM/val/ai/1.PNG": (1, "ADM", "val"),
    "Midjourney/imagenet_midjourney/train/ai/1.png": (1, "Midjourney", "train"),
    "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4/val/nature/1.JPEG": (0, "stable_diffusion_v_1_4", "val"),
    "SDv1.5/imagenet_ai_0424_sdv5/val/ai/1.png": (1, "SDv1.5", "val"),
    "wukong/imagenet_ai_0424_wukong/train/AI/1.png": (1, "wukong", "train"),
    "GenImage/imagenet_glide/train/ai/1.png": (1, "imagenet_glide", "train"),  # none above that is called like it
    "stable_diffusion_v_1_5/imagenet_ai_0419_sdv4/train/ai/1.png": (1, "imagenet_ai_0419_sdv4", "train"),
    "Midjourney/imagenet_mine/train/ai/1.png": (1, "imagenet_mine", "train"),
    "imagenet_glide/imagenet/train/ai/1.png": (1, "imagenet", "train"),
    # UniversalFakeDetect, ForenSynths
    "progan/airplane/1_fake/1.png": (1, "airplane", None),  # one path alone cannot know
    "biggan/0_real/1.png": (0, "biggan", None),
    "ldm_200/1_fake/1.png": (1, "ldm_200", None),
    # DALLE Recognition and its namesake
    "real/1.jpg": (0, "root", None),
    "fakeV2/fake-v2/1.jpg": (1, "root", None),
    "fakeV2/1.jpg": (1, "root", None),
    "mine/fake-v2/1.jpg": (1, "mine", None),
    "test/fake/1.jpg": (1, "root", "test"),
    # labels and splits in any order and case
    "validation/REAL/1.jpg": (0, "root", "val"),
    "Valid/0_Real/1.jpg": (0, "root", "val"),
    "sd/real/test/deeper/1.jpg": (0, "sd", "test"),
    # what contradicts itself is no label; a class of images may be called like one
    "Nature/AI/1.jpg": (None, None, None),
    "real/sd/fake/1.jpg": (None, None, None),
    "0_real/sd/1_fake/1.jpg": (None, None, None),
    "sd/1_fake/nature/1.jpg": (1, "sd", None),
    "test/sd/0_real/ai/deeper/1.jpg": (0, "sd", "test"),
    "fake/deeper/fake-v2/1.jpg": (1, "deeper", None),
    "./sd//1_fake/./1.jpg": (1, "sd", None),
    # nothing said
    "1.jpg": (None, None, None),
    "train/cat/1.jpg": (None, None, "train"),
    "1_fake": (None, None, None),  # a file
    "a/real.jpg": (None, None, None),
}


@pytest.mark.parametrize("path", PATHS)
def test_folders_say_label_generator_and_split(path: str) -> None:
    assert labels_from_path(path, "/data/root")[:3] == labels_from_path(path, "s3://root")[:3] == PATHS[path]


@pytest.mark.parametrize(
    ("source", "generator"),
    [
        ("", None),
        ("/", None),
        ("s3://bucket", "bucket"),
        ("s3://bucket/sd", "sd"),
        ("/data/sd/train", "sd"),  # a split is no generator
        ("/data/stable_diffusion_v_1_4/imagenet_ai_0419_sdv4", "stable_diffusion_v_1_4"),
        ("/data/glide/imagenet_glide/train", "glide"),
        ("/cache/owner/faces/versions/12", "faces"),
        ("/cache/owner/faces/versions/12/test", "faces"),
        ("/data/versions/new", "new"),
    ],
)
def test_source_is_the_generator_where_no_folder_is(source: str, generator: str | None) -> None:
    assert labels_from_path("real/1.jpg", source) == (0, generator, None, "real")
    assert labels_from_path("1.jpg", source) == (None, None, None, None)


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("train/car/0_real/deep/er/1.png", "train/car/0_real"),
        ("real/deep/test/er/1.png", "real/deep/test"),
        ("./a//Fake/1.png", "a/Fake"),
        ("fakeV2/fake-v2/1.png", "fakeV2/fake-v2"),
        ("train/1.png", None),
    ],
)
def test_folder_of_labels_holds_all_that_says_them_and_no_more(path: str, folder: str | None) -> None:
    labels = labels_from_path(path, "/s")
    assert labels.folder == folder
    if folder is not None:
        assert labels_from_path(f"{folder}/x", "/s") == labels


# Benchmarks: folder -> generator and split.

LSUN = sorted(OBJECTS - {"bedroom", "church", "apple", "orange", "summer", "winter", "zebra"} | {"train"})
SETS = {
    "progan": LSUN, "stylegan": ["bedroom", "car", "cat"], "stylegan2": ["car", "cat", "church", "horse"],
    "cyclegan": ["apple", "horse", "orange", "summer", "winter", "zebra"], "biggan": [""], "deepfake": [""],
}  # fmt: skip
DIFFUSION = ["guided", "ldm_200", "ldm_200_cfg", "ldm_100", "glide_100_27", "glide_50_27", "glide_100_10", "dalle"]
ARCHIVES = {
    "stable_diffusion_v_1_4": "imagenet_ai_0419_sdv4", "stable_diffusion_v_1_5": "imagenet_ai_0424_sdv5",
    "Midjourney": "imagenet_midjourney", "ADM": "imagenet_ai_0508_adm", "wukong": "imagenet_ai_0424_wukong",
    "glide": "imagenet_glide", "VQDM": "imagenet_ai_0419_vqdm", "BigGAN": "imagenet_ai_0419_biggan",
}  # fmt: skip


def labelled(
    parts: list[str], generator: str | None, split: str | None, labels: Collection[str] = ("0_real", "1_fake")
) -> dict[str, Labels]:
    return {"/".join(filter(None, [*parts, label])): (generator, split) for label in labels}


def merged(parts: Iterator[dict[str, Labels]]) -> dict[str, Labels]:
    return {folder: labels for part in parts for folder, labels in part.items()}


def aigibench() -> Iterator[dict[str, Labels]]:
    for split in ("train", "val"):
        for name in ("car", "cat", "chair", "horse", "sdv1.4"):
            yield labelled([split, name], "ProGAN" if name != "sdv1.4" else name, split)
    for name in ("ProGAN", "R3GAN", "Midjourney-V6", "DALLE-3", "SocialRF"):
        yield labelled(["test", name], name, "test")


def forensynths() -> Iterator[dict[str, Labels]]:
    for name in LSUN:
        yield labelled(["train", name], "ProGAN", "train")
        yield labelled(["val", name], "ProGAN", "val")
    for generator, classes in SETS.items():
        for name in classes:
            yield labelled(["test", generator, name], generator, "test")


def universal() -> Iterator[dict[str, Labels]]:
    for name in LSUN:
        yield labelled(["datasets/train/progan", name], "progan", "train")
    for generator, classes in SETS.items():
        for name in classes:
            yield labelled(["datasets/test", generator, name], generator, "test")
    for name in DIFFUSION:
        yield labelled(["diffusion_datasets", name], name, None, ["1_fake"])
    for name in ("imagenet", "laion"):
        yield labelled(["diffusion_datasets", name], name, None, ["0_real"])


def genimage(archives: bool) -> Iterator[dict[str, Labels]]:
    for generator, archive in ARCHIVES.items():
        for split in ("train", "val"):
            yield labelled([generator, archive if archives else "", split], generator, split, ["ai", "nature"])


BENCHMARKS: dict[str, tuple[str, str, dict[str, Labels]]] = {
    "AIGIBench": ("/data/AIGIBench", AIGIBENCH, merged(aigibench())),
    "Setting-I": (
        "/data/AIGIBench", AIGIBENCH, {f: labels for f, labels in merged(aigibench()).items() if "sdv" not in f},
    ),
    "ForenSynths": ("s3://bucket/ForenSynths", FORENSYNTHS, merged(forensynths())),
    "UniversalFakeDetect": ("/data/UniversalFakeDetect", UNIVERSAL, merged(universal())),
    "GenImage": ("/data/GenImage", GENIMAGE, merged(genimage(archives=False))),
    "GenImage unpacked": ("/data/GenImage", GENIMAGE, merged(genimage(archives=True))),
    "DALLE Recognition": (
        "/cache/dalle-recognition-dataset/versions/7", DALLE,
        {"real": ("DALL-E", None), "fakeV2/fake-v2": ("DALL-E", None)},
    ),
    "namesake": (
        "/data/dalle-recognition-dataset", DALLE,
        labelled(["train"], "DALL-E", "train", ["real", "fake"]) | labelled(["test"], "DALL-E", "test", ["real"]),
    ),
}  # fmt: skip


def labels_by(folders: Collection[str], source: str) -> tuple[str | None, dict[str, Labels]]:
    """Name of the layout, and generator and split of each folder."""
    layout = recognise(folders, source)
    labels: dict[str, Labels] = {}
    for folder in folders:
        said = labels_from_path(f"{folder}/1.png", source)
        assert said.folder == folder
        assert layout.labels.get(folder) != (said.generator, said.split)  # only what differs
        labels[folder] = layout.labels.get(folder, (said.generator, said.split))
    assert layout.labels.keys() <= set(folders)
    return layout.name, labels


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_benchmark_says_generator_and_split(benchmark: str) -> None:
    source, name, expected = BENCHMARKS[benchmark]
    found, labels = labels_by(expected, source)
    assert labels == expected
    assert found is not None and name in found.split(", ")


@pytest.mark.parametrize("benchmark", ["AIGIBench", "ForenSynths", "UniversalFakeDetect", "GenImage unpacked"])
def test_folders_alone_suffice_where_the_source_has_a_name_of_its_own(benchmark: str) -> None:
    _, name, expected = BENCHMARKS[benchmark]
    found, labels = labels_by(expected, "/data/mine")
    assert labels == expected
    assert found is not None and name in found


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_folder_of_a_benchmark_is_recognised_as_the_whole_is(benchmark: str) -> None:
    """From every folder that may be the source, above the labels, but for a class `train` without others beside it."""
    source, _, whole = BENCHMARKS[benchmark]
    folders = {folder.rsplit("/", i)[0] for folder in whole for i in range(1, folder.count("/") + 1)}
    folders -= {folder for folder in folders if folder.endswith(("train/train", "val/train", "progan/train"))}
    for part in folders:
        below = {folder[len(part) + 1 :]: labels for folder, labels in whole.items() if folder.startswith(f"{part}/")}
        _, labels = labels_by(below, f"{source}/{part}")
        assert {folder: generator for folder, (generator, _) in labels.items()} == {
            folder: generator for folder, (generator, _) in below.items()
        }
        if any(name in part.split("/") for name in ("train", "val", "test")):
            assert {split for _, split in labels.values()} == {None}  # what is asked for is a part: it is one whole


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("change", [str.upper, str.lower, str.title])
def test_case_of_folders_does_not_matter(benchmark: str, change: Callable[[str], str]) -> None:
    source, name, expected = BENCHMARKS[benchmark]
    changed = {change(folder): labels for folder, labels in expected.items()}
    found, labels = labels_by(changed, source)
    assert found is not None and name in found
    small = {folder: ((generator or "").lower(), split) for folder, (generator, split) in labels.items()}
    assert small == {folder: ((generator or "").lower(), split) for folder, (generator, split) in changed.items()}


def test_several_benchmarks_side_by_side_are_all_recognised() -> None:
    tree: dict[str, Labels] = {}
    for benchmark in ("AIGIBench", "ForenSynths", "GenImage unpacked"):
        source, _, expected = BENCHMARKS[benchmark]
        tree |= {f"{source.rpartition('/')[2]}/{folder}": labels for folder, labels in expected.items()}
    name, labels = labels_by(tree, "/data")
    assert labels == tree and name == "AIGIBench, ForenSynths, GenImage"


def test_training_part_under_another_name_is_known_by_what_is_beside_its_classes() -> None:
    whole = [folder[len("train/") :] for folder in merged(aigibench()) if folder.startswith("train/")]
    expected = {folder: ("sdv1.4" if folder.startswith("sdv") else "ProGAN", None) for folder in whole}
    assert labels_by(whole, "/data/mine") == (AIGIBENCH, expected)
    classes = {folder for folder in whole if not folder.startswith("sdv")}
    assert labels_by(classes, "/data/mine") == (FORENSYNTHS, dict.fromkeys(classes, ("mine", None)))  # whose are they?


def test_class_train_is_a_split_again_without_other_classes() -> None:
    assert labels_by(["progan/train/0_real", "progan/val/1_fake"], "/data/mine")[1] == {
        "progan/train/0_real": ("progan", "train"), "progan/val/1_fake": ("progan", "val"),
    }  # fmt: skip
    beside = ["progan/train/0_real", "progan/airplane/0_real"]
    assert set(labels_by(beside, "/data/mine")[1].values()) == {("progan", None)}
    among_splits = [*beside, "progan/test/0_real"]
    assert labels_by(among_splits, "/data/mine")[1]["progan/train/0_real"] == ("progan", "train")


def test_split_below_a_class_is_kept() -> None:
    folders = ["progan/cat/0_real/test", "progan/train/0_real/test", "progan/train/1_fake"]
    labels = labels_by(folders, "/data")[1]
    assert labels == dict(zip(folders, [("progan", "test"), ("progan", "test"), ("progan", None)], strict=True))


def test_generator_that_nobody_knows_may_have_classes_too() -> None:
    folders = [f"newgan/{name}/{label}" for name in ("cat", "horse", "train") for label in ("0_real", "1_fake")]
    assert set(labels_by(folders, "/data/mine")[1].values()) == {("newgan", None)}


STRANGERS: dict[str, list[str]] = {
    "nothing": [],
    "pets by split": [f"{split}/{pet}/{label}" for split in ("train", "test") for pet in ("cat", "dog")
                      for label in ("0_real", "1_fake")],
    "pets": ["cat/0_real", "cat/1_fake", "dog/0_real", "dog/1_fake"],
    "one pet below a name": ["mine/horse/0_real", "mine/horse/1_fake"],
    "a train and a car": ["mine/train/0_real", "mine/test/1_fake", "mine/car/0_real"],
    "a train and other things": ["mine/train/0_real", "mine/car/0_real", "mine/cat/0_real", "mine/sofas/1_fake"],
    "other label folders": [f"train/{name}/{label}" for name in ("car", "cat", "chair", "horse")
                            for label in ("real", "fake")],
    "generators": ["sd/real", "sd/fake-v2", "glide/real", "glide/fake"],
    "laion alone": ["laion/0_real", "imagenet/0_real"],
    "stable diffusion alone": ["train/sdv1.4/0_real", "train/sdv1.4/1_fake"],
}  # fmt: skip


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_left_alone(stranger: str) -> None:
    assert recognise(STRANGERS[stranger], "/data/mine") == Layout()


WORDS = [
    "train",
    "test",
    "sd",
    "0_real",
    "1_fake",
    "real",
    "fakeV2",
    "ai",
    "horses",
    "Midjourney",
    "imagenet_midjourney",
]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=4), max_size=12))
def test_without_classes_every_path_speaks_for_itself(paths: list[list[str]]) -> None:
    folders = {
        folder for path in paths if (folder := labels_from_path("/".join([*path, "1.png"]), "/data/mine").folder)
    }
    assert recognise(folders, "/data/mine").labels == {}


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([*WORDS, *SETS, *LSUN]), max_size=5), max_size=20))
def test_order_of_folders_does_not_matter(paths: list[list[str]]) -> None:
    folders = [
        folder for path in paths if (folder := labels_from_path("/".join([*path, "1.png"]), "/data/mine").folder)
    ]
    labels_by(set(folders), "/data/mine")
    assert recognise(folders, "/data/mine") == recognise(folders[::-1] + folders, "/data/mine")


# Reals of another folder.


def test_fakes_of_universal_fake_detect_are_paired_with_its_reals() -> None:
    reals = {name: "laion" if name != "guided" else "imagenet" for name in DIFFUSION}
    assert paired_reals([*DIFFUSION, "imagenet", "laion", "progan", "dalle2"]) == reals
    assert paired_reals([*DIFFUSION, "imagenet"]) == {"guided": "imagenet"}
    assert paired_reals(["guided", "progan"]) == paired_reals(["laion"]) == paired_reals([]) == {}


def test_pairs_are_called_as_they_are_written() -> None:
    assert paired_reals({"LDM_200", "Laion", "Dalle"}) == {"LDM_200": "Laion", "Dalle": "Laion"}


def test_reals_of_the_table_are_no_fakes_of_it() -> None:
    assert not set(PAIRED_REALS.values()) & set(PAIRED_REALS)
    assert all(name == name.lower() for name in LABEL_FOLDERS)
