"""Raw and aligned verdicts: the same images in pairs, differences with their intervals, and where they part."""

from typing import Any

import numpy as np
import pytest

from jobs.dataset.manifest import form_id
from jobs.evaluation.alignment import compare_aligned
from jobs.evaluation.comparison import ROBUSTNESS_METRICS, compare, long_table
from jobs.report.text import as_text
from nsnet.errors import SourceError
from tests.support.tables import verdict_row, verdict_table

Rows = list[dict[str, Any]]
ALIGN = "jpeg:96"
QUICK = 200


def probabilities(strength: float, size: int, seed: int) -> dict[int, list[float]]:
    """Label -> probabilities; the stronger, the easier to tell."""
    rng = np.random.default_rng(seed)
    return {label: (1 / (1 + np.exp(-rng.normal(strength * (label - 0.5), 1, size)))).tolist() for label in (0, 1)}


def judged(generator: str, raw: float, aligned: float, size: int = 60, *, own_ids: bool = True) -> Rows:
    """Verdicts on images raw and aligned; with equal strengths the verdicts are the same."""
    rows = []
    for chain, strength in ((None, raw), (ALIGN, aligned)):
        for label, values in probabilities(strength, size, seed=len(generator)).items():
            for i, value in enumerate(values):
                row = verdict_row(f"/{generator}/{label}/{i}", value, label=label, generator=generator, transform=chain)
                if chain and own_ids:
                    row["image_id"] = form_id(row["image_id"], chain)
                rows.append(row)
    return rows


def compared(rows: Rows, samples: int = QUICK, **options: Any) -> dict[str, Any]:
    return compare_aligned(verdict_table(*rows), ALIGN, samples=samples, **options)


def test_detector_that_knows_the_format_parts_and_another_does_not() -> None:
    result = compared([*judged("leaky", 6, 0), *judged("honest", 2, 2)])
    assert set(result["parted"]) == {"leaky"} and set(result["parted"]["leaky"]) >= {"acc", "ap", "auroc"}
    leaky, honest = (result["difference"]["generators"][name] for name in ("leaky", "honest"))
    assert leaky["auroc"]["high"] < -0.3
    # no image changed: a bootstrap of images that are not paired would give an interval
    assert all(honest[name]["value"] == honest[name]["low"] == honest[name]["high"] == 0 for name in ("acc", "ap"))
    assert result["difference"]["macro_mean"]["auroc"]["value"] == pytest.approx(leaky["auroc"]["value"] / 2)


@pytest.mark.parametrize("own_ids", [True, False])
def test_numbers_are_those_of_each_form_and_their_difference(own_ids: bool) -> None:
    rows = judged("g", 2, 1, own_ids=own_ids)
    rng = np.random.default_rng(0)
    rng.shuffle(rows)  # type: ignore[arg-type]
    result = compared(rows)
    assert (result["images"], result["unpaired"]) == (120, 0)
    for form, chain in (("raw", None), ("aligned", ALIGN)):
        alone = compare(verdict_table(*({**row, "transform": None} for row in rows if row["transform"] == chain)))
        for name in ROBUSTNESS_METRICS:
            assert result[form]["generators"]["g"][name]["value"] == alone["generators"]["g"][name]["value"]
    for name in ROBUSTNESS_METRICS:
        raw, aligned = (result[form]["generators"]["g"][name]["value"] for form in ("raw", "aligned"))
        assert result["difference"]["generators"]["g"][name]["value"] == pytest.approx(aligned - raw)


def test_interval_of_the_difference_in_accuracy_is_that_of_the_paired_images() -> None:
    """One image in four changes from right to wrong: a binomial share has a standard error of 0.0395 for 120 images."""
    rows = []
    for i in range(120):
        for chain, value in ((None, 0.9), (ALIGN, 0.1 if i % 4 == 0 else 0.9)):
            probability = value if i % 2 else 1 - value
            rows.append(verdict_row(f"/{i}", probability, label=i % 2, generator="g", transform=chain))
    change = compared(rows, samples=2000)["difference"]["generators"]["g"]["acc"]
    assert change["value"] == -0.25
    # every changed image is a real: the reals' share is resampled, and the fakes' is constant
    assert change["high"] - change["low"] == pytest.approx(2 * 1.96 * 0.5 * (0.5 * 0.5 / 60) ** 0.5, rel=0.1)


def test_chance_parts_seldom() -> None:
    """Both forms are judged at random: intervals of 95 % exclude 0 for a few of 40 generators."""
    rng = np.random.default_rng(0)
    rows = [
        verdict_row(f"/{name}/{i}", float(rng.random()), label=i % 2, generator=f"g{name}", transform=chain)
        for name in range(40)
        for i in range(60)
        for chain in (None, ALIGN)
    ]
    parted = [names for names in compared(rows)["parted"].values() if "auroc" in names]
    assert len(parted) <= 6


def test_images_that_were_judged_in_one_way_only_do_not_count() -> None:
    rows = judged("g", 2, 1)
    last = [row for row in rows if row["transform"]][-1]
    kept = [row for row in rows if row is not last]
    failed = verdict_row("/f", None, label=0, generator="g", transform=ALIGN)
    unlabelled = [verdict_row("/u", 0.5, transform=chain) for chain in (None, ALIGN)]
    result = compared([*kept, failed, *unlabelled])
    assert (result["images"], result["unpaired"]) == (119, 1)
    assert (result["raw"]["failed"], result["aligned"]["failed"]) == (0, 1)
    assert (result["raw"]["generators"]["g"]["real"], result["raw"]["generators"]["g"]["fake"]) == (60, 59)


def test_fakes_are_compared_with_the_reals_of_their_pair() -> None:
    rows = [row for name in "ab" for row in judged(name, 3, 1) if row["label"] == (name == "a")]
    result = compared(rows, pairs={"a": "b"})
    assert list(result["raw"]["generators"]) == ["a"] and result["raw"]["generators"]["a"]["real"] == 60


@pytest.mark.parametrize("missing", ["rows", "ids"])
def test_nothing_to_pair_is_said(missing: str) -> None:
    rows = judged("g", 2, 1, own_ids=False)
    table = verdict_table(*(row for row in rows if missing == "ids" or not row["transform"]))
    with pytest.raises(SourceError, match=r"no labelled image was judged both raw and under jpeg:96: --align needs"):
        compare_aligned(table.drop_columns(["image_id"]) if missing == "ids" else table, ALIGN, samples=1)


# Beside the other numbers.


def test_robustness_follows_the_alignment() -> None:
    rows = judged("leaky", 6, 0)
    for chain, strength in ((f"{ALIGN}+blur:1", 1.0), ("blur:1", 5.0)):
        rows += [{**row, "transform": chain} for row in judged("leaky", strength, 0) if row["transform"] is None]
    table = verdict_table(*rows)
    result = compare(table, samples=2, align=ALIGN) | {"alignment": compared(rows, samples=2)}
    assert list(result["robustness"]) == ["blur:1"]
    alone = verdict_table(*({**row, "transform": None} for row in rows if row["transform"] == f"{ALIGN}+blur:1"))
    assert result["robustness"]["blur:1"]["macro_mean"]["ap"]["value"] == compare(alone)["macro_mean"]["ap"]["value"]
    lines = as_text(result).split("\n\n")[-1].splitlines()
    aligned = result["alignment"]["aligned"]["macro_mean"]["acc"]["value"]
    assert lines[0].startswith("transform after jpeg:96, macro mean") and lines[2].split()[1] == f"{aligned:.4f}"
    written = long_table(result).to_pylist()
    assert {row["transform"] for row in written} == {None, ALIGN, f"{ALIGN}+blur:1"}
    (change,) = (row for row in written if row["metric"] == "auroc_difference" and row["group"] == "leaky")
    assert change["value"] == result["alignment"]["difference"]["generators"]["leaky"]["auroc"]["value"] < -0.3


def test_text_marks_where_they_part_and_says_it() -> None:
    rows = [*judged("leaky", 6, 0), *judged("honest", 2, 2)]
    part = compared(rows)
    result = compare(verdict_table(*rows), samples=2, align=ALIGN) | {"alignment": part}
    text = as_text(result)
    lines = text.split("\n\n")[1].splitlines()
    assert lines[0] == "raw, and aligned by jpeg:96; 240 images were judged both ways"
    (leaky,) = [line for line in lines if line.startswith("leaky")]
    (honest,) = [line for line in lines if line.startswith("honest")]
    assert leaky.count("*") == len(part["parted"]["leaky"]) and "*" not in honest
    change = part["difference"]["generators"]["leaky"]["acc"]["value"]
    said = f"Raw and aligned (jpeg:96) part at 1 of 2 generators, in points: leaky (accuracy −{-100 * change:.1f}"
    assert lines[-1].startswith(said)
    assert lines[-1].endswith("; at the other 1, each difference may be 0.")
    same = compared(judged("honest", 2, 2))
    alone = compare(verdict_table(*judged("honest", 2, 2)), samples=2, align=ALIGN) | {"alignment": same}
    assert "Raw and aligned (jpeg:96) part at none of the 1 generators: each difference may be 0." in as_text(alone)
