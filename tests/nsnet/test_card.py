"""The model card: what was measured, what is undefined and what limits there are, whatever hostile names say."""

import html
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from nsnet.calibration import Calibration, OperatingPoint
from nsnet.card import model_card
from nsnet.config import to_dict
from nsnet.configuration import DetectorConfig

HOSTILE = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "a | b | c",
    "![x](http://evil.example/x.png)",
    "`code`",
    "line\nbreak\r# heading",
    "**bold** _it_ ~~gone~~",
    "www.evil.example http://evil.example mail@evil.example @someone #1",
    "\u202egnp.exe",
    "x" * 500,
    "\\",
    "$x$ &lt;b&gt;",
]


def numbers(acc: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    value = {"value": acc, "low": low, "high": high}
    undefined = {"value": None, "low": None, "high": None}
    return {"real": 10, "fake": 20, "acc": value, "ap": value, "auroc": undefined, "tpr_at_fpr_1": undefined}


def record(*names: str) -> dict[str, Any]:
    generators = {name: numbers(0.5 + i / 100, 0.25, 0.75) for i, name in enumerate(names)}
    return {
        "source": "s3://pictures/2026", "recipe": "tiny", "variant": "advanced", "seed": 7, "leave_out": None,
        "split": {"train": {name: [4, 5] for name in names}, "val": {names[0]: [2, 3]}}, "leaking": 0,
        "validation": {"generators": generators, "macro_mean": numbers(0.625, 0.5, 0.75)},
        "test": {"generators": generators, "macro_mean": numbers(0.625, 0.5, 0.75)},
    }  # fmt: skip


def card(training: dict[str, Any], calibration: Calibration | None = None) -> str:
    return model_card(
        "0123456789abcdef", to_dict(DetectorConfig()), to_dict(calibration or Calibration()), training
    )  # fmt: skip


def rendered(text: str) -> str:
    """The card as HTML."""
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, as text."""
    section = rendered(text).split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def test_numbers_come_with_their_intervals_worst_generator_first() -> None:
    training = record("B", "A")
    training["test"]["generators"]["A"] = numbers(0.25, 0.125, 0.5)
    rows = table(card(training), "Test")
    assert rows[0] == ["generator", "real", "fake", "acc", "AP", "AUROC", "TPR at 1 % FPR"]
    assert [row[0] for row in rows[1:]] == ["A", "B", "macro mean"]
    assert rows[1][3] == "0.250 (0.125 to 0.500)" and rows[3][3] == "0.625 (0.500 to 0.750)"


def test_undefined_is_said() -> None:
    training = record("A")
    training["test"]["generators"]["A"] = numbers(None)
    rows = table(card(training), "Test")
    assert rows[1][3:] == ["undefined"] * 4 and "0.000" not in card(training)


def test_images_of_each_split_are_counted() -> None:
    assert table(card(record("A", "B")), "Data")[1:] == [["A", "4 + 5", "2 + 3"], ["B", "4 + 5", "0 + 0"]]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_name_stays_one_cell_of_text(name: str) -> None:
    fields = {"source": name, "variant": name, "leave_out": name, "calibrated_from": name}
    text, plain = card(record(name, "B") | fields), card(record("A", "B") | dict.fromkeys(fields, "A"))
    for heading in ("Data", "Validation", "Test"):
        found, expected = table(text, heading), table(plain, heading)
        assert [len(row) for row in found] == [len(row) for row in expected], heading
        assert max(len(row[0]) for row in found) < 200
    assert {*(elements(text) - elements(plain))} <= {"code"}  # around the @ of an address
    # of which GitHub would make links
    assert not re.search(r"(?<!\\)://|www\.|(?<!`)@", text.split("\n```")[0])
    assert "\u202e" not in text
    assert json.loads(fenced(text))["source"] == name  # as it was, where nothing can come of it


def elements(text: str) -> Counter[str]:
    """How often each element of HTML is begun."""
    return Counter(re.findall(r"<([a-z0-9]+)", rendered(text)))


def fenced(text: str) -> str:
    """What is in the block of code."""
    found = re.findall(r"<pre><code class=\"language-json\">(.*?)</code></pre>", rendered(text), re.DOTALL)
    assert len(found) == 1
    return html.unescape(found[0])


def test_block_of_code_cannot_be_ended_from_inside() -> None:
    training = record("A") | {"source": "```\n# heading\n````"}
    assert json.loads(fenced(card(training)))["source"] == training["source"]
    assert elements(card(training)) == elements(card(record("A")))


@pytest.mark.parametrize(
    ("point", "said"),
    [
        (OperatingPoint(), "most correct verdicts; version 1"),
        (OperatingPoint(rule="fpr", fpr=0.001), "at most 0.100% of real images called fake"),
        (
            OperatingPoint(rule="cost", false_alarm_cost=10, miss_cost=2, base_rate=0.01),
            "a false alarm costs 10, a miss 2, at 1.00% fakes",
        ),
    ],
)
def test_operating_point_is_said_in_words(point: OperatingPoint, said: str) -> None:
    assert said in card({}, Calibration(point=point))
    assert "(not fitted)" in card({}, Calibration(point=point))
    assert "(fitted on 25 validation images)" in card({}, Calibration(point=point, fitted_on=25))


def test_limits_name_what_flatters_and_what_was_left_out() -> None:
    text = card(record("A") | {"leave_out": "pro_gan", "leaking": 12})
    assert "Training used no image of pro\\_gan" in text and "12 images of validation and test are" in text
    assert "accuracies are too optimistic" in text.split("## Validation\n")[1]
    assert "accuracies are too optimistic" not in text.split("## Validation\n")[0]
    plain = card(record("A"))
    assert "Training used no image" not in plain and "near-duplicates" not in plain


def test_imported_head_has_a_card_without_numbers() -> None:
    text = card({"imported_head": "fc.pth", "sha256": "0" * 64, "recipe": "vit-l-14"})
    assert '"imported_head": "fc.pth"' in text and "## Test" not in text and "## Data" not in text


def test_card_needs_no_heavy_imports() -> None:
    code = "import sys, nsnet.card; print(sorted({'torch', 'ray', 'pyarrow'} & {*sys.modules}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
