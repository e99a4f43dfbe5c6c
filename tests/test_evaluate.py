"""Evaluation: scikit-learn's numbers per generator, and what is undefined, failed or unlabelled said as such."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as reference

from jobs import evaluate as module
from jobs import ledger, storage
from jobs.evaluate import NEEDED, as_text, compare, evaluate
from jobs.ledger import Run
from nsnet.errors import ConfigError, SourceError
from tests.tables import manifest_row, manifest_table, verdict_row, verdict_table

Rows = list[dict[str, Any]]
THRESHOLD = 0.3
SIZES = {"Glide": (40, 25), "ADM": (7, 160), "sd v1.4": (300, 3), None: (12, 12)}
"""Generator -> real and fake pictures."""


def labelled_rows(seed: int = 0) -> Rows:
    """Verdicts with ties, of generators of very different sizes, some easier than others."""
    rng = np.random.default_rng(seed)
    rows = []
    for strength, (generator, sizes) in enumerate(SIZES.items()):
        for label, size in enumerate(sizes):
            probabilities = 1 / (1 + np.exp(-(rng.normal(size=size) + (strength + 0.5) * (label - 0.5))))
            for i, prob_fake in enumerate(probabilities.round(2)):
                verdict = "fake" if prob_fake >= THRESHOLD else "real"
                values = {"label": label, "generator": generator, "verdict": verdict, "threshold": THRESHOLD}
                rows.append(verdict_row(f"/{generator}/{label}/{i}", float(prob_fake), **values))
    rng.shuffle(rows)
    return rows


def expected_metrics(rows: Rows) -> dict[str, float]:
    labels = np.array([row["label"] for row in rows])
    scores = np.array([row["prob_fake"] for row in rows])
    said = np.array([row["verdict"] == "fake" for row in rows])
    fpr, tpr, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    return {
        "real": int((labels == 0).sum()),
        "fake": int((labels == 1).sum()),
        "acc": reference.accuracy_score(labels, said),
        "real_acc": reference.recall_score(labels, said, pos_label=0),
        "fake_acc": reference.recall_score(labels, said, pos_label=1),
        "ap": reference.average_precision_score(labels, scores),
        "auroc": reference.roc_auc_score(labels, scores),
        "tpr_at_fpr_1": tpr[fpr <= 0.01].max(),
    }


def publish(out: Path, rows: Rows, run_id: str | None = None) -> Run:
    run = Run(out=str(out), **({"run_id": run_id} if run_id else {}))
    Path(run.staging).mkdir(parents=True)
    manifest, staged = f"{run.staging}/manifest.parquet", f"{run.staging}/rows.parquet"
    pq.write_table(manifest_table(*(manifest_row(row["uri"]) for row in rows)), manifest)
    pq.write_table(verdict_table(*({**row, "run_id": run.run_id} for row in rows)), staged)
    run.publish(manifest, [staged], {})
    return run


# Numbers.


def test_metrics_per_generator_are_those_of_scikit_learn() -> None:
    rows = labelled_rows()
    result = compare(verdict_table(*rows))
    assert set(result["generators"]) == {"Glide", "ADM", "sd v1.4", "(none)"}
    for name, group in result["generators"].items():
        own = [row for row in rows if (row["generator"] or "(none)") == name]
        assert group == pytest.approx(expected_metrics(own), abs=1e-12)
    assert result["all"] == pytest.approx(expected_metrics(rows), abs=1e-12)
    assert result["failed"] == result["without_label"] == 0


def test_macro_mean_counts_generators_not_pictures() -> None:
    result = compare(verdict_table(*labelled_rows()))
    for column in module.COLUMNS:
        values = [group[column] for group in result["generators"].values()]
        assert result["macro_mean"][column] == pytest.approx(np.mean(values), abs=1e-12)
    assert abs(result["macro_mean"]["ap"] - result["all"]["ap"]) > 0.01


def test_accuracies_are_of_the_verdicts_not_of_a_probability_of_one_half() -> None:
    rows = [verdict_row("/a", 0.4, label=1, verdict="fake"), verdict_row("/b", 0.35, label=0, verdict="fake")]
    result = compare(verdict_table(*rows))["all"]
    assert (result["acc"], result["real_acc"], result["fake_acc"]) == (0.5, 0.0, 1.0)


def test_undefined_metrics_are_none_and_leave_the_mean_alone() -> None:
    both = [verdict_row(f"/a{i}", i / 10, label=i % 2, generator="both") for i in range(10)]
    one = [verdict_row(f"/b{i}", 0.9, label=1, generator="one class") for i in range(3)]
    result = compare(verdict_table(*both, *one))
    group = result["generators"]["one class"]
    assert (group["real_acc"], group["ap"], group["auroc"], group["tpr_at_fpr_1"]) == (None,) * 4
    assert (group["acc"], group["fake_acc"], group["real"]) == (1.0, 1.0, 0)
    for column in ("real_acc", "ap", "auroc", "tpr_at_fpr_1"):
        assert result["macro_mean"][column] == result["generators"]["both"][column]
    (line,) = [line for line in as_text(result).splitlines() if line.startswith("one class")]
    assert line.split()[2:] == ["0", "3", "1.0000", "–", "1.0000", "–", "–", "–"]
    assert "–: undefined, one class only" in as_text(result)


def test_failed_and_unlabelled_pictures_are_counted_and_in_no_number() -> None:
    rows = labelled_rows()
    failed = [verdict_row(f"/f{i}", None, label=i % 2, generator="Glide") for i in range(4)]
    unlabelled = [verdict_row(f"/u{i}", 0.9, label=None) for i in range(5)] + [verdict_row("/uf", None)]
    result = compare(verdict_table(*failed, *rows, *unlabelled))
    assert (result["failed"], result["without_label"]) == (4, 6)
    before = compare(verdict_table(*rows))
    assert (result["generators"], result["all"]) == (before["generators"], before["all"])
    text = as_text(result)
    assert "4 labelled pictures failed and are in no number above" in text
    assert "6 pictures have no label and are in no number above" in text


def test_verdicts_without_a_label_cannot_be_compared() -> None:
    for rows in ([], [verdict_row("/a", 0.5)]):
        with pytest.raises(SourceError, match="no verdict has a label"):
            compare(verdict_table(*rows))


def test_labelled_pictures_that_all_failed_have_no_metric() -> None:
    result = compare(verdict_table(verdict_row("/a", None, label=1), verdict_row("/b", None, label=0)))
    assert result["generators"] == {} and result["failed"] == 2
    assert set(result["macro_mean"].values()) == {None}
    assert "2 labelled pictures failed" in as_text(result)


# The table for people.


def test_table_shows_the_worst_generator_first_and_all_in_columns() -> None:
    lines = as_text(compare(verdict_table(*labelled_rows()))).splitlines()
    assert lines[0].split()[:5] == ["generator", "real", "fake", "acc", "real_acc"]
    shown = [float(line.split()[-6]) for line in lines[2:-1]]
    assert shown == sorted(shown) and len(shown) == len(SIZES)
    assert lines[-1].startswith("macro mean")
    assert len({len(line) for line in lines}) == 1


def test_control_characters_of_a_generator_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b[2J\x1b]0;owned\x07evil\n\r\x9b31m\u202e"
    rows = [verdict_row(f"/{i}", i / 4, label=i % 2, generator=name) for i in range(4)]
    pq.write_table(verdict_table(*rows), tmp_path / "v.parquet")
    result = evaluate(str(tmp_path / "v.parquet"), out=str(tmp_path / "out"))
    shown = "".join(capsys.readouterr())
    assert "evil" in shown and all(letter.isprintable() or letter == "\n" for letter in shown)
    assert list(result["generators"]) == [name]
    written = (tmp_path / "out" / "evaluation.txt").read_text()
    assert all(letter.isprintable() or letter == "\n" for letter in written)


# Files.


@pytest.mark.parametrize("published", [False, True])
def test_result_is_written_as_json_and_text(
    published: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = labelled_rows() + [verdict_row("/one", 0.9, label=1, generator="one class")]
    if published:
        publish(tmp_path / "scored", rows)
        uri = str(tmp_path / "scored")
    else:
        uri = str(tmp_path / "v.parquet")
        pq.write_table(verdict_table(*rows).select(NEEDED), uri)
    result = evaluate(uri, out=str(tmp_path / "out"))
    assert result["verdicts"] == uri and result["detector_id"] == "d" * 16
    assert {key: result[key] for key in ("generators", "macro_mean", "all")} == {
        key: compare(verdict_table(*rows))[key] for key in ("generators", "macro_mean", "all")
    }
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == result
    assert capsys.readouterr().out == (tmp_path / "out" / "evaluation.txt").read_text() == as_text(result) + "\n"


def test_verdicts_of_several_detectors_need_a_choice(tmp_path: Path) -> None:
    rows = [verdict_row(f"/{i}", i / 10, label=i % 2, detector_id="ab"[i % 3 == 0]) for i in range(10)]
    uri = str(tmp_path / "v.parquet")
    pq.write_table(verdict_table(*rows), uri)
    with pytest.raises(ConfigError, match=r"several detectors \(a, b\): choose one with --detector-id"):
        evaluate(uri, out=str(tmp_path / "out"))
    result = evaluate(uri, out=str(tmp_path / "out"), detector_id="b")
    assert result["detector_id"] == "b" and result["all"]["real"] + result["all"]["fake"] == 4
    with pytest.raises(ConfigError, match="holds no verdict of detector c"):
        evaluate(uri, out=str(tmp_path / "out"), detector_id="c")


def test_picture_judged_by_two_runs_counts_once_as_the_newest_has_it(tmp_path: Path) -> None:
    first = [verdict_row("/a", None, label=0), verdict_row("/b", 0.1, label=1), verdict_row("/c", 0.9, label=1)]
    second = [verdict_row("/a", 0.2, label=0), verdict_row("/b", 0.7, label=1)]
    publish(tmp_path, second, "20260103T000000Z-000000")
    publish(tmp_path, first, "20260102T000000Z-ffffff")
    result = evaluate(str(tmp_path), out=str(tmp_path / "out"))
    assert (result["all"]["real"], result["all"]["fake"], result["failed"]) == (1, 2, 0)
    assert result["all"]["acc"] == 1.0


def test_unpublished_run_is_not_evaluated(tmp_path: Path) -> None:
    publish(tmp_path / "scored", [verdict_row("/a", 0.2, label=0), verdict_row("/b", 0.9, label=1)])
    unfinished = Run(out=str(tmp_path / "scored"))
    Path(unfinished.final).mkdir(parents=True)
    pq.write_table(verdict_table(verdict_row("/c", 0.9, label=0)), f"{unfinished.final}/part-00000-0a1b2c3d.parquet")
    assert evaluate(str(tmp_path / "scored"), out=str(tmp_path / "out"))["all"]["real"] == 1
    assert len(ledger.runs(str(tmp_path / "scored"))) == 1


def test_file_without_the_columns_of_verdicts_needs_a_detector(tmp_path: Path) -> None:
    whole = verdict_table(verdict_row("/a", 0.2, label=0))
    for missing in NEEDED:
        pq.write_table(whole.drop_columns([missing]), tmp_path / "v.parquet")
        with pytest.raises(SourceError, match=r"v\.parquet holds no published verdicts; .* give --detector"):
            evaluate(str(tmp_path / "v.parquet"), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_or_other_files_are_said(tmp_path: Path) -> None:
    for name in ("absent", "absent.parquet"):
        with pytest.raises(SourceError, match=f"there is no .*{name}"):
            evaluate(str(tmp_path / name), out=str(tmp_path / "out"))
    storage.write_bytes(str(tmp_path / "text.parquet"), b"text")
    with pytest.raises(SourceError, match="is no Parquet file"):
        evaluate(str(tmp_path / "text.parquet"), out=str(tmp_path / "out"))
    with pytest.raises(SourceError, match="holds no published verdicts"):
        evaluate(str(tmp_path), out=str(tmp_path / "out"))


def test_verdict_called_uncertain_is_not_called_fake() -> None:
    rows = [verdict_row("/a", 0.5, label=1, verdict="uncertain"), verdict_row("/b", 0.9, label=1, verdict="fake")]
    assert compare(verdict_table(*rows))["all"]["fake_acc"] == 0.5
