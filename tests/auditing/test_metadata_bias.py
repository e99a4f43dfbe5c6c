"""What metadata alone tell: nothing where there is nothing, planted rules by name, undefined for too few images."""

from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from jobs.auditing import inventory, metadata_bias
from jobs.auditing.metadata_bias import BOUND, CAUSES, SINGLE, clustered_auroc, measure, metadata

Columns = dict[str, Any]


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules planted here are plain, and the tests many."""
    monkeypatch.setattr(metadata_bias, "TREES", 10)


def drawn(n: int, seed: int = 0) -> Columns:
    """Images of which every second is a fake, and whose metadata say nothing of it."""
    rng = np.random.default_rng(seed)
    width = rng.integers(200, 2000, n)
    height = (width * rng.choice([0.75, 1.0, 1.5], n)).astype(int)
    return {
        "label": np.arange(n) % 2,
        "width": width,
        "height": height,
        "size_bytes": (width * height * np.exp(rng.normal(-1.5, 0.4, n))).astype(int),
        "format": np.full(n, "JPEG", dtype=object),
        "jpeg_quality": rng.choice([75.0, 85.0, 90.0, 95.0], n),
    }


def table(columns: Columns) -> pa.Table:
    """Columns as rows of `inventory.IMAGES`, all of which could be read."""
    n = len(columns["label"])
    whole = {**dict.fromkeys(inventory.IMAGES.names, [None] * n), "uri": list("u" * n), "status": ["scored"] * n}
    whole |= {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    fields = [pa.array(whole[field.name], field.type) if isinstance(whole[field.name], list)
              else whole[field.name].cast(field.type) for field in inventory.IMAGES]  # fmt: skip
    return pa.table(fields, schema=inventory.IMAGES)


def measured(columns: Columns, groups: NDArray[np.int64] | None = None, seed: int = 0) -> dict[str, Any]:
    rows = table(columns)
    return measure(metadata(rows, np.arange(rows.num_rows) if groups is None else groups), seed)


def fakes(columns: Columns) -> NDArray[np.bool_]:
    return np.asarray(columns["label"] == 1)


# The number and its error.


def pairwise(labels: NDArray[Any], scores: NDArray[Any]) -> NDArray[np.float64]:
    """(fakes, reals): 1 where the fake has the higher score, ½ where it is the same."""
    some, other = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return np.asarray((some > other) + 0.5 * (some == other))


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    for reals, fake, decimals in product((1, 2, 30), (1, 3, 40), (0, 3)):
        labels = rng.permutation(np.repeat([0, 1], [reals, fake]))
        scores = np.round(rng.normal(0, 1, len(labels)) + labels, decimals)
        auroc, error = clustered_auroc(labels, scores, np.arange(len(labels)))
        assert auroc == pytest.approx(pairwise(labels, scores).mean(), abs=1e-12)
        assert error >= 0


def test_error_without_duplicates_is_that_of_delong() -> None:
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 1], [500, 400]))
    scores = np.round(rng.normal(0, 1, 900) + labels, 1)
    pairs = pairwise(labels, scores)
    expected = pairs.mean(axis=1).var(ddof=1) / 400 + pairs.mean(axis=0).var(ddof=1) / 500
    _, error = clustered_auroc(labels, scores, rng.permutation(900))
    assert error**2 == pytest.approx(expected, rel=0.01)  # the two differ in n − 1 of each class against that of all


def test_error_is_the_spread_of_the_auroc_over_draws_of_groups() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(400):
        group = np.repeat(np.arange(60), 4)
        labels, offset = np.arange(240) // 4 % 2, rng.normal(0, 1, 60)
        found.append(clustered_auroc(labels, labels + offset[group] + rng.normal(0, 0.3, 240), group))
    aurocs, errors = np.array(found).T
    assert errors.mean() == pytest.approx(aurocs.std(), rel=0.1)


def test_copies_of_every_image_make_nothing_better_known() -> None:
    rng = np.random.default_rng(3)
    labels, scores = np.arange(50) % 2, rng.normal(0, 1, 50)
    once = clustered_auroc(labels, scores, np.arange(50))
    thrice = clustered_auroc(np.tile(labels, 3), np.tile(scores, 3), np.tile(np.arange(50), 3))
    assert thrice == pytest.approx(once, abs=1e-12)
    apart = clustered_auroc(np.tile(labels, 3), np.tile(scores, 3), np.arange(150))
    assert apart[1] < 0.6 * once[1]


@pytest.mark.parametrize("seed", range(4))
def test_folds_cut_no_group_and_have_both_classes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for n, most in ((40, 1), (100, 3), (400, 30)):
        groups = np.repeat(rng.permutation(n), rng.integers(1, most + 1, n))
        kinds = rng.choice([0.0, 0.5, 1.0], n)  # all real, mixed, all fake
        labels = (rng.random(len(groups)) < kinds[groups]).astype(np.int64)
        fold = metadata_bias.folds(labels, groups, seed)
        assert all(len(set(fold[groups == group])) == 1 for group in range(n))
        for label in (0, 1):
            different = [len(set(groups[(fold == k) & (labels == label)])) for k in range(metadata_bias.FOLDS)]
            assert min(different) >= len(set(groups[labels == label])) // metadata_bias.FOLDS
    assert (metadata_bias.folds(labels, groups, seed) == fold).all()
    assert (metadata_bias.folds(labels, groups, seed + 1) != fold).any()


# What is called a bias.


@pytest.mark.parametrize("n", [24, 200])
def test_metadata_that_say_nothing_are_no_bias(n: int) -> None:
    for seed in range(2):
        result = measured(drawn(n, seed))
        assert result["biased"] is False and result["told_by"] == {} and result["undefined"] is None
        low, high = result["interval"]
        assert low < 0.5 < high + 0.1 and low <= result["auroc"] <= high


def plant_size(columns: Columns) -> None:
    columns["width"][fakes(columns)] = columns["height"][fakes(columns)] = 700
    per_pixel = np.exp(np.random.default_rng(5).normal(-1.5, 0.4, len(columns["label"])))
    columns["size_bytes"] = (columns["width"] * columns["height"] * per_pixel).astype(int)


def plant_bytes(columns: Columns) -> None:
    columns["size_bytes"][fakes(columns)] *= 6


def plant_quality(columns: Columns) -> None:
    columns["jpeg_quality"][fakes(columns)] = 88


def plant_format(columns: Columns) -> None:
    columns["format"][fakes(columns)] = "WEBP"
    columns["jpeg_quality"][fakes(columns)] = np.nan


@pytest.mark.parametrize(
    ("plant", "cause"),
    [(plant_size, "size"), (plant_bytes, "bytes per pixel"), (plant_quality, "JPEG quality"), (plant_format, "format")],
)
def test_planted_rule_is_found_and_named(plant: Any, cause: str) -> None:
    columns = drawn(40)
    plant(columns)
    result = measured(columns)
    assert result["biased"] is True and list(result["told_by"]) == [cause]
    assert BOUND < result["interval"][0] <= result["auroc"] <= result["interval"][1] <= 1.0
    assert result["told_by"][cause]["auroc"] > 0.9


def test_rule_that_no_single_value_shows_is_found() -> None:
    columns = drawn(200)
    plant_size(columns)  # in the middle of what the reals have
    columns["width"][~fakes(columns)] = np.tile([400, 1000], 50)
    result = measured(columns)
    assert result["single"]["width"] == pytest.approx(0.5, abs=1e-9) and result["auroc"] > 0.95


def test_rule_that_needs_two_values_together_has_no_single_cause() -> None:
    columns = drawn(300)
    high = np.random.default_rng(6).random(300) < 0.5
    columns["width"], columns["height"] = np.full(300, 512), np.full(300, 512)
    columns["jpeg_quality"] = np.where(high, 95.0, 75.0)
    columns["size_bytes"] = np.where(high == fakes(columns), 200_000, 100_000)
    result = measured(columns)
    assert result["biased"] is True and result["told_by"] == {}
    assert max(value for value in result["single"].values() if value is not None) < 0.6


def test_result_is_that_of_the_seed_and_does_not_know_which_class_is_which() -> None:
    columns = drawn(60)
    plant_quality(columns)
    result = measured(columns, seed=3)
    assert measured(columns, seed=3) == result
    swapped = measured({**columns, "label": 1 - columns["label"]}, seed=3)
    assert swapped["biased"] is True and swapped["single"] == pytest.approx(result["single"], abs=1e-12)


def test_classes_of_very_different_sizes_are_compared() -> None:
    columns = drawn(6000)
    columns["label"] = (np.arange(6000) < 12).astype(int)
    assert measured(columns)["biased"] is False
    plant_quality(columns)
    result = measured(columns)
    assert (result["real"], result["fake"]) == (5988, 12) and list(result["told_by"]) == ["JPEG quality"]


def test_equal_metadata_tell_exactly_nothing() -> None:
    columns = drawn(33)
    for name in ("width", "height", "size_bytes", "jpeg_quality"):
        columns[name][:] = columns[name][0]
    result = measured(columns)
    assert (result["auroc"], result["interval"]) == (0.5, [0.5, 0.5])
    assert set(result["single"].values()) == {0.5}


def test_images_matched_in_pairs_are_no_bias_though_the_auroc_is_far_from_one_half() -> None:
    columns = drawn(80)
    for name in ("width", "height", "size_bytes", "jpeg_quality"):
        columns[name][1::2] = columns[name][::2]  # each fake has the metadata of a real
    result = measured(columns)
    assert result["auroc"] < 0.4 and result["biased"] is False


def test_near_duplicates_do_not_tell_of_each_other() -> None:
    groups = np.repeat(np.arange(30), 8)
    columns = {name: np.repeat(values, 8) for name, values in drawn(30, seed=1).items()}
    together = measured(columns, groups)
    assert together["biased"] is False
    assert measured(columns)["auroc"] > 0.95 and measured(columns)["biased"] is True


def test_more_images_than_are_needed_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = drawn(1000)
    plant_quality(columns)
    monkeypatch.setattr(metadata_bias, "MAX_IMAGES", 30)
    asked: list[int] = []
    separation = metadata_bias.separation
    monkeypatch.setattr(
        metadata_bias, "separation", lambda known, *rest: asked.append(len(known.labels)) or separation(known, *rest)
    )
    result = measured(columns)
    assert set(asked) == {60} and (result["real"], result["fake"]) == (500, 500)
    assert list(result["told_by"]) == ["JPEG quality"]


# Single values.


def test_single_values_are_compared_without_a_model() -> None:
    columns = drawn(50, seed=4)
    plant_format(columns)
    columns["format"][:4] = ["PNG", "JPEG", "GIF", "WEBP"]
    columns["width"] += 100 * fakes(columns)
    single = measured(columns)["single"]
    width, height, labels = (np.asarray(columns[name], dtype=float) for name in ("width", "height", "label"))
    values = {
        "width": width, "height": height, "area": width * height, "aspect": width / height,
        "bytes per pixel": columns["size_bytes"] / (width * height),
    }  # fmt: skip
    for name, value in values.items():
        expected = pairwise(labels, value).mean()
        assert single[name] == pytest.approx(max(expected, 1 - expected), abs=1e-12), name
    shares = [pairwise(labels, columns["format"] == name).mean() for name in ("JPEG", "PNG", "WEBP", "GIF")]
    assert single["format"] == pytest.approx(max(max(share, 1 - share) for share in shares), abs=1e-12)
    assert single["JPEG quality"] is None  # only reals have one
    assert list(single) == list(SINGLE)


def test_quality_is_compared_among_the_images_that_have_one() -> None:
    columns = drawn(120)
    png = np.arange(120) % 3 == 0
    columns["format"][png], columns["jpeg_quality"][png] = "PNG", np.nan
    plant_quality(columns)
    columns["jpeg_quality"][png] = np.nan
    result = measured(columns)
    assert list(result["told_by"]) == ["JPEG quality"] and result["told_by"]["JPEG quality"]["auroc"] > 0.95
    columns["jpeg_quality"][~png & ~fakes(columns)] = 90
    assert measured(columns)["single"]["JPEG quality"] == 1.0


# What cannot be said.


UNKNOWN = {"auroc": None, "interval": None, "biased": None, "told_by": {}, "single": dict.fromkeys(SINGLE)}


@pytest.mark.parametrize(("labels", "reason"), [([1] * 40, "one class only"), ([0] * 40, "one class only")])
def test_one_class_has_no_number(labels: list[int], reason: str) -> None:
    counts = {"real": labels.count(0), "fake": labels.count(1)}
    assert measured({**drawn(40), "label": np.array(labels)}) == {**counts, **UNKNOWN, "undefined": reason}


def test_rows_without_label_and_rows_that_failed_are_in_no_number() -> None:
    columns = drawn(40)
    plant_format(columns)
    labels = columns["label"].astype(float)
    groups = np.arange(40)
    labels[:8], groups[8:12] = np.nan, metadata_bias.UNREADABLE
    result = measured({**columns, "label": labels}, groups)
    assert (result["real"], result["fake"]) == (14, 14) and result["biased"] is True
    nothing = measured({**columns, "label": np.full(40, np.nan)})
    assert nothing == {"real": 0, "fake": 0, **UNKNOWN, "undefined": "no image with a label"}
    assert measure(metadata(table(drawn(4)).slice(0, 0), np.arange(0))) == nothing


@pytest.mark.parametrize(
    ("different", "known"), [(metadata_bias.MIN_IMAGES - 1, False), (metadata_bias.MIN_IMAGES, True)]
)
def test_near_duplicates_do_not_make_up_for_images_that_are_missing(different: int, known: bool) -> None:
    columns = drawn(100)
    groups = np.where(fakes(columns), 1000 + np.arange(100) // 2 % different, np.arange(100))
    result = measured(columns, groups)
    assert (result["undefined"] is None) is known
    assert (result["auroc"] is not None) is known
    if not known:
        assert result["undefined"] == "fewer than 10 different images of a class"


def test_causes_and_columns_are_the_same() -> None:
    known = metadata(table(drawn(6)), np.arange(6))
    assert set(known.columns) == set(CAUSES)
    assert {name: values.shape[1] for name, values in known.columns.items()} == {
        "format": 1, "size": 4, "bytes per pixel": 1, "JPEG quality": 1
    }  # fmt: skip
