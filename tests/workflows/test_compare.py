"""`nsnet compare`: what two detectors say of the same images, against the definitions."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.evaluation import flips
from jobs.runs.compaction import compact
from jobs.workflows.compare import compare_detectors
from nsnet.errors import ConfigError, SourceError
from tests.support.nights import publish, run_id
from tests.support.tables import run_command, verdict_row

A, B, C = "aaaa1111", "bbbb2222", "aaaa3333"
IMAGES = 300


def said(probability: float | None) -> str:
    if probability is None:
        return "failed"
    return "real" if probability < 0.4 else "fake" if probability >= 0.6 else "uncertain"


def row(name: str, probability: float | None, detector: str, **values: Any) -> dict[str, Any]:
    verdict = {} if probability is None else {"verdict": said(probability), "logit": 4.0 * probability - 2.0}
    return verdict_row(f"s3://in/{name}", probability, detector_id=detector, **verdict, **values)


@pytest.fixture(scope="module")
def scores() -> dict[str, tuple[float | None, float | None, int | None, str | None]]:
    """Name -> probabilities by A and by B, label and generator."""
    dice = random.Random(0)
    found = {}
    for i in range(IMAGES):
        label = dice.choice([0, 1, None])
        one = min(0.999, max(0.001, dice.gauss(0.3 + 0.4 * (label or 0), 0.25)))
        two = min(0.999, max(0.001, one + dice.gauss(0.03, 0.15)))
        failed = dice.random()
        pair = (None if failed < 0.05 else one, None if 0.03 < failed < 0.08 else two)
        found[f"{i}.jpg"] = (*pair, label, None if label is None else f"model {i % 3}")
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, scores: dict[str, Any]) -> str:
    """A and B on the same images, each also on ten of its own; outdated verdicts of A say the contrary."""
    place = str(tmp_path_factory.mktemp("out"))
    of_a, of_b = [], []
    for name, (one, two, label, generator) in scores.items():
        labels = {"label": label, "generator": generator}
        of_a.append(row(name, one, A, caption=f"caption of {name}", **labels))
        of_b.append(row(name, two, B, caption=f"caption of {name}", **labels))
    outdated = [row(name, 0.99 if (one or 0.0) < 0.5 else 0.01, A) for name, (one, *_) in scores.items()]
    publish(place, run_id(0), outdated, detector_id=A)
    publish(place, run_id(1), [*of_a, *(row(f"a{i}.jpg", 0.1, A) for i in range(10))], detector_id=A)
    publish(place, run_id(2, 1), [*of_b, *(row(f"b{i}.jpg", 0.1, B) for i in range(10))], detector_id=B)
    return place


def test_numbers_are_those_of_their_definitions(out: str, scores: dict[str, Any]) -> None:
    result = compare_detectors(out)
    assert result["detectors"] == {"a": A, "b": B}
    pairs = [(said(one), said(two)) for one, two, _, _ in scores.values()]
    both = [(one, two) for one, two, _, _ in scores.values() if one is not None and two is not None]
    assert result["images"] == {"both": IMAGES, "only_a": 10, "only_b": 10, "scored_by_both": len(both)}
    different = sum(one != two for one, two in pairs)
    assert result["flips"]["flips"] == different and result["flips"]["share"] == different / IMAGES
    for one in flips.CLASSES:
        for two in flips.CLASSES:
            assert result["flips"]["table"][one][two] == pairs.count((one, two))
    for label, name in ((0, "real"), (1, "fake")):
        of_label = [(said(one), said(two)) for one, two, own, _ in scores.values() if own == label]
        assert result["by_label"][name]["images"] == len(of_label)
        assert result["by_label"][name]["flips"] == sum(one != two for one, two in of_label)
    assert sorted(result["by_generator"]) == ["model 0", "model 1", "model 2"]
    shifts = sorted(two - one for one, two in both)
    assert result["shift"]["prob_fake"]["mean"] == pytest.approx(np.mean(shifts))
    assert result["shift"]["logit"]["mean_absolute"] == pytest.approx(4.0 * np.mean(np.abs(shifts)))
    assert result["shift"]["prob_fake"]["quantiles"]["0.5"] == pytest.approx(shifts[len(shifts) // 2])
    verdicts = [(said(one), said(two)) for one, two in both]
    equal = sum(one == two for one, two in verdicts) / len(verdicts)
    chance = sum(
        sum(pair[0] == name for pair in verdicts) * sum(pair[1] == name for pair in verdicts) for name in flips.SAID
    )
    expected = chance / len(verdicts) ** 2
    assert result["agreement"]["share"] == equal
    assert result["agreement"]["kappa"] == pytest.approx((equal - expected) / (1.0 - expected))
    flagged = [sum(pair[i] == "fake" for pair in verdicts) for i in (0, 1)]
    assert result["flagged"]["a"]["value"] == flagged[0] / len(verdicts)
    assert result["flagged"]["difference"]["value"] == pytest.approx((flagged[1] - flagged[0]) / len(verdicts))
    threshold = result["same_share"]["threshold"]
    assert sum(two >= threshold for _, two in both) == result["same_share"]["flagged"] == flagged[0]
    labelled = [(said(one), said(two), label) for one, two, label, _ in scores.values()
                if None not in (one, two, label)]  # fmt: skip
    fakes = [pair for pair in labelled if pair[2] == 1]
    assert result["labelled"]["tpr"]["b"]["value"] == sum(pair[1] == "fake" for pair in fakes) / len(fakes)
    right = sum(pair[1] == ("real", "fake")[pair[2]] for pair in labelled)
    assert result["labelled"]["accuracy"]["b"]["value"] == right / len(labelled)
    reals = [pair for pair in labelled if pair[2] == 0]
    assert result["labelled"]["fpr"]["a"]["value"] == sum(pair[0] == "fake" for pair in reals) / len(reals)


def test_intervals_hold_the_spread_of_resampled_images() -> None:
    """The formulas' standard errors, against a bootstrap of the images."""
    counts = np.array([[400, 30, 10], [20, 60, 25], [5, 15, 135]])
    n = int(counts.sum())
    draws = np.random.default_rng(0).multinomial(n, counts.ravel() / n, size=2000).reshape(-1, 3, 3)
    kappas = [flips._agreement(draw)["kappa"] for draw in draws]
    agreement = flips._agreement(counts)
    assert (agreement["high"] - agreement["low"]) / 2 / flips.Z == pytest.approx(np.std(kappas), rel=0.05)
    paired = [flips._paired(draw, [False, False, True])["difference"]["value"] for draw in draws]
    difference = flips._paired(counts, [False, False, True])["difference"]
    assert (difference["high"] - difference["low"]) / 2 / flips.Z == pytest.approx(np.std(paired), rel=0.05)


def test_mcnemars_test_is_exact_and_detectors_that_agree_do_not_differ() -> None:
    assert flips._difference(0, 5, 100)["p_value"] == pytest.approx(2 / 2**5)
    same = flips._paired(np.diag([50, 0, 0]), [False, False, True])
    assert same["p_value"] == 1.0 and same["difference"]["value"] == 0.0 and same["difference"]["high"] > 0.0
    assert flips._agreement(np.diag([50, 0, 0])) == {"share": 1.0, "kappa": None, "low": None, "high": None}
    assert flips._agreement(np.zeros((3, 3), dtype=np.int64))["share"] is None


def test_examples_are_the_largest_flips_and_the_report_has_all(
    out: str, scores: dict[str, Any], tmp_path: Path
) -> None:
    result = compare_detectors(out, ["aaaa", "bb"], examples=5, report=str(tmp_path))
    flipped = {name: (one, two) for name, (one, two, _, _) in scores.items() if said(one) != said(two)}
    written = pq.read_table(tmp_path / "flips.parquet")
    assert written.schema.equals(flips.FLIPS)
    rows = written.to_pylist()
    assert {row["uri"].removeprefix("s3://in/") for row in rows} == flipped.keys()
    sizes = [abs(row["prob_fake_b"] - row["prob_fake_a"]) for row in rows if None not in
             (row["prob_fake_a"], row["prob_fake_b"])]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True) and rows[:5] == result["examples"]
    first = rows[0]
    name = first["uri"].removeprefix("s3://in/")
    assert (first["prob_fake_a"], first["prob_fake_b"]) == flipped[name] and first["caption"] == f"caption of {name}"
    assert (first["said_a"], first["said_b"]) == tuple(map(said, flipped[name]))
    assert json.loads((tmp_path / "compare.json").read_text())["flips"] == result["flips"]


def left_by_an_older_comparison(report: Path) -> dict[str, bytes]:
    files = {"flips.parquet": b"old flips", "compare.json": b"old numbers"}
    for name, content in files.items():
        (report / name).write_bytes(content)
    return files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_detectors_without_a_common_image_leave_the_report_as_it_is(tmp_path: Path) -> None:
    out, report = str(tmp_path / "out"), tmp_path / "report"
    publish(out, run_id(0), [row("1", 0.9, A)], detector_id=A)
    publish(out, run_id(1), [row("2", 0.9, B)], detector_id=B)
    with pytest.raises(SourceError, match="have judged no image both"):
        compare_detectors(out, report=str(report))
    assert not report.exists()
    report.mkdir()
    old = left_by_an_older_comparison(report)
    with pytest.raises(SourceError, match="have judged no image both"):
        compare_detectors(out, report=str(report))
    assert contents(report) == old


@pytest.mark.parametrize("ended", ["while flips are written", "while examples are chosen"])
def test_error_in_a_comparison_leaves_the_report_as_it_is(
    ended: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = flips._in_order

    def fail(rows: Any, limit: int | None = None) -> Iterator[Any]:
        if limit is not None or ended == "while flips are written":
            raise OSError(28, "No space left on device")
        yield from in_order(rows, limit)

    monkeypatch.setattr(flips, "_in_order", fail)
    old = left_by_an_older_comparison(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        compare_detectors(out, report=str(tmp_path))
    assert contents(tmp_path) == old


def test_comparison_is_the_same_after_compaction(out: str, tmp_path: Path) -> None:
    import shutil

    before = compare_detectors(out)
    place = str(tmp_path / "copy")
    shutil.copytree(out, place)
    assert compact(place, grace_seconds=0.0).merged
    after = compare_detectors(place)
    assert {**after, "output": "", "compared_at": ""} == {**before, "output": "", "compared_at": ""}


def test_threshold_with_ties_flags_no_more_than_before(tmp_path: Path) -> None:
    out = str(tmp_path)
    publish(out, run_id(0), [row(f"{i}", 0.9 if i < 2 else 0.1, A) for i in range(9)], detector_id=A)
    publish(out, run_id(1), [row(f"{i}", 0.9 if i < 3 else 0.95 if i == 3 else 0.1, B) for i in range(9)],
            detector_id=B)  # fmt: skip
    assert compare_detectors(out)["same_share"] == {
        "threshold": 0.95, "flagged": 1, "share": 1 / 9, "flagged_by_a": 2
    }  # fmt: skip


def test_command_prints_text_or_json_and_gates(out: str) -> None:
    code, text, err = run_command("compare", out)
    assert code == 0 and err == ""
    for part in (f"A: {A}", "300 judged by both, 10 by A alone", "Cohen's kappa", "reals flagged", "model 2",
                 "the 20 largest flips", "s3://in/"):  # fmt: skip
        assert part in text
    code, text, err = run_command("compare", out, "--json", "--max-flips", "1%", "--examples", "1")
    result = json.loads(text)
    assert code == 3 and len(result["examples"]) == 1 and "more than the allowed 1.00% (--max-flips)" in err
    assert run_command("compare", out, "--max-flips", "90%")[0] == 0


def test_names_and_captions_of_strangers_cannot_write_lines(tmp_path: Path) -> None:
    out = str(tmp_path)
    hostile = {"caption": "a\nexit code 0\x1b[2J", "generator": "g\r\nx", "label": 1}
    publish(out, run_id(0), [row("x\ny\x1b[1m", 0.9, A, **hostile)], detector_id=A)
    publish(out, run_id(1), [row("x\ny\x1b[1m", 0.1, B, **hostile)], detector_id=B)
    code, text, _ = run_command("compare", out)
    assert code == 0 and not any(line.startswith(("exit code", "y")) for line in text.splitlines())
    assert "\x1b" not in text and "\r" not in text


def test_detectors_that_cannot_be_chosen_are_named(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(SourceError, match="holds no published verdicts"):
        compare_detectors(out)
    publish(out, run_id(0), [row("1", 0.9, A)], detector_id=A)
    with pytest.raises(ConfigError, match="holds verdicts of aaaa1111: choose two"):
        compare_detectors(out)
    publish(out, run_id(1), [row("2", 0.9, B)], detector_id=B)
    with pytest.raises(SourceError, match="have judged no image both"):
        compare_detectors(out)
    publish(out, run_id(2), [row("1", 0.9, C)], detector_id=C)
    for wanted, message in (
        ([], "choose two with --detectors"), (["aaaa1"], "choose two"), (["aaaa", "bb"], "'aaaa' begins several"),
        (["x", "bb"], "'x' is no detector"), (["", "bb"], "'' is no detector"), (["bb", "bbb"], "both name bbbb2222"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            compare_detectors(out, wanted)
    assert compare_detectors(out, ["aaaa1", "aaaa3"])["images"]["both"] == 1
