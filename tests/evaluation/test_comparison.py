"""Comparison: scikit-learn's numbers per generator, intervals that are as wide as they should be, and who is compared
with whom."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from jobs.evaluation.comparison import ALL, LONG, MACRO_MEAN, METRICS, ROBUSTNESS_METRICS, compare, long_table, step
from jobs.evaluation.groups import find_pairs
from nsnet import metrics
from nsnet.errors import ConfigError, SourceError
from nsnet.transforms import ROBUSTNESS
from tests.support.tables import verdict_row, verdict_table

Rows = list[dict[str, Any]]
THRESHOLD = 0.3
SIZES = {"Glide": (40, 25), "ADM": (7, 160), "sd v1.4": (300, 3), None: (12, 12)}
"""Generator -> real and fake images."""
QUICK = 50
"""Bootstrap samples where intervals do not matter."""


def rows_of(
    generator: str | None, label: int, size: int, *, strength: float = 1.5, seed: int = 0, **values: Any
) -> Rows:
    """Verdicts with ties on images of one class; the stronger, the easier to tell."""
    rng = np.random.default_rng([seed, label, size])
    probabilities = 1 / (1 + np.exp(-(rng.normal(size=size) + strength * (label - 0.5))))
    rows = []
    for i, prob_fake in enumerate(probabilities.round(2)):
        verdict = "fake" if prob_fake >= THRESHOLD else "real"
        fields = {"label": label, "generator": generator, "verdict": verdict, "threshold": THRESHOLD} | values
        rows.append(verdict_row(f"/{generator}/{label}/{i}/{values.get('transform')}", float(prob_fake), **fields))
    return rows


def labelled_rows(seed: int = 0) -> Rows:
    """Generators of very different sizes, some easier than others, in no order."""
    rows = [
        row
        for strength, (generator, sizes) in enumerate(SIZES.items())
        for label, size in enumerate(sizes)
        for row in rows_of(generator, label, size, strength=strength + 0.5, seed=seed)
    ]
    np.random.default_rng(seed).shuffle(rows)
    return rows


def expected_metrics(rows: Rows) -> dict[str, float]:
    labels = np.array([row["label"] for row in rows])
    scores = np.array([row["prob_fake"] for row in rows])
    said = np.array([row["verdict"] == "fake" for row in rows])
    fpr, tpr, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    return {
        "acc": reference.accuracy_score(labels, said),
        "real_acc": reference.recall_score(labels, said, pos_label=0),
        "fake_acc": reference.recall_score(labels, said, pos_label=1),
        "ap": reference.average_precision_score(labels, scores),
        "auroc": reference.roc_auc_score(labels, scores),
        "tpr_at_fpr_1": tpr[fpr <= 0.01].max(),
    }


def values(numbers: dict[str, Any], names: Any = METRICS) -> dict[str, Any]:
    return {name: numbers[name]["value"] for name in names}


def width(number: dict[str, Any]) -> float:
    return float(number["high"] - number["low"])


# Numbers.


def test_metrics_per_generator_are_those_of_scikit_learn() -> None:
    rows = labelled_rows()
    result = compare(verdict_table(*rows), samples=QUICK)
    assert set(result["generators"]) == {"Glide", "ADM", "sd v1.4", "(none)"}
    for name, numbers in [*result["generators"].items(), ("all", result["all"])]:
        own = [row for row in rows if name in ("all", row["generator"] or "(none)")]
        expected = expected_metrics(own)
        assert values(numbers, expected) == pytest.approx(expected, abs=1e-12)
        labels = [row["label"] for row in own]
        assert (numbers["real"], numbers["fake"]) == (labels.count(0), labels.count(1))
        assert (numbers["failed"], numbers["uncertain"]) == (0, 0)
    assert result["failed"] == result["without_label"] == 0


def test_macro_mean_counts_generators_not_images() -> None:
    result = compare(verdict_table(*labelled_rows()), samples=QUICK)
    for name in METRICS:
        found = [numbers[name]["value"] for numbers in result["generators"].values()]
        assert result["macro_mean"][name]["value"] == pytest.approx(np.mean(found), abs=1e-12)
        assert result["macro_mean"][name]["generators"] == len(SIZES)
    assert abs(result["macro_mean"]["ap"]["value"] - result["all"]["ap"]["value"]) > 0.01


def test_accuracies_are_of_the_verdicts_not_of_a_probability_of_one_half() -> None:
    rows = [verdict_row("/a", 0.4, label=1, verdict="fake"), verdict_row("/b", 0.35, label=0, verdict="fake")]
    found = values(compare(verdict_table(*rows), samples=QUICK)["all"])
    assert (found["acc"], found["real_acc"], found["fake_acc"]) == (0.5, 0.0, 1.0)


def test_undefined_metrics_are_none_and_leave_the_mean_alone() -> None:
    both, one = rows_of("both", 0, 9) + rows_of("both", 1, 9), rows_of("one class", 1, 3)
    result = compare(verdict_table(*both, *one), samples=QUICK)
    numbers = result["generators"]["one class"]
    for name in ("real_acc", "ap", "auroc", "tpr_at_fpr_1", "precision_at_1"):
        assert numbers[name] == {"value": None, "low": None, "high": None}
        alone = result["generators"]["both"][name]
        assert result["macro_mean"][name] == {**alone, "generators": 1}
    assert numbers["fake_acc"]["value"] is not None
    assert result["macro_mean"]["fake_acc"]["generators"] == 2


def test_uncertain_verdicts_are_wrong_for_accuracies_no_alarm_for_precisions_and_left_out_of_the_decided() -> None:
    verdicts = {0: {"real": 5, "uncertain": 3, "fake": 2}, 1: {"real": 1, "uncertain": 4, "fake": 15}}
    rows = [
        verdict_row(f"/{label}/{verdict}/{i}", 0.5, label=label, verdict=verdict, generator="g")
        for label, counts in verdicts.items()
        for verdict, count in counts.items()
        for i in range(count)
    ]
    result = compare(verdict_table(*rows), samples=QUICK)
    for numbers in (result["all"], result["generators"]["g"]):
        found = values(numbers)
        assert found["acc"] == 20 / 30
        assert (found["real_acc"], found["fake_acc"]) == (5 / 10, 15 / 20)
        assert found["acc_decided"] == 20 / 23
        assert found["uncertain_share"] == 7 / 30
        tpr, fpr = 15 / 20, 2 / 10
        assert found["precision_at_1"] == pytest.approx(0.01 * tpr / (0.01 * tpr + 0.99 * fpr))
        assert numbers["uncertain"] == 7
        assert numbers["confusion"] == {"real": verdicts[0], "fake": verdicts[1]}
        assert 0 < width(numbers["acc_decided"]) < 1 and 0 < width(numbers["uncertain_share"]) < 1


def test_without_uncertain_verdicts_the_decided_are_all() -> None:
    result = compare(verdict_table(*labelled_rows()), samples=QUICK)
    for numbers in [*result["generators"].values(), result["all"]]:
        assert numbers["acc_decided"] == numbers["acc"]
        assert numbers["uncertain_share"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_failed_and_unlabelled_images_are_counted_and_in_no_number() -> None:
    rows = labelled_rows()
    failed = [verdict_row(f"/f{i}", None, label=i % 2, generator="Glide") for i in range(4)]
    unlabelled = [verdict_row(f"/u{i}", 0.9, label=None) for i in range(5)] + [verdict_row("/uf", None)]
    result = compare(verdict_table(*failed, *rows, *unlabelled), samples=QUICK)
    assert (result["failed"], result["without_label"]) == (4, 6)
    assert result["generators"]["Glide"]["failed"] == result["all"]["failed"] == 4
    before = compare(verdict_table(*rows), samples=QUICK)
    assert result["generators"]["Glide"] == {**before["generators"]["Glide"], "failed": 4}
    assert result["generators"]["ADM"] == before["generators"]["ADM"]
    assert result["all"] == {**before["all"], "failed": 4}


def test_labelled_images_that_all_failed_have_no_metric() -> None:
    failed = [verdict_row("/a", None, label=1, generator="g"), verdict_row("/b", None, label=0, generator="g")]
    result = compare(verdict_table(*failed), samples=QUICK)
    for numbers in (result["generators"]["g"], result["all"], result["macro_mean"]):
        assert set(values(numbers).values()) == {None}
    assert result["generators"]["g"]["failed"] == result["failed"] == 2


@pytest.mark.parametrize("rows", [[], [verdict_row("/a", 0.5)]])
def test_verdicts_without_a_label_cannot_be_compared(rows: Rows) -> None:
    with pytest.raises(SourceError, match="no verdict has a label"):
        compare(verdict_table(*rows))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prob_fake": None}, "1 scored rows have no probability"),
        ({"prob_fake": float("nan")}, "1 scored rows have no probability"),
        ({"prob_fake": 1.5}, "1 scored rows have no probability"),
        ({"verdict": None}, "1 scored rows have a verdict other than real, uncertain, fake"),
        ({"verdict": "Fake"}, "1 scored rows have a verdict other than"),
        ({"label": 2}, "labels must be 0"),
    ],
)
def test_rows_that_are_no_verdicts_are_refused(wrong: dict[str, Any], message: str) -> None:
    rows = [verdict_row("/a", 0.5, label=0), verdict_row("/b", 0.5, label=1) | wrong]
    with pytest.raises(SourceError, match=message):
        compare(verdict_table(*rows))


def test_number_of_samples_is_checked() -> None:
    with pytest.raises(ConfigError, match="at least 1 bootstrap sample, got 0"):
        compare(verdict_table(*labelled_rows()), samples=0)


# Intervals.


def test_intervals_are_those_of_a_loop_that_draws_images_anew() -> None:
    rows = rows_of("g", 0, 60) + rows_of("g", 1, 90)
    numbers = compare(verdict_table(*rows), samples=3000)["generators"]["g"]
    labels = np.array([row["label"] for row in rows])
    scores = np.array([row["prob_fake"] for row in rows])
    rng = np.random.default_rng(1)
    drawn: dict[str, list[Any]] = {"acc": [], "real_acc": [], "ap": [], "auroc": []}
    for _ in range(1000):
        sample = np.concatenate([rng.integers(0, 60, 60), 60 + rng.integers(0, 90, 90)])
        correct = (scores[sample] >= THRESHOLD) == (labels[sample] == 1)
        drawn["acc"].append(correct.mean())
        drawn["real_acc"].append(correct[labels[sample] == 0].mean())
        drawn["ap"].append(metrics.average_precision(labels[sample], scores[sample]))
        drawn["auroc"].append(metrics.auroc(labels[sample], scores[sample]))
    for name, found in drawn.items():
        low, high = np.quantile(found, [0.025, 0.975])
        assert numbers[name]["low"] == pytest.approx(low, abs=0.15 * (high - low))
        assert numbers[name]["high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_interval_of_an_accuracy_is_as_wide_as_the_binomial_says() -> None:
    rows = [
        verdict_row(f"/{i}", 0.9, label=1, generator="g", verdict="fake" if i % 4 else "uncertain") for i in range(400)
    ]
    numbers = compare(verdict_table(*rows), samples=4000)["generators"]["g"]
    expected = 2 * 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert width(numbers["fake_acc"]) == pytest.approx(expected, rel=0.1)
    assert width(numbers["uncertain_share"]) == pytest.approx(expected, rel=0.1)


def test_calibration_error_has_no_interval() -> None:
    result = compare(verdict_table(*labelled_rows()), samples=QUICK)
    for numbers in (result["all"], result["macro_mean"], result["generators"]["ADM"]):
        assert numbers["ece"]["value"] > 0 and numbers["ece"]["low"] is numbers["ece"]["high"] is None


def test_rate_that_so_few_reals_cannot_show_has_no_interval() -> None:
    rows = [*rows_of("few", 0, 99), *rows_of("few", 1, 20), *rows_of("more", 0, 100), *rows_of("more", 1, 20)]
    result = compare(verdict_table(*rows), samples=QUICK)
    few, more, mean = *(result["generators"][name] for name in ("few", "more")), result["macro_mean"]
    for numbers, name, known in (
        (few, "tpr_at_fpr_1", False), (more, "tpr_at_fpr_1", True), (more, "tpr_at_fpr_01", False),
        (mean, "tpr_at_fpr_1", False), (few, "auroc", True), (mean, "auroc", True),
    ):  # fmt: skip
        assert numbers[name]["value"] is not None and (numbers[name]["low"] is not None) is known, name
    assert compare(verdict_table(*rows[119:]), samples=QUICK)["macro_mean"]["tpr_at_fpr_1"]["low"] is not None


def test_generator_of_one_class_is_in_no_mean_of_accuracies() -> None:
    rows = [*rows_of("both", 0, 30), *rows_of("both", 1, 30), *rows_of("fakes", 1, 30, strength=-9)]
    result = compare(verdict_table(*rows), samples=QUICK)
    both, mean = result["generators"]["both"], result["macro_mean"]
    for name in ("acc", "acc_decided", "real_acc"):
        assert mean[name] == {**both[name], "generators": 1}
    assert mean["fake_acc"]["generators"] == 2 and mean["fake_acc"]["value"] < both["fake_acc"]["value"]
    alone = compare(verdict_table(*rows[60:]), samples=QUICK)
    assert alone["macro_mean"]["acc"]["value"] is None and alone["generators"]["fakes"]["acc"]["value"] is not None


def test_neither_the_order_of_rows_nor_other_generators_change_a_generators_numbers() -> None:
    rows = labelled_rows()
    result = compare(verdict_table(*rows), samples=QUICK)
    assert compare(verdict_table(*rows[::-1]), samples=QUICK) == result
    few = compare(verdict_table(*(row for row in rows if row["generator"] in ("ADM", "Glide"))), samples=QUICK)
    assert few["generators"] == {name: result["generators"][name] for name in ("ADM", "Glide")}
    other = compare(verdict_table(*rows), samples=QUICK, seed=1)
    assert values(other["all"]) == values(result["all"])
    assert other["generators"]["ADM"]["ap"] != result["generators"]["ADM"]["ap"]
    assert other["generators"]["ADM"]["acc"] != result["generators"]["ADM"]["acc"]


@pytest.mark.parametrize("metric", ["fake_acc", "auroc"])
@pytest.mark.parametrize("shared", [False, True])
def test_mean_of_two_generators_of_one_size_is_known_more_closely_than_either(shared: bool, metric: str) -> None:
    """If both drew the same places, and like images stood there, the mean would be known no better."""
    rows = [row for name in "ab" for row in rows_of(name, 1, 200)]
    rows += [row for name in ("r" if shared else "ab") for row in rows_of(name, 0, 2000)]
    result = compare(verdict_table(*rows), samples=1000, pairs={"a": "r", "b": "r"} if shared else None)
    ratio = width(result["macro_mean"][metric]) / width(result["generators"]["a"][metric])
    assert ratio == pytest.approx(np.sqrt(0.5), abs=0.12)


# Pairs.

PAIRS = {"fakes 1": "reals", "fakes 2": "reals"}


def paired_rows() -> Rows:
    return rows_of("fakes 1", 1, 40) + rows_of("fakes 2", 1, 60, strength=0.5) + rows_of("reals", 0, 50)


def test_paired_generators_are_compared_with_the_reals_of_their_pair() -> None:
    rows = paired_rows()
    result = compare(verdict_table(*rows), samples=QUICK, pairs=PAIRS)
    assert set(result["generators"]) == set(PAIRS) and result["pairs"] == PAIRS
    for name, numbers in result["generators"].items():
        expected = expected_metrics([row for row in rows if row["generator"] in (name, "reals")])
        assert values(numbers, expected) == pytest.approx(expected, abs=1e-12)
        assert numbers["real"] == 50
    assert (result["all"]["real"], result["all"]["fake"]) == (50, 100)
    assert result["macro_mean"]["ap"]["generators"] == 2


def test_without_pairs_fakes_alone_have_no_precision() -> None:
    result = compare(verdict_table(*paired_rows()), samples=QUICK)
    assert set(result["generators"]) == {*PAIRS, "reals"}
    assert result["macro_mean"]["ap"]["value"] is None and result["pairs"] == {}


def test_generator_that_lends_its_reals_and_has_fakes_stays_a_generator() -> None:
    result = compare(verdict_table(*paired_rows(), *rows_of("reals", 1, 5)), samples=QUICK, pairs=PAIRS)
    assert set(result["generators"]) == {*PAIRS, "reals"}
    assert (result["all"]["real"], result["all"]["fake"]) == (50, 105)


def test_shared_reals_are_drawn_once_for_all_who_share_them() -> None:
    """What is unsure of the reals is the same for all, and averaging does not lessen it."""
    names = [f"fakes {i}" for i in range(8)]
    fakes = [row for i, name in enumerate(names) for row in rows_of(name, 1, 300, seed=i)]
    shared = compare(verdict_table(*fakes, *rows_of("reals", 0, 30)), samples=600, pairs=dict.fromkeys(names, "reals"))
    own = [row for name in names for row in rows_of(name, 0, 30)]
    apart = compare(verdict_table(*fakes, *own), samples=600)
    found = [numbers["real_acc"] for numbers in shared["generators"].values()]
    assert all(number == found[0] for number in found)
    assert width(shared["macro_mean"]["real_acc"]) == pytest.approx(width(found[0]), abs=1e-12)
    for metric in ("real_acc", "auroc"):
        assert width(shared["macro_mean"][metric]) > 1.7 * width(apart["macro_mean"][metric])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"nobody": "reals"}, "nobody=reals does not fit: no labelled verdict is of a generator nobody"),
        ({"fakes 1": "nobody"}, "no labelled verdict is of a generator nobody"),
        ({"fakes 1": "fakes 2"}, "fakes 2 has no scored reals"),
        ({"reals": "fakes 1"}, "reals has reals of its own"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(verdict_table(*paired_rows()), pairs=pairs)


def test_pairs_of_benchmarks_are_found_where_they_are_needed() -> None:
    fakes = rows_of("glide_50_27", 1, 3) + rows_of("LDM_200", 1, 3)
    assert find_pairs(verdict_table(*fakes, *rows_of("laion", 0, 3))) == {"LDM_200": "laion", "glide_50_27": "laion"}
    assert find_pairs(verdict_table(*fakes, *rows_of("laion", 1, 3))) == {}
    with_own = rows_of("glide_50_27", 0, 1)
    assert find_pairs(verdict_table(*fakes, *with_own, *rows_of("laion", 0, 3))) == {"LDM_200": "laion"}
    unlabelled = [row | {"label": None} for row in rows_of("laion", 0, 3)]
    assert find_pairs(verdict_table(*fakes, *unlabelled)) == {}


# Transforms.


def transformed_rows() -> Rows:
    return [
        row
        for name in ("a", "b")
        for chain, strength in ((None, 3.0), ("jpeg:75", 2.0), ("resize:0.5+jpeg:75", 1.0))
        for label in (0, 1)
        for row in rows_of(name, label, 30, strength=strength, transform=chain)
    ]


def test_transformed_images_are_compared_apart() -> None:
    rows = transformed_rows()
    plain = [row for row in rows if row["transform"] is None]
    result = compare(verdict_table(*rows), samples=QUICK)
    alone = compare(verdict_table(*plain), samples=QUICK)
    assert alone.pop("robustness") == {}
    assert {name: result[name] for name in alone} == alone
    for chain, part in result["robustness"].items():
        own = [{**row, "transform": None} for row in rows if row["transform"] == chain]
        expected = compare(verdict_table(*own), samples=QUICK)
        for name, numbers in part["generators"].items():
            kept = {key: expected["generators"][name][key] for key in numbers}
            assert numbers == kept and set(ROBUSTNESS_METRICS) <= kept.keys()
        assert part["macro_mean"] == {name: expected["macro_mean"][name] for name in ROBUSTNESS_METRICS}
        assert part["failed"] == 0
    weaker = [result["robustness"][chain]["macro_mean"]["ap"]["value"] for chain in result["robustness"]]
    assert result["macro_mean"]["ap"]["value"] > weaker[0] > weaker[1]


def test_chains_stand_by_kind_and_from_weak_to_strong() -> None:
    chains = [*ROBUSTNESS, "blur:1+jpeg:60", "no chain", "noise:1e9"]
    rows = [row for chain in [None, *sorted(chains)] for row in rows_of("g", 1, 1, transform=chain)]
    found = compare(verdict_table(*rows), samples=1)["robustness"]
    assert list(found) == [*ROBUSTNESS, "blur:1+jpeg:60", "no chain", "noise:1e9"]


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("jpeg:75", ("jpeg", 75.0)), ("resize:0.5", ("resize", 0.5)), ("resize:0.5+jpeg:75", None), ("jpeg:", None),
        ("jpeg:nan", None), ("jpeg:<svg>", None), ("<b>:3", None), ("", None), ("jpeg:7.", None),
    ],
)  # fmt: skip
def test_step_of_a_chain(chain: str, expected: tuple[str, float] | None) -> None:
    assert step(chain) == expected


def test_failed_transforms_are_counted_with_the_transform() -> None:
    failed = [verdict_row(f"/f{i}", None, label=0, generator="a", transform="jpeg:75") for i in range(3)]
    result = compare(verdict_table(*transformed_rows(), *failed), samples=QUICK)
    part = result["robustness"]["jpeg:75"]
    assert (part["failed"], part["generators"]["a"]["failed"], result["failed"]) == (3, 3, 0)


def test_unlabelled_transformed_images_are_not_counted_again() -> None:
    unlabelled = [verdict_row("/u", 0.5), verdict_row("/u", 0.5, transform="jpeg:75")]
    assert compare(verdict_table(*transformed_rows(), *unlabelled), samples=QUICK)["without_label"] == 1


def test_transformed_images_alone_cannot_be_compared() -> None:
    with pytest.raises(SourceError, match="untransformed ones are needed"):
        compare(verdict_table(*rows_of("a", 0, 3, transform="jpeg:75")))


def test_table_without_the_column_and_an_empty_chain_mean_untransformed() -> None:
    table = verdict_table(*labelled_rows())
    expected = compare(table, samples=QUICK)
    assert compare(table.drop_columns(["transform"]), samples=QUICK) == expected
    empty = table.set_column(
        table.schema.get_field_index("transform"), "transform", pa.array([""] * table.num_rows, pa.string())
    )
    assert compare(empty, samples=QUICK) == expected


def test_pairs_hold_under_transforms_where_both_are_there() -> None:
    rows = paired_rows() + rows_of("fakes 1", 1, 5, transform="blur:1") + rows_of("reals", 0, 5, transform="blur:1")
    rows += rows_of("fakes 2", 1, 5, transform="blur:2")
    found = compare(verdict_table(*rows), samples=QUICK, pairs=PAIRS)["robustness"]
    assert set(found["blur:1"]["generators"]) == {"fakes 1"} and set(found["blur:2"]["generators"]) == {"fakes 2"}
    assert found["blur:1"]["generators"]["fakes 1"]["real"] == 5
    assert found["blur:2"]["macro_mean"]["ap"]["value"] is None
    lone = compare(verdict_table(*paired_rows(), *rows_of("reals", 0, 5, transform="blur:1")), samples=5, pairs=PAIRS)
    assert lone["robustness"]["blur:1"]["generators"]["reals"]["real"] == 5


# As rows, and as JSON.


def test_long_table_holds_every_number_once() -> None:
    result = compare(verdict_table(*transformed_rows(), *rows_of("one class", 1, 3)), samples=QUICK)
    table = long_table(result)
    assert table.schema.equals(LONG)
    rows = table.to_pylist()
    places = [(row["group"], row["transform"], row["metric"]) for row in rows]
    assert len(places) == len(set(places)) == 5 * len(METRICS) + 2 * 3 * len(ROBUSTNESS_METRICS)
    for row in rows:
        part = result if row["transform"] is None else result["robustness"][row["transform"]]
        named = {MACRO_MEAN: part["macro_mean"], ALL: result["all"]}
        numbers = named.get(row["group"]) or part["generators"][row["group"]]
        number = numbers[row["metric"]]
        assert (row["value"], row["low"], row["high"]) == (number["value"], number["low"], number["high"])
        assert (row["real"], row["fake"]) == (numbers.get("real"), numbers.get("fake"))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", None]),
            st.sampled_from([0, 1, None]),
            st.one_of(st.none(), st.floats(0, 1)),
            st.sampled_from(["real", "fake", "uncertain"]),
            st.sampled_from([None, None, "jpeg:75"]),
        ),
        max_size=12,
    )
)
def test_any_rows_give_json_or_say_why_not(given_rows: list[Any]) -> None:
    rows = [
        verdict_row(f"/{i}", prob_fake, generator=generator, label=label, transform=chain)
        | ({} if prob_fake is None else {"verdict": verdict})
        for i, (generator, label, prob_fake, verdict, chain) in enumerate(given_rows)
    ]
    try:
        result = compare(verdict_table(*rows), samples=3)
    except SourceError:
        assert not any(row["label"] is not None and row["transform"] is None for row in rows)
        return
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for numbers in [*result["generators"].values(), result["all"]]:
        counts = numbers["confusion"]
        assert (sum(counts["real"].values()), sum(counts["fake"].values())) == (numbers["real"], numbers["fake"])
        for name in METRICS:
            number = numbers[name]
            assert (number["value"] is None) <= (number["low"] is None)
            assert all(0.0 <= x <= 1.0 for x in number.values() if x is not None)
    compared = [row for row in rows if row["label"] is not None and row["transform"] is None]
    assert result["all"]["real"] + result["all"]["fake"] + result["failed"] == len(compared)
