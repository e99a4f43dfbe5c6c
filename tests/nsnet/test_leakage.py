"""Probes on planted classes: found where they are, not where they were removed, found where they are written back.

Costs 6 s of CPU.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import cho_factor

from nsnet import leakage as module
from nsnet.leakage import MAX_IMAGES, MIN_MEMBERS, RIDGE, caption_clusters, leakage, object_classes, probe
from nsnet.nullspace import project_per_sample, project_rank_k

Array = npt.NDArray[np.float64]

COUNT, DIM, CLASSES = 480, 32, 4
CLASS = np.arange(COUNT) % CLASSES
AXES = np.linalg.qr(np.random.default_rng(7).normal(size=(DIM, DIM)))[0].T
NAMED, HIDDEN, MEAN = AXES[:CLASSES], AXES[CLASSES : 2 * CLASSES], AXES[:CLASSES].sum(axis=0)
"""Directions of the classes, which captions name; directions that a mapper can write to; a mean of all images."""
CAPTIONS = NAMED[CLASS]


def noise(seed: int, dim: int = DIM) -> Array:
    return np.random.default_rng(seed).normal(size=(COUNT, dim))


def projected(u: Array, *directions: Array) -> Array:
    tensors = [torch.from_numpy(np.ascontiguousarray(direction)) for direction in directions]
    if len(tensors) == 1:
        return project_per_sample(torch.from_numpy(u), tensors[0]).numpy()
    return project_rank_k(torch.from_numpy(u), torch.stack(tensors, dim=1)).numpy()


def finds_nothing(features: Array) -> bool:
    found = probe(features, CLASS)
    assert found.low is not None and found.chance is not None
    return found.low <= found.chance  # without a signal, cross-validation is below chance as often as above


def test_class_is_found_in_u_not_after_its_removal_and_again_where_a_mapper_writes_it_back() -> None:
    u = 3.0 * CAPTIONS + noise(2)
    before = probe(u, CLASS)
    assert before.value is not None and before.value > 0.85 and before.chance == 0.25
    assert finds_nothing(projected(u, CAPTIONS))
    # v has its own direction for each class: a multiple of it, which names the class, is subtracted from u
    leaking = CAPTIONS + 2.0 * HIDDEN[CLASS]
    again = probe(projected(u, leaking), CLASS)
    assert again.value is not None and again.value > 0.8
    assert finds_nothing(projected(u, leaking, CAPTIONS))  # both directions of each image are removed


def test_projection_writes_the_caption_into_features_that_have_a_mean_but_no_class() -> None:
    """ũ = u − (u·v) v: where all images have a component along all captions, what is missing names the caption."""
    assert finds_nothing(3.0 * MEAN + noise(4))
    written = probe(projected(3.0 * MEAN + noise(4), CAPTIONS), CLASS)
    assert written.value is not None and written.value > 0.8


def test_report_names_what_each_feature_says() -> None:
    u = 3.0 * CAPTIONS + noise(2)
    labels = (CLASS % 2) ^ (np.arange(COUNT) % 7 == 0)  # the caption tells most of the labels
    found = leakage(
        u, projected(u, CAPTIONS), CAPTIONS + 0.01 * noise(3), labels=labels, classes=CLASS, clusters=CLASSES
    )
    for target in ("object_class", "caption_cluster"):  # captions are the classes here
        values = {name: one["value"] for name, one in found[target].items()}
        assert values["u"] > 0.85 and values["caption"] == 1.0 and values["projected"] < 0.35, target
        assert abs(found[target]["projected"]["permuted"] - 0.25) < 0.06
    assert 0.75 < found["label"]["value"] < 0.95 and found["label"]["chance"] == 0.5
    assert found["images"] == COUNT and 0.5 < found["residual_energy"] < 1.0


def test_report_without_captions_or_classes_says_so() -> None:
    u = noise(2)
    found = leakage(u, u, None, labels=CLASS % 2, classes=np.full(COUNT, -1))
    for one in (*found["object_class"].values(), *found["caption_cluster"].values(), found["label"]):
        assert (
            one["value"] is None
            and one["reason"] == f"0 classes have at least {MIN_MEMBERS} different images, 2 needed"
        )
    some = np.where(np.arange(COUNT)[:, None] < 200, CAPTIONS, np.nan)  # the others were not captioned
    found = leakage(u, u, some, labels=CLASS % 2, classes=CLASS)
    assert found["caption_cluster"]["u"]["images"] == 200 == found["label"]["images"]
    assert found["object_class"]["u"]["images"] == COUNT
    empty = leakage(u[:0], u[:0], None, labels=CLASS[:0], classes=CLASS[:0])
    assert empty["images"] == 0 and empty["residual_energy"] is None and empty["label"]["value"] is None


def test_copies_stay_in_one_fold() -> None:
    """A class drawn per image is nothing to find; where its copies are in other folds, the probe remembers it."""
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(COUNT // 4), 4)
    x, y = random.normal(size=(COUNT // 4, 256))[groups], random.integers(0, 2, COUNT // 4)[groups]
    apart, together = probe(x, y), probe(x, y, groups)
    assert apart.value is not None and apart.value > 0.95
    assert together.value is not None and together.low is not None and together.high is not None
    assert together.low < 0.5 < together.high and together.value < 0.65


def test_interval_is_that_of_the_share_of_correct_images() -> None:
    u = 1.2 * CAPTIONS + noise(2)
    found = probe(u, CLASS, samples=4000)
    assert found.value is not None and found.low is not None and found.high is not None
    deviation = (found.value * (1 - found.value) / COUNT) ** 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert found.low < found.value < found.high
    # images of a group are drawn together: as many independent draws as groups
    fewer = probe(np.repeat(u, 4, axis=0), np.repeat(CLASS, 4), np.repeat(np.arange(COUNT), 4), samples=4000)
    assert fewer.low is not None and fewer.high is not None
    assert fewer.high - fewer.low == pytest.approx(found.high - found.low, rel=0.15)


def test_discriminant_equals_its_formula() -> None:
    x, y = noise(2, 6), np.random.default_rng(3).integers(0, 3, COUNT)
    x += np.eye(6)[y]
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    means = np.stack([z[y == c].mean(axis=0) for c in range(3)])
    within = sum(np.outer(row - means[c], row - means[c]) for row, c in zip(z, y, strict=True)) / COUNT
    expected = np.linalg.inv(within + RIDGE * np.eye(6)) @ means.T
    weights, bias = module._discriminant(z, cho_factor(z.T @ z / COUNT + RIDGE * np.eye(6)), y, 3)
    np.testing.assert_allclose(weights, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(bias, [-0.5 * means[c] @ expected[:, c] for c in range(3)], rtol=1e-10)


def test_probe_depends_on_the_seed_alone_and_ignores_scale_and_constant_features() -> None:
    u = 1.5 * CAPTIONS + noise(2)
    found = probe(u, CLASS)
    assert probe(u.copy(), CLASS) == found != probe(u, CLASS, seed=1)
    padded = np.concatenate([u * 100.0 + 5.0, np.full((COUNT, 3), 7.0)], axis=1)
    assert probe(padded, CLASS).value == pytest.approx(found.value, abs=0.01)
    assert probe(np.zeros((COUNT, 2)), CLASS).value == pytest.approx(0.25)


def test_classes_of_different_sizes_count_the_same() -> None:
    """Nine of ten images are of one class: always saying it is right nine times of ten, and balanced 0.5."""
    y = (np.arange(COUNT) % 10 == 0).astype(int)
    found = probe(noise(2), y)
    assert found.low is not None and found.high is not None and found.low < 0.5 < found.high


@pytest.mark.parametrize("members", [MIN_MEMBERS - 1, MIN_MEMBERS])
def test_class_with_too_few_images_is_left_out(members: int) -> None:
    y = np.full(COUNT, -1)
    y[:40], y[40:80], y[80 : 80 + members] = 5, 9, 2
    found = probe(noise(2), y)
    assert (found.classes, found.images) == ((2, 80) if members < MIN_MEMBERS else (3, 80 + members))
    copies = np.arange(COUNT)
    copies[80 : 80 + members] = 80  # all the same
    assert probe(noise(2), y, copies).classes == 2


@pytest.mark.parametrize(
    ("features", "classes", "message"),
    [
        (np.zeros(3), np.zeros(3), "need features"), (np.zeros((3, 2)), np.zeros(2), "need features"),
        (np.full((3, 2), np.nan), np.zeros(3), "3 of 3 features are not finite"),
        (np.zeros((MAX_IMAGES + 1, 1)), np.zeros(MAX_IMAGES + 1), "at most 10000 images, got 10001: draw a sample"),
    ],
)  # fmt: skip
def test_what_a_probe_cannot_take_is_refused(features: Any, classes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(features, classes)


def test_clusters_are_those_of_the_captions_at_most_as_many_as_there_are() -> None:
    found = caption_clusters(np.where(np.arange(COUNT)[:, None] < 400, 5.0 * CAPTIONS, np.nan))
    assert (found[400:] == -1).all() and set(found[:400]) == set(range(CLASSES))
    assert len(set(zip(found[:400].tolist(), CLASS[:400].tolist(), strict=True))) == CLASSES
    assert caption_clusters(np.zeros((0, 3))).shape == (0,)


def test_names_of_classes_become_numbers() -> None:
    assert object_classes(["dog", None, "cat", "dog"]).tolist() == [1, -1, 0, 1]
