"""Folders: what one name says, and what a source's folders say together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.dataset.benchmarks import MAX_GENERATORS, recognise
from jobs.dataset.folders import base, may_be_generator, partition
from jobs.dataset.labels import paired_label
from jobs.dataset.path_labels import labels_from_path, object_class

SOURCE = "/data/mine"
Labels = tuple[int | None, str | None, str | None]
"""Label, generator and split."""


def labels_by(*paths: str) -> dict[str, Labels]:
    """Path of an image -> what all these paths together say of it."""
    alone = {path: labels_from_path(path, SOURCE) for path in paths}
    layout = recognise({said.folder for said in alone.values() if said.folder}, SOURCE)
    labels: dict[str, Labels] = {}
    for path, said in alone.items():
        folder = said.folder or ""
        generator, split = layout.labels.get(folder, (said.generator, said.split))
        labels[path] = (layout.decided.get(folder, said.label), generator, split)
    return labels


def labels_of(*folders: str) -> list[int | None]:
    return [label for label, *_ in labels_by(*(f"{folder}/1.png" for folder in folders)).values()]


# One name.


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Human", 0), ("original", 0), ("photos", 0), ("Real Images", 0), ("train_real", 0), ("RealArt", 0),
        ("0-real-imgs", 0), ("real_pictures", 0), ("natural", 0), ("NATURE", 0),
        ("generated", 1), ("fake_images", 1), ("FakePictures", 1), ("AiArtData", 1), ("AI-Generated", 1),
        ("AIGenerated", 1), ("ai_generated_images", 1), ("synthetic", 1), ("deepfakes", 1), ("training_fake", 1),
        ("1_synthetic", 1),
        ("real_vs_fake", None), ("not_ai", None), ("images", None), ("train", None), ("0", None), ("1", None),
        ("sdxl", None), ("reality", None), ("tampered", None), ("art", None), ("", None),
    ],
)  # fmt: skip
def test_words_that_may_be_labels(name: str, label: int | None) -> None:
    assert paired_label(name) == label


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("label=0", ("label", "0")), ("Label=fake", ("label", "fake")), ("generator=a%20b%2Fc", ("generator", "a b/c")),
        ("split=__HIVE_DEFAULT_PARTITION__", ("split", None)), ("generator=", ("generator", None)),
        ("a=b=c", ("a", "b=c")), ("=a", None), ("label", None), ("1+1=2", None),
    ],
)  # fmt: skip
def test_partitions_are_read_as_hive_writes_them(name: str, expected: tuple[str, str | None] | None) -> None:
    assert partition(name) == expected


@pytest.mark.parametrize("name", ["sdxl", "Midjourney-V6", "coco", "sd1.5", "DALLE 3", "adm256", "四季"])
def test_folder_may_be_a_generator(name: str) -> None:
    assert may_be_generator(name)


@pytest.mark.parametrize(
    "name", ["000", "0001-2", "images", "part-00003", "shard_7", "a3", "256x256", "test", "date=1", "generated", "JPG"]
)
def test_folder_of_a_number_a_shard_or_a_kind_of_file_is_no_generator(name: str) -> None:
    assert not may_be_generator(name)
    assert labels_from_path(f"fake/{name}/1.png", SOURCE)[:2] == (1, "mine")


# Words beside each other.


@pytest.mark.parametrize(
    ("real", "fake"),
    [
        ("Human", "AI"), ("real", "generated"), ("human", "ai_generated"), ("authentic", "synthetic"),
        ("original", "deepfake"), ("photo", "generated"), ("real_images", "fake_images"), ("RealArt", "AiArtData"),
        ("train_real", "train_fake"), ("Real", "AI-generated"), ("natural", "ai"), ("nature", "synthetic"),
        ("REAL", "FAKE"), ("0_real", "1_fake"),
    ],
)  # fmt: skip
def test_both_of_two_siblings_are_labels(real: str, fake: str) -> None:
    assert labels_of(real, fake) == [0, 1]
    assert labels_of(f"train/{real}", f"test/{fake}") == [0, 1]  # one split may lack a class
    assert labels_of(f"sd/{real}/deep", f"sd/{fake}/er") == [0, 1]


@pytest.mark.parametrize(
    "folders",
    [
        ["human"], ["generated"], ["original", "tampered"], ["photo", "sketch", "cartoon"], ["human", "photo"],
        ["a/human", "b/generated"], ["cat/original", "dog/generated"], ["generated", "coco"],
    ],
)  # fmt: skip
def test_word_without_its_counterpart_is_no_label(folders: list[str]) -> None:
    assert labels_of(*folders) == [None] * len(folders)


def test_word_is_no_label_where_another_folder_of_the_path_is_one() -> None:
    labels = labels_by("human/real/1.png", "human/fake/1.png", "ai_images/real/1.png")
    assert list(labels.values()) == [(0, "human", None), (1, "human", None), (0, "ai_images", None)]
    assert labels_of("photo/generated", "photo/original", "sketch/generated") == [1, 0, None]
    assert labels_of("human/photo", "generated/photo", "generated/original") == [0, 1, 1]


def test_words_that_contradict_each_other_are_no_label() -> None:
    paths = ["human/generated", "human/original", "generated/x"]
    assert labels_of(*paths) == [None, 0, 1]


def test_labels_of_words_come_with_generator_and_split() -> None:
    assert labels_by("val/generated/sdxl/1.png", "val/real/coco/1.png", "sd/human/1.png", "sd/ai/1.png") == {
        "val/generated/sdxl/1.png": (1, "sdxl", "val"), "val/real/coco/1.png": (0, "coco", "val"),
        "sd/human/1.png": (0, "sd", None), "sd/ai/1.png": (1, "sd", None),
    }  # fmt: skip
    assert set(labels_by("train_real/1.png", "test_fake/1.png").values()) == {(0, "mine", "train"), (1, "mine", "test")}


# Generators below labels.


def test_folder_below_a_label_is_the_generator_where_none_is_above() -> None:
    assert labels_by("fake/midjourney/1.png", "test/fake/sdxl/v1/2.png", "real/coco/000/1.png", "real/1.png") == {
        "fake/midjourney/1.png": (1, "midjourney", None), "test/fake/sdxl/v1/2.png": (1, "sdxl", "test"),
        "real/coco/000/1.png": (0, "coco", None), "real/1.png": (0, "mine", None),
    }  # fmt: skip
    assert labels_by("sd/fake/cat/1.png")["sd/fake/cat/1.png"] == (1, "sd", None)


@pytest.mark.parametrize("label", ["fake", "generated"])
def test_too_many_folders_below_a_label_are_no_generators_and_that_is_said(label: str) -> None:
    paths = [f"{label}/person_{'abcdefghij'[i % 10]}{i}/train/1.png" for i in range(MAX_GENERATORS + 1)]
    assert set(labels_by(*paths, "real/1.png").values()) == {(1, "mine", "train"), (0, "mine", None)}
    few = labels_by(*paths[:-1], "real/1.png")
    assert len({generator for _, generator, _ in few.values()}) == MAX_GENERATORS + 1
    folders = {labels_from_path(path, SOURCE).folder or "" for path in [*paths, "real/1.png"]}
    (remark,) = recognise(folders, SOURCE).remarks
    assert remark == "the 201 folders below labels are too many for generators: none counts as a generator"


# Hive partitions.


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0", "1"], [0, 1]), (["fake", "Real"], [1, 0]), (["0", "1", "-1"], [0, 1, None]), (["1"], [1]),
        ([*map(str, range(10))], [None] * 10), (["0", "2"], [None, None]), (["cat", "fake"], [None, 1]),
        (["0", "__HIVE_DEFAULT_PARTITION__"], [0, None]),
    ],
)  # fmt: skip
def test_label_partitions_mean_what_all_their_values_mean(values: list[str], expected: list[int | None]) -> None:
    assert labels_of(*(f"label={value}" for value in values)) == expected
    assert labels_of(*(f"date=1/Label={value}/x=2" for value in values)) == expected


def test_partitions_without_a_label_are_said() -> None:
    folders = {labels_from_path(f"label={i}/1.png").folder or "" for i in range(10)}
    (remark,) = recognise(folders).remarks
    assert remark.startswith("folders label=0, label=1, label=2, label=3, label=4 and 5 more are neither real nor fake")
    assert recognise({"label=0", "label=1"}).remarks == ()


def test_partitions_say_generator_and_split() -> None:
    path = "split=test/generator=stable%20diffusion/label=1/part/1.png"
    assert labels_by(path)[path] == (1, "stable diffusion", "test")
    path = "train/sd/real/generator=coco/split=val/1.png"
    assert labels_by(path)[path] == (0, "coco", "val")
    assert labels_from_path("generator=sdxl/split=test/1.png")[:3] == (None, "sdxl", "test")
    assert labels_from_path("generator=__HIVE_DEFAULT_PARTITION__/fake/sdxl/1.png")[:2] == (1, None)
    assert labels_from_path("date=2026-01-01/fake/1.png", SOURCE)[:2] == (1, "mine")
    assert labels_from_path("fake/1.png", "/data/generator=sd%20xl/split=test")[:3] == (1, "sd xl", None)
    assert labels_from_path("split=later/fake/1.png").split is None


def test_label_partition_goes_before_words_and_contradicts_itself() -> None:
    assert labels_of("real/label=1", "real/label=0") == [1, 0]
    assert labels_of("label=0/label=1", "label=1/label=1") == [None, 1]


# All of it.

NAMES = [
    "train",
    "real",
    "fake",
    "human",
    "generated",
    "sdxl",
    "label=0",
    "label=1",
    "label=7",
    "generator=x",
    "split=val",
]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(NAMES), max_size=4).map("/".join), max_size=8))
def test_folder_says_all_that_is_known_of_its_images(folders: list[str]) -> None:
    for folder in folders:
        said = labels_from_path(f"{folder}/1.png", SOURCE)
        if said.folder is not None:
            assert labels_from_path(f"{said.folder}/2.jpg", SOURCE) == said
    labels = labels_by(*(f"{folder}/1.png" for folder in folders))
    assert labels == labels_by(*(f"{folder}/1.png" for folder in reversed(folders)))
    assert base(("A", "Train", "b")) == ("a", "b")


@pytest.mark.parametrize(
    ("path", "generator", "expected"),
    [
        ("progan/airplane/0_real/1.png", "progan", "airplane"), ("train/horse/1_fake/1.png", "ProGAN", "horse"),
        ("horse/train/1_fake/1.png", "ProGAN", None), ("sdxl/0_real/1.png", "sdxl", None),
        ("SDXL/1_fake/1.png", "sdxl", None), ("sdxl/0_real/dog/1.png", "sdxl", "dog"),
        ("sdxl/train/nature/dog/007/1.png", "sdxl", "dog"), ("fake/sdxl/cat/1.png", "sdxl", "cat"),
        ("fake/sdxl/1.png", "sdxl", None), ("0_real/1.png", None, None), ("mine/cat/1.png", None, None),
    ],
)  # fmt: skip
def test_object_class_is_the_folder_beside_the_label_that_is_nothing_else(
    path: str, generator: str | None, expected: str | None
) -> None:
    assert object_class(path, generator) == expected
