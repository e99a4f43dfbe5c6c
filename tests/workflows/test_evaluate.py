"""Evaluation: which verdicts are compared, and what is written of it, for people and for programs."""

import json
import re
import tempfile
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.console.tables import MAX_NAME_LETTERS
from jobs.dataset.plan import write_manifest
from jobs.dataset.schema import PREDICTIONS
from jobs.evaluation.comparison import compare, long_table
from jobs.evaluation.verdicts import NEEDED
from jobs.report.text import MAX_COLUMNS, as_text
from jobs.runs import catalog
from jobs.runs.publication import Run
from jobs.storage import writing
from jobs.workflows import evaluate as module
from jobs.workflows.evaluate import evaluate, parse_chains, parse_pairs
from nsnet.errors import ConfigError, SourceError
from nsnet.transforms import ROBUSTNESS, SOCIAL
from tests.support.tables import manifest_row, manifest_table, run_command, verdict_row, verdict_table

Rows = list[dict[str, Any]]
SIZES = {"Glide": (40, 25), "ADM": (7, 160), "sd v1.4": (300, 3), None: (12, 12)}
"""Generator -> real and fake images."""
QUICK = 50
"""Bootstrap samples where intervals do not matter."""
STANDARD_CHAINS = (*ROBUSTNESS, *SOCIAL)
FILES = ["evaluation.json", "evaluation.parquet", "evaluation.txt", "report.html"]


def labelled_rows(transform: str | None = None) -> Rows:
    """Verdicts of generators of very different sizes, some easier than others."""
    rng = np.random.default_rng(0)
    rows = []
    for strength, (generator, sizes) in enumerate(SIZES.items()):
        for label, size in enumerate(sizes):
            probabilities = 1 / (1 + np.exp(-(rng.normal(size=size) + (strength + 0.5) * (label - 0.5))))
            for i, prob_fake in enumerate(probabilities.round(2)):
                uri, fields = f"/{generator}/{label}/{i}/{transform}", {"label": label, "generator": generator}
                rows.append(verdict_row(uri, float(prob_fake), **fields, transform=transform))
    return rows


def publish(out: Path, rows: Rows, run_id: str | None = None) -> Run:
    run = Run(out=str(out), **({"run_id": run_id} if run_id else {}))
    Path(run.staging).mkdir(parents=True)
    manifest, staged = f"{run.staging}/manifest.parquet", f"{run.staging}/rows.parquet"
    pq.write_table(manifest_table(*(manifest_row(row["uri"], image_id=row["image_id"]) for row in rows)), manifest)
    pq.write_table(verdict_table(*({**row, "run_id": run.run_id} for row in rows)), staged)
    run.publish(manifest, [staged], {})
    return run


# The table for people.


def test_table_shows_the_worst_generator_first_and_all_in_columns() -> None:
    result = compare(verdict_table(*labelled_rows()), samples=QUICK)
    lines = as_text(result).splitlines()
    assert lines[0].split() == [
        "generator", "real", "fake", "acc", "real_acc", "fake_acc", "AP", "AUROC", "TPR@1%FPR"
    ]  # fmt: skip
    names = [re.split("  +", line)[0] for line in lines[2:]]
    worst_first = sorted(result["generators"], key=lambda name: result["generators"][name]["acc"]["value"])
    assert names == [*worst_first, "macro mean", "all images"]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= MAX_COLUMNS
    for line, name in zip(lines[2:], worst_first, strict=False):
        numbers = result["generators"][name]
        for metric in ("acc", "ap"):
            number = numbers[metric]
            assert f"{number['value']:.4f} ({number['low']:.3f}-{number['high']:.3f})" in line
        assert line.split()[-1] == f"{numbers['tpr_at_fpr_1']['value']:.4f}"


def test_table_leaves_intervals_out_where_they_do_not_fit_and_shortens_names() -> None:
    rows = [{**row, "generator": "g" * 10_000} for row in labelled_rows()]
    lines = as_text(compare(verdict_table(*rows), samples=QUICK)).splitlines()
    assert "(" not in "".join(lines) and max(map(len, lines)) <= MAX_COLUMNS
    assert lines[2].startswith("g" * (MAX_NAME_LETTERS - 1) + "… ")


def test_table_says_what_is_undefined_failed_unlabelled_and_uncertain() -> None:
    rows = [verdict_row(f"/b{i}", 0.9, label=1, generator="one class") for i in range(3)]
    rows += [verdict_row("/f", None, label=1, generator="one class"), verdict_row("/u", 0.5)]
    rows += [verdict_row("/c", 0.5, label=1, generator="one class", verdict="uncertain")]
    text = as_text(compare(verdict_table(*rows), samples=1))
    (line,) = [line for line in text.splitlines() if line.startswith("one class")]
    assert line.split()[2:] == ["0", "4", "0.7500", line.split()[5], "–", "0.7500", "–", "–", "–"]
    assert "1 labelled images failed and are not counted above" in text
    assert "1 images have no label and are not counted above" in text
    assert "1 verdicts are uncertain: acc counts them as wrong; without them it is –" in text
    assert "–: undefined, one class only" in text


def test_table_without_anything_to_say_says_nothing() -> None:
    lines = as_text(compare(verdict_table(*labelled_rows()), samples=QUICK)).splitlines()
    assert len(lines) == 2 + len(SIZES) + 2


def test_table_of_transforms_stands_beside_the_untransformed() -> None:
    rows = labelled_rows() + labelled_rows("jpeg:75")
    result = compare(verdict_table(*rows), samples=QUICK)
    below = as_text(result).split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in below[2:]] == ["none", "jpeg:75"]
    assert below[2].split()[1] == f"{result['macro_mean']['acc']['value']:.4f}"
    assert below[3].split()[1] == f"{result['robustness']['jpeg:75']['macro_mean']['acc']['value']:.4f}"


def test_control_characters_of_a_generator_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b[2J\x1b]0;owned\x07evil\n\r\x9b31m\u202e"
    rows = [verdict_row(f"/{i}", i / 4, label=i % 2, generator=name) for i in range(4)]
    pq.write_table(verdict_table(*rows), tmp_path / "v.parquet")
    result = evaluate(str(tmp_path / "v.parquet"), out=str(tmp_path / "out"), samples=1)
    shown = "".join(capsys.readouterr())
    assert "evil" in shown and all(letter.isprintable() or letter == "\n" for letter in shown)
    assert list(result["generators"]) == [name]
    written = (tmp_path / "out" / "evaluation.txt").read_text()
    assert all(letter.isprintable() or letter == "\n" for letter in written)


# Files.


@pytest.mark.parametrize("published", [False, True])
def test_result_is_written_as_json_text_rows_and_page(
    published: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = labelled_rows() + [verdict_row("/one", 0.9, label=1, generator="one class")]
    if published:
        publish(tmp_path / "scored", rows)
        uri = str(tmp_path / "scored")
    else:
        uri = str(tmp_path / "v.parquet")
        pq.write_table(verdict_table(*rows).select(NEEDED), uri)
    result = evaluate(uri, out=str(tmp_path / "out"), samples=QUICK)
    assert result["verdicts"] == uri and result["detector_id"] == "d" * 16
    expected = compare(verdict_table(*rows), samples=QUICK)
    assert {key: result[key] for key in expected} == expected
    assert result["rows"] == {"split": None, "used": len(rows), "left_out": 0, "seen": []}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert pq.read_table(tmp_path / "out" / "evaluation.parquet").equals(long_table(result))
    assert result["detector_id"] in (tmp_path / "out" / "report.html").read_text()
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == result
    assert capsys.readouterr().out == (tmp_path / "out" / "evaluation.txt").read_text() == as_text(result) + "\n"


def test_verdicts_of_several_detectors_need_a_choice(tmp_path: Path) -> None:
    rows = [verdict_row(f"/{i}", i / 10, label=i % 2, detector_id="ab"[i % 3 == 0]) for i in range(10)]
    uri = str(tmp_path / "v.parquet")
    pq.write_table(verdict_table(*rows), uri)
    with pytest.raises(ConfigError, match=r"several detectors \(a, b\): choose one with --detector-id"):
        evaluate(uri, out=str(tmp_path / "out"))
    result = evaluate(uri, out=str(tmp_path / "out"), detector_id="b", samples=1)
    assert result["detector_id"] == "b" and result["all"]["real"] + result["all"]["fake"] == 4
    with pytest.raises(ConfigError, match="holds no verdict of detector c"):
        evaluate(uri, out=str(tmp_path / "out"), detector_id="c")


def test_image_judged_by_two_runs_counts_once_as_the_newest_has_it(tmp_path: Path) -> None:
    first = [verdict_row("/a", None, label=0), verdict_row("/b", 0.1, label=1), verdict_row("/c", 0.9, label=1)]
    second = [verdict_row("/a", 0.2, label=0), verdict_row("/b", 0.7, label=1)]
    publish(tmp_path, second, "20260103T000000Z-000000")
    publish(tmp_path, first, "20260102T000000Z-ffffff")
    result = evaluate(str(tmp_path), out=str(tmp_path / "out"), samples=1)
    assert (result["all"]["real"], result["all"]["fake"], result["failed"]) == (1, 2, 0)
    assert result["all"]["acc"]["value"] == 1.0


def test_unpublished_run_is_not_evaluated(tmp_path: Path) -> None:
    publish(tmp_path / "scored", [verdict_row("/a", 0.2, label=0), verdict_row("/b", 0.9, label=1)])
    unfinished = Run(out=str(tmp_path / "scored"))
    Path(unfinished.final).mkdir(parents=True)
    pq.write_table(verdict_table(verdict_row("/c", 0.9, label=0)), f"{unfinished.final}/part-00000-0a1b2c3d.parquet")
    assert evaluate(str(tmp_path / "scored"), out=str(tmp_path / "out"), samples=1)["all"]["real"] == 1
    assert len(catalog.runs(str(tmp_path / "scored"))) == 1


def test_file_that_lacks_a_column_is_refused_with_its_name(tmp_path: Path) -> None:
    whole = verdict_table(verdict_row("/a", 0.2, label=0)).select(NEEDED)
    for missing in NEEDED:
        uri = _stored(whole.drop_columns([missing]), tmp_path / "v.parquet")
        others = ", ".join(name for name in NEEDED if name != missing)
        with pytest.raises(SourceError, match=rf"holds no `{missing}` column; it has {others}; .* give --detector"):
            evaluate(uri, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_or_other_files_are_said(tmp_path: Path) -> None:
    for name in ("absent", "absent.parquet"):
        with pytest.raises(SourceError, match=f"{name} does not exist"):
            evaluate(str(tmp_path / name), out=str(tmp_path / "out"))
    writing.write_bytes(str(tmp_path / "text.parquet"), b"text")
    with pytest.raises(SourceError, match="is not a readable Parquet file"):
        evaluate(str(tmp_path / "text.parquet"), out=str(tmp_path / "out"))
    with pytest.raises(SourceError, match=r"holds no published verdicts .* files such as text\.parquet; to score"):
        evaluate(str(tmp_path), out=str(tmp_path / "out"))
    with pytest.raises(SourceError, match=r"/empty holds no published verdicts .* it is empty; .* give --detector"):
        (tmp_path / "empty").mkdir()
        evaluate(str(tmp_path / "empty"), out=str(tmp_path / "out"))


LABELS = [0, 1, 1, 0]
WHOLE = {
    "label": LABELS, "generator": ["g"] * 4, "prob_fake": [0, 1, 1, 1], "verdict": ["real", "fake", "fake", "fake"],
    "status": ["scored"] * 4, "detector_id": ["d"] * 4,
}  # fmt: skip
NAN = float("nan")


def compared(tmp_path: Path, metadata: dict[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
    """Evaluation of a file with these columns in the place of those of `WHOLE`, without a page: plots take a second."""
    table = pa.table(WHOLE | columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.report.page.render", lambda result: "")
        return evaluate(_stored(table, tmp_path / "v.parquet"), out=str(tmp_path / "out"), samples=1)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("label", ["real", "FAKE", "fake ", "Real"]),
        ("label", [0.0, 1.0, 1.0, 0.0]),
        ("label", [False, True, True, False]),
        ("label", pa.array([Decimal(0), Decimal(1), Decimal(1), Decimal(0)])),
        ("label", pa.array(["0", "1", "1", "0"], pa.large_string())),
        ("label", pa.array([b"human", b"ai", b"ai", b"human"])),
        ("label", pa.array(["real", "fake", "fake", "real"]).dictionary_encode()),
        ("generator", pa.array(["g"] * 4).dictionary_encode()),
        ("generator", pa.array(["g"] * 4, pa.large_string())),
        ("prob_fake", pa.array([0, 1, 1, 1], pa.float32())),
        ("prob_fake", pa.array([Decimal("0.0"), Decimal("1.0"), Decimal("1.0"), Decimal("1.0")])),
        ("prob_fake", [False, True, True, True]),
        ("prob_fake", ["0", "1.0", "1e0", "1"]),
        ("verdict", ["REAL", "Fake", "fake", "fake "]),
        ("verdict", [0, 1, 1, 1]),
        ("verdict", [False, True, True, True]),
        ("status", ["Scored"] * 4),
        ("status", pa.array(["scored"] * 4).dictionary_encode()),
    ],
)
def test_columns_of_any_type_mean_what_they_say(column: str, values: Any, tmp_path: Path) -> None:
    expected = compared(tmp_path)
    found = compared(tmp_path, **{column: values})
    assert found["generators"] == expected["generators"] and found["all"]["acc"]["value"] == 0.75


def test_image_that_a_join_repeats_counts_once_and_without_a_label_where_its_rows_contradict_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compared(tmp_path, image_id=["a", "b", "b", "a"])
    assert (result["without_label"], result["all"]["real"], result["all"]["fake"]) == (0, 1, 1)
    assert result["all"]["acc"]["value"] == 0.5  # the last row of each
    assert "warning" in (said := capsys.readouterr().err) and "2 rows repeat an image" in said
    result = compared(tmp_path, image_id=["a", "a", "b", None])
    assert (result["without_label"], result["all"]["real"], result["all"]["fake"]) == (1, 1, 1)
    assert "1 images are labelled both real and fake" in capsys.readouterr().err
    capsys.readouterr()
    result = compared(tmp_path, image_id=["a", "b", "b", "a"], transform=["", "", "jpeg:90", "jpeg:90"])
    assert result["rows"]["used"] == 4 and "warning" not in capsys.readouterr().err


def test_image_may_be_one_of_several_generators_and_its_label_stand_in_one_row(tmp_path: Path) -> None:
    """A join that repeats the reals for each generator, or that lost a label."""
    many = {"image_id": ["r", "f", "s", "r"], "generator": ["g", "g", "h", "h"]}
    result = compared(tmp_path, **many)
    assert {name: (found["real"], found["fake"]) for name, found in result["generators"].items()} == {
        "g": (1, 1),
        "h": (1, 1),
    }
    result = compared(tmp_path, image_id=["a", "b", "b", "a"], label=[0, 1, None, None])
    assert (result["without_label"], result["all"]["real"], result["all"]["fake"]) == (0, 1, 1)


def test_values_that_pandas_writes_for_nothing_are_nothing(tmp_path: Path) -> None:
    result = compared(tmp_path, label=[0, 1, NAN, NAN], generator=["g", None, "", "g"], split=[NAN] * 4)
    assert result["without_label"] == 2 and result["all"]["real"] + result["all"]["fake"] == 2
    assert set(compared(tmp_path, generator=[NAN] * 4)["generators"]) == {"(none)"}
    failed = compared(tmp_path, status=["scored", "scored", "failed", "scored"], prob_fake=[0, 1, NAN, 1])
    assert failed["failed"] == 1


def test_label_numbers_are_what_the_file_calls_them(tmp_path: Path) -> None:
    names = {"label": {"_type": "ClassLabel", "names": ["fake", "real"]}}
    assert compared(tmp_path, names, label=[1, 0, 0, 1])["generators"] == compared(tmp_path)["generators"]


@pytest.mark.parametrize(
    ("labels", "names", "shown"),
    [
        ([0, 1, 2, 7], None, r"`label` are 0, 1, 2, 7: none means real"),
        (["cat", "dog", "cat", "dog"], None, r"`label` are cat, dog: none"),
        ([0.5] * 4, None, r"`label` are 0\.5: none"),
        ([0, 1, 1, 0], ["cat", "dog"], r"`label` are 0, 1, which the file names cat, dog: none"),
    ],
)
def test_classes_of_something_else_are_refused_by_name(
    labels: list[Any], names: list[str] | None, shown: str, tmp_path: Path
) -> None:
    metadata = {"label": {"_type": "ClassLabel", "names": names}} if names else None
    with pytest.raises(SourceError, match=rf"v\.parquet: the values of {shown}"):
        compared(tmp_path, metadata, label=labels)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"status": ["ok"] * 4}, "the status 'ok' is neither scored nor failed"),
        ({"prob_fake": ["high"] * 4}, "prob_fake 'high' is not a number"),
        ({"verdict": ["maybe"] * 4}, "4 scored rows have a verdict other than real, uncertain, fake"),
        ({"prob_fake": [[0.5]] * 4}, "column `prob_fake` has type list"),
    ],
)
def test_values_that_are_no_verdicts_are_named(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        compared(tmp_path, **columns)


def test_name_in_another_case_is_taken_where_there_is_only_one(tmp_path: Path) -> None:
    def renamed(*names: str) -> str:
        table = pa.table(WHOLE)
        arrays = [*table.columns, table.column("label")][: len(names)]
        return _stored(pa.Table.from_arrays(arrays, names=names), tmp_path / "v.parquet")

    rest = list(WHOLE)[1:]
    for names in (["Label", *rest], ["label", *rest, "LABEL"]):
        assert evaluate(renamed(*names), out=str(tmp_path / "out"), samples=1)["all"]["acc"]["value"] == 0.75
    for names in (["Label", *rest, "LABEL"], ["label", *rest, "label"]):
        with pytest.raises(SourceError, match=rf"2 columns that may be `label`: {names[0]}, {names[-1]}; keep one"):
            evaluate(renamed(*names), out=str(tmp_path / "out"), samples=1)


def _stored(table: pa.Table, path: Path) -> str:
    pq.write_table(table, path)
    return str(path)


# Splits: the predictions of a training.


def predictions(path: Path, **splits: int) -> str:
    rows = [
        {**verdict_row(f"/{split}/{i}", i / (count - 1), label=i % 2, generator="g"), "split": split, "logit": 0.0}
        for split, count in splits.items()
        for i in range(count)
    ]
    kept = [{name: row[name] for name in PREDICTIONS.names} for row in rows]
    return _stored(pa.Table.from_pylist(kept, schema=PREDICTIONS), path)


def test_predictions_of_a_training_are_judged_by_their_test_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = predictions(tmp_path / "predictions.parquet", val=30, test=20)
    result = evaluate(uri, out=str(tmp_path / "out"), samples=1)
    assert result["rows"] == {"split": "test", "used": 20, "left_out": 30, "seen": []}
    assert result["all"]["real"] == 10
    assert "rows: 20 of the split test; 30 others are left out" in capsys.readouterr().err
    assert evaluate(uri, out=str(tmp_path / "out"), split="val", samples=1)["all"]["real"] == 15
    every = evaluate(uri, out=str(tmp_path / "out"), split="all", samples=1)
    assert every["rows"] == {"split": None, "used": 50, "left_out": 0, "seen": ["val"]} and every["all"]["real"] == 25


def test_without_test_rows_all_are_compared(tmp_path: Path) -> None:
    uri = predictions(tmp_path / "predictions.parquet", val=30)
    result = evaluate(uri, out=str(tmp_path / "out"), samples=1)
    assert result["all"]["real"] == 15
    assert result["rows"] == {"split": "val", "used": 30, "left_out": 0, "seen": ["val"]}
    assert "so the numbers are too high" in (tmp_path / "out" / "report.html").read_text()


def test_verdicts_can_be_those_of_another_threshold(tmp_path: Path) -> None:
    rows = [*labelled_rows(), verdict_row("/f", None, label=1, generator="Glide")]
    rows = [row | {"verdict": "uncertain" if row["verdict"] else None} for row in rows]
    uri = _stored(verdict_table(*rows), tmp_path / "v.parquet")
    result = evaluate(uri, out=str(tmp_path / "out"), threshold=0.3, samples=1)
    for name, group in result["generators"].items():
        ours = [row for row in rows if (row["generator"] or "(none)") == name and row["prob_fake"] is not None]
        right = sum((row["prob_fake"] >= 0.3) == row["label"] for row in ours)
        assert group["acc"]["value"] == pytest.approx(right / len(ours)) and group["uncertain"] == 0
    assert result["threshold"] == 0.3 and result["curves"]["threshold"] == 0.3 and result["failed"] == 1
    assert evaluate(uri, out=str(tmp_path / "out"), samples=1)["all"]["uncertain"] > 0


def test_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    uri = predictions(tmp_path / "predictions.parquet", val=30)
    with pytest.raises(ConfigError, match="no verdict of the split test: choose from val"):
        evaluate(uri, out=str(tmp_path / "out"), split="test")
    uri = _stored(verdict_table(*labelled_rows()), tmp_path / "v.parquet")
    with pytest.raises(ConfigError, match="no verdict of the split test: its rows have no split"):
        evaluate(uri, out=str(tmp_path / "out"), split="test")


# Pairs.


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), {}), (("auto",), "auto"), (("a=b", "c=b"), {"a": "b", "c": "b"}), (("a=b=c",), {"a": "b=c"}),
    ],
)  # fmt: skip
def test_pairs_are_read(texts: tuple[str, ...], expected: Any) -> None:
    assert parse_pairs(texts) == expected


@pytest.mark.parametrize("texts", [("a",), ("=b",), ("a=",), ("auto", "a=b"), ("a=b", "a=c"), ("",)])
def test_pairs_that_say_nothing_or_too_much_are_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--pair"):
        parse_pairs(texts)


def test_pairs_are_given_or_found(tmp_path: Path) -> None:
    rows = [verdict_row(f"/f{i}", 0.5 + i / 20, label=1, generator="dalle") for i in range(9)]
    rows += [verdict_row(f"/r{i}", i / 20, label=0, generator="laion") for i in range(9)]
    uri, out = _stored(verdict_table(*rows), tmp_path / "v.parquet"), str(tmp_path / "out")
    assert evaluate(uri, out=out, samples=1)["macro_mean"]["ap"]["value"] is None
    for pairs in ("auto", {"dalle": "laion"}):
        result = evaluate(uri, out=out, pairs=pairs, samples=1)  # type: ignore[arg-type]
        assert result["pairs"] == {"dalle": "laion"} and set(result["generators"]) == {"dalle"}
        assert result["generators"]["dalle"]["ap"]["value"] == 1.0


# Robustness.


def test_chains_are_read() -> None:
    assert parse_chains("standard") == STANDARD_CHAINS and parse_chains("social") == SOCIAL
    assert parse_chains("jpeg:75, resize:0.5+jpeg:75,jpeg:75") == ("jpeg:75", "resize:0.5+jpeg:75")


@pytest.mark.parametrize("text", ["", "jpeg:75,", "jpeg", "swirl:3", "jpeg:0", "s3://bucket"])
def test_what_is_no_chain_is_refused_before_anything_is_read(text: str) -> None:
    with pytest.raises(ConfigError):
        evaluate("s3://nowhere/at-all", out="s3://nowhere/else", robustness=text)


def test_robustness_of_published_verdicts_needs_their_transforms(tmp_path: Path) -> None:
    publish(tmp_path / "scored", labelled_rows() + labelled_rows("jpeg:75") + labelled_rows("blur:1"))
    uri, out = str(tmp_path / "scored"), str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no verdicts under jpeg:30; give the source .* --detector"):
        evaluate(uri, out=out, robustness="jpeg:75,jpeg:30")
    assert not (tmp_path / "out").exists()
    assert list(evaluate(uri, out=out, robustness="jpeg:75", samples=1)["robustness"]) == ["jpeg:75"]
    assert list(evaluate(uri, out=out, samples=1)["robustness"]) == ["jpeg:75", "blur:1"]


def test_source_is_scored_once_under_each_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`score` is tested where it is: here it publishes what it would, beside verdicts of another detector."""
    source, out = str(tmp_path / "source.parquet"), tmp_path / "out"
    scored: list[tuple[str, Sequence[str]]] = []
    forms = [(row, chain) for row in labelled_rows() for chain in (None, "jpeg:75", "blur:1")]

    def score(given: str, *, out: str, transforms: Sequence[str], **_: Any) -> dict[str, Any]:
        scored.append((given, tuple(transforms)))
        ids = {(row["uri"], row["transform"]): row["image_id"] for row in listed(given, ("", *transforms))}
        rows = [
            {
                **row,
                "transform": chain,
                "image_id": ids[row["uri"], chain],
                "label": 1 - row["label"],
                "generator": "old",
            }
            for row, chain in forms
            if chain is None or chain in transforms
        ]
        publish(Path(out), [*rows, verdict_row("/gone", 0.5, label=1, generator="old")])
        publish(Path(out), [{**row, "detector_id": "e" * 16, "prob_fake": 0.5} for row in rows])
        return ALL_READ

    def list_source(names: Sequence[str]) -> None:
        rows = [
            {"uri": row["uri"], "label": row["label"], "generator": row["generator"], "split": name}
            for row, name in zip(labelled_rows(), names, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows), source)

    monkeypatch.setattr("jobs.workflows.evaluate.score", score)
    monkeypatch.setattr(module, "_bundle_id", lambda *_: "d" * 16)
    list_source(["train"] * len(labelled_rows()))
    result = evaluate(source, out=str(out), detector="bundle", robustness="jpeg:75,blur:1", samples=QUICK)
    assert scored == [(source, ("jpeg:75", "blur:1"))]
    assert list(result["robustness"]) == ["jpeg:75", "blur:1"] and result["detector_id"] == "d" * 16
    assert sorted(path.name for path in out.iterdir()) == [*FILES, "scored"]
    # labels and generators are the source's, whatever was published; what it does not list is not compared
    expected = compare(verdict_table(*labelled_rows()), samples=QUICK)
    assert result["generators"] == expected["generators"] and result["robustness"]["blur:1"]["failed"] == 0
    assert result["rows"]["seen"] == ["train"] and result["rows"]["split"] == "train"
    # and so are its splits
    list_source(["test" if i % 2 else "train" for i in range(len(labelled_rows()))])
    result = evaluate(source, out=str(out), detector="bundle", samples=QUICK)
    assert result["rows"]["split"] == "test" and result["rows"]["used"] == len(labelled_rows()) // 2


# Alignment.


def test_source_is_scored_raw_aligned_and_under_transforms_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = (None, "jpeg:96", "jpeg:96+blur:1")
    source, rows, scored = str(tmp_path / "source.parquet"), labelled_rows(), []
    table = pa.table({name: [row[name] for row in rows] for name in ("uri", "label", "generator")})
    pq.write_table(table, source)

    def score(given: str, *, out: str, transforms: Sequence[str], **_: Any) -> dict[str, Any]:
        scored.append(tuple(transforms))
        ids = {(row["uri"], row["transform"]): row["image_id"] for row in listed(given, ("", *transforms))}
        forms = [{**row, "transform": chain, "image_id": ids[row["uri"], chain]} for row in rows for chain in chains]
        publish(Path(out), [{**form, "prob_fake": 0.5} if form["transform"] == "jpeg:96" else form for form in forms])
        return ALL_READ

    monkeypatch.setattr(module, "score", score)
    monkeypatch.setattr(module, "_bundle_id", lambda *_: "d" * 16)
    options = {"align": "jpeg:96", "robustness": "blur:1", "samples": QUICK}
    result = evaluate(source, out=str(tmp_path / "out"), detector="bundle", **options)  # type: ignore[arg-type]
    assert scored == [chains[1:]]
    assert result["generators"] == compare(verdict_table(*rows), samples=QUICK)["generators"]
    both = result["alignment"]
    assert (both["images"], both["unpaired"]) == (len(rows), 0)
    assert both["raw"]["macro_mean"]["ap"]["value"] == result["macro_mean"]["ap"]["value"]
    assert both["aligned"]["macro_mean"]["auroc"]["value"] == 0.5 and "sd v1.4" in both["parted"]
    assert result["robustness"]["blur:1"]["macro_mean"]["ap"]["value"] == result["macro_mean"]["ap"]["value"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Raw and aligned" in page and "applied after <code>jpeg:96</code>" in page


def test_published_verdicts_have_raw_and_aligned_side_by_side(tmp_path: Path) -> None:
    rows = [{**row, "transform": chain} for row in labelled_rows() for chain in (None, "jpeg:96")]
    uri, out = _stored(verdict_table(*rows), tmp_path / "v.parquet"), tmp_path / "out"
    common = ("evaluate", uri, "--out", str(out), "--samples", "2")
    code, shown, _ = run_command(*common, "--align", "jpeg:96")
    assert code == 0 and "Raw and aligned (jpeg:96) part at none of the 4 generators" in shown
    assert json.loads((out / "evaluation.json").read_text())["alignment"]["images"] == len(labelled_rows())
    code, shown, _ = run_command(*common)
    assert code == 0 and "aligned" not in shown
    assert json.loads((out / "evaluation.json").read_text())["alignment"] is None
    code, _, log = run_command(*common, "--align", "jpeg:95")
    assert code == 2 and f"--align, --robustness: {uri} holds no verdicts under jpeg:95; give the source" in log


@pytest.mark.parametrize("text", ["resize", "jpeg:0", "swirl:3", "resize:0.5", ""])
def test_chain_that_is_no_alignment_is_wrong_usage_before_anything_is_read(text: str) -> None:
    code, shown, log = run_command("evaluate", "s3://nowhere/at-all", "--out", "s3://nowhere/else", "--align", text)
    assert (code, shown) == (2, "") and len(log.splitlines()) == 1 and "--align" in log


ALL_READ: dict[str, Any] = {"unread": [], "unread_count": 0}
"""Of a source that could be read whole."""


def listed(source: str, transforms: Sequence[str]) -> Rows:
    """A source as a manifest."""
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(source, f"{folder}/manifest.parquet", transforms=transforms)
        rows: Rows = pq.read_table(f"{folder}/manifest.parquet").to_pylist()
    return rows


@pytest.mark.parametrize("name", ["pictures.tar", "pictures.parquet"])
def test_every_source_that_can_be_scored_can_be_evaluated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / name
    if name.endswith(".tar"):
        place.write_bytes(b"")
    else:
        place.mkdir()
    monkeypatch.setattr(module, "_score", lambda *_: (verdict_table(*labelled_rows()), ALL_READ))
    monkeypatch.setattr(module, "_bundle_id", lambda *_: "d" * 16)
    assert evaluate(str(place), out=str(tmp_path / "out"), detector="bundle", samples=1)["failed"] == 0


def test_detector_beside_verdicts_chooses_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = _stored(verdict_table(*labelled_rows()), tmp_path / "v.parquet")
    monkeypatch.setattr(module, "_bundle_id", lambda detector, _: detector)
    assert evaluate(uri, out=str(tmp_path / "out"), detector="d" * 16, samples=1)["detector_id"] == "d" * 16
    with pytest.raises(ConfigError, match="holds no verdict of detector e"):
        evaluate(uri, out=str(tmp_path / "out"), detector="e" * 16, samples=1)
    with pytest.raises(ConfigError, match="give one of them"):
        evaluate(uri, out=str(tmp_path / "out"), detector="d" * 16, detector_id="e" * 16, samples=1)


# The command.


def test_command_takes_pairs_splits_and_transforms(tmp_path: Path) -> None:
    rows = [verdict_row(f"/{chain}/{i}", i / 9, label=1, generator="dalle", transform=chain)
            for chain in (None, *STANDARD_CHAINS) for i in range(9)]  # fmt: skip
    rows += [verdict_row(f"/r{i}", i / 9, label=0, generator="other") for i in range(9)]
    uri, out = _stored(verdict_table(*rows), tmp_path / "v.parquet"), tmp_path / "out"
    common = ("evaluate", uri, "--out", str(out), "--samples", "1")
    code, shown, log = run_command(*common, "--pair", "dalle=other", "--split", "all", "--robustness")
    assert (code, shown) == (0, (out / "evaluation.txt").read_text())
    assert f"report: {out / 'report.html'}" in log
    written = json.loads((out / "evaluation.json").read_text())
    assert written["pairs"] == {"dalle": "other"} and set(written["robustness"]) == set(STANDARD_CHAINS)
    code, _, log = run_command(*common, "--robustness", "jpeg:1")
    assert code == 2 and "no verdicts under jpeg:1" in log


@pytest.mark.parametrize(("allowed", "expected"), [("0", 3), ("1", 3), ("2", 0)])
def test_command_that_scores_says_what_of_the_source_could_not_be_read(
    allowed: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [verdict_row(f"/{i}", i / 9, label=i % 2, generator="g") for i in range(10)]
    unread = {"unread": ["/a: Permission denied", "/b.tar is cut"], "unread_count": 2}
    monkeypatch.setattr(module, "_score", lambda *_: (verdict_table(*rows), unread))
    monkeypatch.setattr(module, "_bundle_id", lambda *_: "d" * 16)
    (tmp_path / "pictures").mkdir()
    common = (
        "evaluate",
        str(tmp_path / "pictures"),
        "--detector",
        "b",
        "--out",
        str(tmp_path / "out"),
        "--samples",
        "1",
    )
    code, _, log = run_command(*common, "--max-left-out", allowed)
    assert code == expected and (tmp_path / "out" / "report.html").exists()
    assert ("2 folders or containers of the source could not be read" in log) is (expected == 3)
    assert ("/a: Permission denied; /b.tar is cut" in log) is (expected == 3)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["unread_count"] == 2


@pytest.mark.parametrize(
    ("scores", "failed", "allowed", "expected"),
    [(True, 0, "0%", 0), (True, 5, "1%", 3), (True, 5, "50%", 0), (False, 5, "1%", 0)],
)
def test_command_that_scores_says_when_too_many_failed(
    scores: bool, failed: int, allowed: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [verdict_row(f"/{i}", i / 9, label=i % 2, generator="g") for i in range(10)]
    rows += [verdict_row(f"/f{i}", None, label=1, generator="g") for i in range(failed)]
    monkeypatch.setattr(module, "_score", lambda *_: (verdict_table(*rows), ALL_READ))
    monkeypatch.setattr(module, "_bundle_id", lambda *_: "d" * 16)
    (tmp_path / "pictures").mkdir()
    uri = str(tmp_path / "pictures") if scores else _stored(verdict_table(*rows), tmp_path / "v.parquet")
    common = ("evaluate", uri, "--detector", "bundle", "--out", str(tmp_path / "out"), "--samples", "1")
    code, _, log = run_command(*common, "--max-failed", allowed)
    assert code == expected and (tmp_path / "out" / "report.html").exists()
    assert ("more than the allowed" in log) is (expected == 3)
