"""The table of an ablation, from trainings that are made up; no training is done."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.dataset import schema
from jobs.experiments import ablation
from jobs.experiments.paths import LEAKAGE_FILE, PREDICTIONS_FILE, RESULT_FILE, SETTINGS_FILE
from jobs.experiments.request import TrainRequest
from jobs.storage import parquet, uris, writing
from nsnet import metrics
from nsnet.errors import ConfigError, NullSpaceError, UsageError
from tests.support.tables import image_file, put

COUNT = 60
LABELS = np.arange(COUNT) % 2


@pytest.fixture
def source(tmp_path: Path) -> str:
    files = {f"{name}/{i}.png": image_file(i) for name in ("0_real", "1_fake") for i in range(2)}
    return put(str(tmp_path / "pictures"), files)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainRequest]:
    """Trainings that were asked for; each leaves predictions that are better for some variants than for others."""
    asked: list[TrainRequest] = []

    def train(request: TrainRequest) -> None:
        asked.append(request)
        if request.variant.startswith("original:tau"):
            raise NullSpaceError("ranks 1 to 7 are possible")
        writing.write_json(uris.join(request.work, SETTINGS_FILE), request.identity(request.resolved()))
        best = {"epoch": 2, "residual_energy": 0.5 + 0.1 * request.seed, "val_ap": 0.75}
        writing.write_json(uris.join(request.work, RESULT_FILE), {"best_epoch": best})
        if request.resolved().training.captions == "own":
            writing.write_json(uris.join(request.out, "detector.json"), {})
        write_predictions(request.work, skill(request.variant), request.seed)
        if request.leakage:
            writing.write_json(uris.join(request.work, LEAKAGE_FILE), leakage_of(request.seed))

    def make_split(request: TrainRequest, *_: Any) -> pa.Table:
        return pa.Table.from_pylist([], schema=schema.SPLIT)

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr("jobs.experiments.inputs._make_split", make_split)
    return asked


def leakage_of(seed: int) -> dict[str, Any]:
    def probe(value: float) -> dict[str, Any]:
        bounds = {"value": value, "low": value - 0.1, "high": value + 0.1, "permuted": 0.24}
        return {**bounds, "chance": 0.25, "classes": 4, "images": 60, "reason": None}

    undefined = {
        **dict.fromkeys(("value", "low", "high", "chance", "permuted")),
        "classes": 0,
        "images": 0,
        "reason": "no",
    }
    found = {"u": probe(0.8 + 0.1 * seed), "projected": probe(0.3), "caption": probe(0.9)}
    classes = dict.fromkeys(found, undefined)
    return {
        "images": 60, "residual_energy": 0.5, "object_class": classes, "caption_cluster": found, "label": probe(0.55)
    }  # fmt: skip


def skill(variant: str) -> float:
    return {"advanced": 2.0, "linear": 0.5}.get(variant, 1.0)


def write_predictions(work: str, separation: float, seed: int, splits: tuple[str, ...] = ("val", "test")) -> None:
    """Predictions on sixty images of each split; those on validation are perfect, which must not count."""
    dice = np.random.default_rng([seed, round(10 * separation)])
    rows = []
    for split in splits:
        for i in range(COUNT):
            logit = float(separation * (LABELS[i] - 0.5) + dice.normal()) if split == "test" else 9.0 * LABELS[i] - 4.5
            p = 1.0 / (1.0 + np.exp(-logit))
            rows.append({
                "image_id": f"{split}{i:03d}", "uri": f"/{split}/{i}", "label": int(LABELS[i]), "generator": "g",
                "split": split, "logit": logit, "prob_fake": p, "verdict": "fake" if p >= 0.5 else "real",
                "threshold": 0.5, "status": "scored", "detector_id": "d",
            })  # fmt: skip
    batch = pa.RecordBatch.from_pylist(rows[::-1], schema=schema.PREDICTIONS)
    parquet.write([batch], schema.PREDICTIONS, uris.join(work, PREDICTIONS_FILE))


def by_variant(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in result["variants"]}


VARIANTS = ("linear", "advanced", "constant-caption")


def test_variants_are_trained_on_one_split_with_the_same_seeds(source: str, trained: Any, tmp_path: Path) -> None:
    ablation.ablate(source, out=str(tmp_path / "out"), variants=VARIANTS, seeds=(0, 3))
    assert [(request.variant, request.seed) for request in trained] == [(v, s) for v in VARIANTS for s in (0, 3)]
    assert {request.split for request in trained} == {str(tmp_path / "out" / "shared.training" / "split.parquet")}
    assert {request.captions for request in trained} == {str(tmp_path / "out" / "captions")}
    assert len({request.out for request in trained}) == 6
    assert not any(request.caption_missing for request in trained)  # they were all made with the split


def test_numbers_are_means_over_seeds_of_the_test_images(source: str, trained: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    rows = by_variant(ablation.ablate(source, out=out, variants=VARIANTS, seeds=(0, 3)))
    for variant in VARIANTS:
        row, aps = rows[variant], []
        for seed in (0, 3):
            table = next(parquet.read(f"{out}/{variant}-seed{seed}.training/{PREDICTIONS_FILE}", schema.PREDICTIONS))
            tested = [one for one in table.to_pylist() if one["split"] == "test"]
            aps.append(metrics.average_precision([r["label"] for r in tested], [r["prob_fake"] for r in tested]))
        assert row["test"]["ap"]["value"] == pytest.approx(np.mean(aps))
        assert row["test"]["ap"]["low"] < row["test"]["ap"]["value"] < row["test"]["ap"]["high"]
        assert row["residual_energy"] == pytest.approx(0.65) and row["test_pictures"] == COUNT
    difference = rows["linear"]["difference"]["ap"]
    expected = rows["linear"]["test"]["ap"]["value"] - rows["advanced"]["test"]["ap"]["value"]
    assert difference["value"] == pytest.approx(expected) and difference["low"] < expected < difference["high"]
    assert "difference" not in rows["advanced"]


def test_difference_of_equal_predictions_is_nothing_at_all(source: str, trained: Any, tmp_path: Path) -> None:
    """The same images are drawn for both: intervals of two variants may overlap where their difference is sure."""
    rows = by_variant(ablation.ablate(source, out=str(tmp_path / "out"), variants=("no-mapper", "advanced")))
    assert rows["no-mapper"]["difference"]["ap"]["value"] != 0
    for name in ("advanced", "no-mapper"):
        write_predictions(str(tmp_path / "out" / f"{name}-seed0.training"), 1.0, 0)
    rows = by_variant(ablation.ablate(source, out=str(tmp_path / "out"), variants=("no-mapper", "advanced")))
    assert rows["no-mapper"]["difference"]["ap"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_what_was_finished_is_not_done_again(source: str, trained: Any, tmp_path: Path) -> None:
    first = ablation.ablate(source, out=str(tmp_path / "out"), variants=VARIANTS[:2])
    assert len(trained) == 2
    assert ablation.ablate(source, out=str(tmp_path / "out"), variants=VARIANTS[:2]) == first
    assert len(trained) == 2
    ablation.ablate(source, out=str(tmp_path / "out"), variants=VARIANTS)
    assert [request.variant for request in trained[2:]] == ["constant-caption"]


def test_what_was_finished_with_other_settings_is_not_taken_over(source: str, trained: Any, tmp_path: Path) -> None:
    ablation.ablate(source, out=str(tmp_path / "out"), variants=("advanced",))
    with pytest.raises(UsageError, match="other settings"):
        ablation.ablate(source, out=str(tmp_path / "out"), variants=("advanced",), epochs=3)
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        ablation.ablate(source, out=str(tmp_path / "out"), variants=("advanced",), split_seed=5)
    assert len(trained) == 1


def test_variant_without_a_null_space_is_reported_and_others_go_on(source: str, trained: Any, tmp_path: Path) -> None:
    result = ablation.ablate(source, out=str(tmp_path / "out"), variants=("original:tau=1e-6", "advanced"))
    rows = by_variant(result)
    assert rows["original:tau=1e-6"] == {"variant": "original:tau=1e-6", "error": "ranks 1 to 7 are possible"}
    assert rows["advanced"]["test"] is not None
    text = (tmp_path / "out" / "ablation.txt").read_text()
    assert "original:tau=1e-6: ranks 1 to 7 are possible" in text and text.count("failed") == 1


def test_without_test_images_the_numbers_are_undefined(source: str, trained: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    ablation.ablate(source, out=out, variants=("advanced",))
    write_predictions(f"{out}/advanced-seed0.training", 1.0, 0, splits=("val",))
    (row,) = ablation.ablate(source, out=out, variants=("advanced",))["variants"]
    assert row["test"] is None
    assert (tmp_path / "out" / "ablation.txt").read_text().count("undefined") == len(ablation.SHOWN)


def test_leakage_is_the_mean_over_seeds_and_has_its_own_table(source: str, trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = ablation.ablate(source, out=str(out), variants=VARIANTS, seeds=(0, 1), leakage=60)
    assert {request.leakage for request in trained} == {60}
    found = by_variant(result)["advanced"]["leakage"]
    u = found["caption_cluster"]["u"]
    assert (u["value"], u["low"], u["high"]) == pytest.approx((0.85, 0.75, 0.95)) and u["chance"] == 0.25
    assert found["object_class"]["u"]["value"] is None and found["label"]["value"] == pytest.approx(0.55)
    lines = (out / "ablation.txt").read_text().split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in lines[2:5]] == list(VARIANTS)
    assert "0.85 (0.75-0.95)" in lines[2] and "0.30 (0.20-0.40)" in lines[2]
    assert "class: –: no" in lines and "cluster: 4 classes, chance 0.250, with permuted classes 0.240" in lines
    # without it there is no table, and a training without it has no row in it
    plain = ablation.ablate(source, out=str(tmp_path / "plain"), variants=("advanced",))
    assert (
        plain["variants"][0]["leakage"] is None and "leakage" not in (tmp_path / "plain" / "ablation.txt").read_text()
    )


@pytest.mark.parametrize("variant", ["advance", "original:rank=x", "linear:3"])
def test_unknown_variant_is_found_before_anything_is_done(
    variant: str, source: str, trained: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        ablation.ablate(source, out=str(tmp_path / "out"), variants=("advanced", variant))
    assert trained == [] and not (tmp_path / "out").exists()
