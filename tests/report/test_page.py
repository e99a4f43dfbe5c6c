"""The page of an evaluation: whole in itself, honest, and not to be broken by the names in it."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from jobs.dataset.manifest import image_id
from jobs.evaluation.alignment import compare_aligned
from jobs.evaluation.comparison import METRICS, ROBUSTNESS_METRICS, compare
from jobs.evaluation.curves import curves
from jobs.report.page import COLUMNS, MORE_COLUMNS, render
from jobs.report.plots import COLOURS, MAX_ROWS, shown
from jobs.report.wording import alarms, per_cent, points
from tests.support.tables import verdict_row, verdict_table

Rows = list[dict[str, Any]]
Result = dict[str, Any]
Attributes = dict[str, str | None]

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style><script>alert(1)</script>",
    "$x^2$ and \\frac{1}{2}", "{{ 7 * 7 }}{% raw %}", "x" * 10_000, "line\nbreak\ttab\rreturn",
    "nul\x00bell\x07\x1b[2J",
    "\u202eright to left override", "مولد الصور", "画像生成モデル" * 10, "Z" + "\u0335\u0321\u031b" * 50 + "algo", "",
    "&lt;b&gt;", "javascript:alert(1)", "url(//evil.example/x)", None,
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


def made_rows(*names: str | None, size: int = 30, chains: tuple[str | None, ...] = (None,), seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    rows = []
    for place, name in enumerate(names):
        for label in (0, 1):
            for i, x in enumerate(rng.normal(size=size) + (1 + place % 5) * (label - 0.5)):
                for weaker, chain in enumerate(chains):
                    p = float(1 / (1 + np.exp(-x / (1 + weaker))))
                    verdict = "uncertain" if 0.45 < p < 0.55 else "fake" if p >= 0.5 else "real"
                    fields = {"label": label, "generator": name, "verdict": verdict, "transform": chain}
                    rows.append(verdict_row(f"/{place}/{label}/{i}/{chain}", p, **fields))
    return rows


def made_result(rows: Rows, /, **values: Any) -> Result:
    table = verdict_table(*rows)
    return {
        "verdicts": "s3://bucket/verdicts",
        "detector_id": "d" * 16,
        "evaluated_at": "2026-01-02T03:04:05+00:00",
        "rows": {"split": None, "used": table.num_rows, "left_out": 0, "seen": []},
        "threshold": None,
        **compare(table, samples=20),
        "curves": curves(table),
        **values,
    }


@cache
def usual() -> Result:
    chains = (None, "jpeg:90", "jpeg:50", "resize:0.5", "resize:2", "screenshot:0.75", "blur:1+jpeg:60")
    return made_result(made_rows("Glide", "ADM", "sd v1.4", chains=chains))


@cache
def hostile() -> Result:
    rows = made_rows(*HOSTILE, size=6, chains=(None, "jpeg:75", "<svg onload=alert(1)>:3", "jpeg:<i>"))
    return made_result(
        rows,
        verdicts="s3://" + "<b>x</b>" * 1000,
        detector_id="<script>",
        rows={"split": "<b>", "used": 1, "left_out": 2, "seen": ["<b>"]},
    )


@cache
def aligned() -> Result:
    """Raw and aligned, with names of anybody's making; an image is the same in both forms."""
    rows = made_rows("Glide", "ADM", *HOSTILE, size=12, chains=(None, "jpeg:96", "jpeg:96+blur:1"))
    for row in rows:
        row["image_id"] = image_id(str(row["uri"]).rpartition("/")[0], "")
        if row["generator"] == "ADM" and row["transform"]:
            row |= {"prob_fake": 0.5, "verdict": "fake"}
    table = verdict_table(*rows)
    both = compare_aligned(table, "jpeg:96", samples=50)
    return made_result(rows) | compare(table, samples=20, align="jpeg:96") | {"alignment": both}


@cache
def page(kind: str) -> str:
    return render({"usual": usual, "hostile": hostile, "aligned": aligned}[kind]())


class Parsed(HTMLParser):
    """Elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, Attributes]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, name: str) -> Iterator[str]:
        return (found[name] or "" for _, found in self.elements if name in found)


def plots(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


# Names of anybody's making.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "plain"), ("  two \n words\t", "two words"), ("", "(unnamed)"), ("\u202e\x00", "(unnamed)"),
        ("a\x1b[2Jb\u2066c\ud800", "a[2Jbc"), ("x" * 10, "x" * 10), ("x" * 11, "x" * 9 + "…"),
        ("画" * 6, "画" * 4 + "…"),
        ("画" * 5, "画" * 5), ("e\u0301", "é"), ("q\u0301\u0302\u0303", "q\u0301"),
    ],
)  # fmt: skip
def test_name_is_one_short_line(name: str, expected: str) -> None:
    assert shown(name, 10) == expected


@pytest.mark.parametrize("name", [name for name in HOSTILE if name is not None])
def test_any_name_becomes_printable_and_short(name: str) -> None:
    found = shown(name, 20)
    assert found and found.isprintable() and len([letter for letter in found if letter.isalnum()]) <= 20
    assert shown(found, 20) == found


# Safety.


@pytest.mark.parametrize("kind", ["usual", "hostile", "aligned"])
def test_page_asks_nothing_of_anybody(kind: str) -> None:
    parsed = Parsed(page(kind))
    assert "http:" not in page(kind) and "https:" not in page(kind) and "@import" not in page(kind)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form", "image", "foreignobject", "audio"}
    for name in ("src", "srcset", "action", "data", "poster", "background", "xlink:href"):
        assert list(parsed.attributes(name)) == []
    links = [target for target in parsed.attributes("href") if not target.startswith("#")]
    assert links == ["data:,"]
    styles = [*parsed.attributes("style"), *re.findall("<style>.*?</style>", page(kind), re.DOTALL)]
    assert all(target.startswith("#") for style in styles for target in re.findall(r"url\(['\"]?([^)]*)", style))
    (policy,) = [found["content"] for _, found in parsed.elements if found.get("http-equiv")]
    assert policy is not None and "default-src 'none'" in policy and "script-src" not in policy


def test_names_are_text_and_nothing_else() -> None:
    text = page("hostile")
    assert {tag for tag, _ in Parsed(text).elements} <= {tag for tag, _ in Parsed(page("usual")).elements}
    assert not [name for _, found in Parsed(text).elements for name in found if name.startswith("on")]
    assert "alert(1)" in "".join(Parsed(text).text) and "<script" not in text and "<img" not in text
    assert "49" not in [data.strip() for data in Parsed(text).text] and "{{ 7 * 7 }}" in text


def test_names_have_no_control_characters_and_no_mathematics() -> None:
    text = page("hostile")
    isolates = {"\u2068", "\u2069"}  # ours, around a name in a sentence
    assert all(letter.isprintable() or letter == "\n" or letter in isolates for letter in text)
    labels = ["".join(element.itertext()) for plot in plots(text) for element in plot.iter("text")]
    assert "$x^2$ and \\frac{1}{2}" in labels
    assert "x" * 70 not in text and len(text) < 400_000


def test_style_holds_numbers_only() -> None:
    for kind in ("usual", "hostile"):
        for style in (found["style"] for tag, found in Parsed(page(kind)).elements if tag in ("td", "i", "b", "span")
                      if "style" in found):  # fmt: skip
            assert style and re.fullmatch(r"(--share|left|width): [\d.]+%(; width: [\d.]+%)?", style), style


# Plots.


@pytest.mark.parametrize("kind", ["usual", "hostile"])
def test_plots_are_well_formed_named_and_in_the_colours_of_the_page(kind: str) -> None:
    found = plots(page(kind))
    assert len(found) >= 6
    for plot in found:
        assert plot.get("role") == "img" and plot.get("viewBox", "").startswith("0 0 ")
        title, description = plot.find("title"), plot.find("desc")
        assert title is not None and description is not None and title.text and description.text
        assert plot.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        for element in plot.iter():
            colours = re.findall(r"#[0-9a-f]{6}", element.get("style", ""))
            assert set(colours) <= {"#000000", "#ffffff"}, (element.tag, element.attrib)
            assert set(re.findall(r"var\(--(\w+)\)", element.get("style", ""))) <= set(COLOURS.values())


@pytest.mark.parametrize("kind", ["usual", "hostile"])
def test_identities_are_unique_and_every_reference_has_one(kind: str) -> None:
    parsed = Parsed(page(kind))
    identities = list(parsed.attributes("id"))
    assert len(identities) == len(set(identities))
    used = {target[1:] for target in parsed.attributes("href") if target.startswith("#")}
    used |= {name for value in parsed.attributes("aria-labelledby") for name in value.split()}
    used |= set(re.findall(r"url\(#([\w.-]+)\)", page(kind)))
    assert used <= set(identities)


def test_same_result_gives_the_same_page_whatever_the_style_of_this_machine() -> None:
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "xtick.major.pad": 30, "lines.markersize": 1}):
        assert render(usual()) == page("usual")
        assert matplotlib.rcParams["font.size"] == 30


def test_generators_stand_from_worst_to_best_with_their_values() -> None:
    (plot,) = [plot for plot in plots(page("usual")) if plot.get("aria-labelledby", "").startswith("ap-")]
    labels = ["".join(element.itertext()) for element in plot.iter("text")]
    aps = {name: numbers["ap"]["value"] for name, numbers in usual()["generators"].items()}
    ranked = sorted(aps, key=lambda name: aps[name])
    assert [label for label in labels if label in aps] == ranked
    values = [f"{100 * aps[name]:.1f}" for name in ranked]
    assert [label for label in labels if label in values] == values


def test_kind_of_transform_with_several_levels_has_a_plot_and_all_others_share_one() -> None:
    prefixes = [plot.get("aria-labelledby", "").split("-title")[0] for plot in plots(page("usual"))]
    assert prefixes == [
        "acc",
        "ap",
        "roc",
        "reliability",
        "histogram",
        "precision",
        "level-jpeg",
        "level-resize",
        "others",
    ]
    labels = {
        prefix: ["".join(element.itertext()) for element in plot.iter("text")]
        for prefix, plot in zip(prefixes, plots(page("usual")), strict=True)
    }
    assert labels["level-jpeg"][:3] == ["none", "90", "50"]
    assert labels["level-resize"][:3] == ["0.5", "none", "2"]
    assert {"none", "screenshot:0.75", "blur:1+jpeg:60"} <= set(labels["others"])


def test_plot_names_the_worst_of_many_generators_and_the_table_all() -> None:
    names = [f"generator {i}" for i in range(MAX_ROWS + 5)]
    result = made_result(made_rows(*names, size=3))
    text = render(result)
    (plot,) = [plot for plot in plots(text) if plot.get("aria-labelledby", "").startswith("acc-")]
    labels = {"".join(element.itertext()) for element in plot.iter("text")}
    assert len(labels & set(names)) == MAX_ROWS
    best = max(names, key=lambda name: (result["generators"][name]["acc"]["value"], name))
    assert best not in labels and "5 more generators, all better, are only in the table." in text
    assert all(f"<bdi>{name}</bdi>" in text for name in names)


# What is said.


def test_page_says_what_was_measured_on_what() -> None:
    text = "".join(Parsed(page("usual")).text)
    result = usual()
    for expected in ("d" * 16, "s3://bucket/verdicts", "2026-01-02 03:04 UTC", "90 real, 90 fake", "How to read this"):
        assert expected in text
    for name in ("ap", "acc", "auroc"):
        number = result["macro_mean"][name]
        assert per_cent(number["value"]) in text
        assert f"{per_cent(number['low'])} to {per_cent(number['high'])}" in text
    assert per_cent(result["macro_mean"]["tpr_at_fpr_1"]["value"]) in text
    worst = min(result["generators"], key=lambda name: result["generators"][name]["acc"]["value"])
    assert f"Worst generator: \u2068{worst}\u2069" in text
    assert f"{result['all']['uncertain']} verdicts are uncertain" in text


def test_every_metric_of_every_generator_is_on_the_page() -> None:
    cells, result = "".join(Parsed(page("usual")).text), usual()
    for name in METRICS:
        for numbers in (*result["generators"].values(), result["macro_mean"], result["all"]):
            assert name in {**COLUMNS, **MORE_COLUMNS, "acc_decided": "", "uncertain_share": ""}, name
            if name in {**COLUMNS, **MORE_COLUMNS}:
                assert per_cent(numbers[name]["value"]) in cells


def test_threshold_that_was_asked_for_is_named() -> None:
    text = " ".join("".join(Parsed(render(made_result(made_rows("g"), threshold=0.5))).text).split())
    assert (
        "the requested threshold of 0.5, not the detector's own" in text and "the detector's own threshold" not in text
    )
    assert "the detector's own threshold" in "".join(Parsed(page("usual")).text)


def test_tables_name_their_columns_and_rows() -> None:
    headings = [found for tag, found in Parsed(page("usual")).elements if tag == "th"]
    assert headings and all(found.get("scope") in ("col", "row") for found in headings)


def test_what_is_undefined_is_said_and_no_zero() -> None:
    rows = made_rows("both") + [row for row in made_rows("fakes only", seed=1) if row["label"] == 1]
    text = render(made_result(rows))
    assert "undefined" in text and "One class only" in text and "\u2068fakes only\u2069" in text
    lone = render(made_result([row for row in rows if row["label"] == 1]))
    assert "ROC" not in "".join("".join(plot.itertext()) for plot in plots(lone))
    assert "What an alarm is worth" not in lone


def test_images_that_all_failed_have_a_page_all_the_same() -> None:
    result = made_result([verdict_row("/a", None, label=1, generator="g"), verdict_row("/b", None, label=0)])
    text = render(result)
    assert "2 labelled images failed" in text and "undefined" in text and len(plots(text)) == 2


def test_verdicts_that_are_all_uncertain_have_a_page() -> None:
    rows = [row | {"verdict": "uncertain"} for row in made_rows("g")]
    assert "without them the mean accuracy is undefined" in " ".join(render(made_result(rows)).split())


@pytest.mark.parametrize(("split", "warned"), [("test", False), ("val", True), ("train", True)])
def test_numbers_on_images_that_were_trained_on_are_warned_of(split: str, warned: bool) -> None:
    seen = [split] if warned else []
    result = made_result(made_rows("g"), rows={"split": split, "used": 60, "left_out": 7, "seen": seen})
    text = render(result)
    assert (("so the numbers are too high") in text) is warned
    assert f"{split}; 7 rows of other splits are left out" in text


def test_pair_is_named_in_the_table() -> None:
    rows = [row for row in made_rows("a", "b") if row["label"] == (row["generator"] == "a")]
    result = made_result(rows) | compare(verdict_table(*rows), samples=5, pairs={"a": "b"})
    assert "reals of <bdi>b</bdi>" in render(result)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, "0.0"), (1.0, "100.0"), (0.9996, "99.96"), (0.99996, ">99.99"), (0.0003, "0.03"), (0.00004, "<0.01"),
     (0.5, "50.0"), (0.1234, "12.3")],
)  # fmt: skip
def test_only_all_is_a_hundred_per_cent_and_only_none_is_zero(share: float, expected: str) -> None:
    assert per_cent(share) == expected


def test_worth_of_an_alarm_is_counted_out() -> None:
    rows = [verdict_row(f"/r{i}", 0.5, label=0, verdict="fake" if i < 5 else "real") for i in range(100)]
    rows += [verdict_row(f"/f{i}", 0.5, label=1, verdict="fake" if i < 80 else "real") for i in range(100)]
    sentence = alarms(made_result(rows))
    # 1 % of 100,000 are 1,000 fakes, of which 800 are found; 5 % of 99,000 reals are 4,950 false alarms
    assert sentence is not None
    assert "flag about 5,750, and 800 of these would be fake: 13.9 % of the alarms are right." in sentence
    spotless = [row | {"verdict": "real"} if row["label"] == 0 else row for row in rows]
    cautious = alarms(made_result(spotless))
    # 0 of 100 reals: up to 3.0 % may be flagged, 2,922 of 99,000
    assert cautious is not None and "flag about 800, and 800 of these would be fake: 100.0 %" in cautious
    assert "cannot rule out that 3.0 % of reals are flagged, and then 21.5 % are right" in cautious
    assert alarms(made_result([row for row in rows if row["label"] == 1])) is None


# Raw and aligned.


def test_raw_and_aligned_stand_side_by_side() -> None:
    text, both = page("aligned"), aligned()["alignment"]
    table = re.findall(r'<table class="both">.*?</table>', text, re.DOTALL)[0]
    (row,) = [row for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL) if "<bdi>ADM</bdi>" in row]
    cells = re.findall(r"<td( class=\"parted\")?>(.*?)(?:<|$)", row)
    forms = [both[form]["generators"]["ADM"] for form in ("raw", "aligned")]
    for place, metric in enumerate(ROBUSTNESS_METRICS):
        shown_cells = [found for _, found in cells[3 * place : 3 * place + 2]]
        assert shown_cells == [per_cent(numbers[metric]["value"]) for numbers in forms]
        assert bool(cells[3 * place + 2][0]) is (metric in both["parted"]["ADM"])
    assert cells[2][1] == points(both["difference"]["generators"]["ADM"]["acc"]["value"])
    assert cells[2][1].startswith("−")
    assert "Raw and aligned (jpeg:96) part at " in text and "applied after <code>jpeg:96</code>" in text
    assert "Raw and aligned" not in page("usual")


def test_names_beside_an_alignment_are_text_and_nothing_else() -> None:
    text = page("aligned")
    assert {tag for tag, _ in Parsed(text).elements} <= {tag for tag, _ in Parsed(page("usual")).elements}
    assert "alert(1)" in "".join(Parsed(text).text) and "<script" not in text and "<img" not in text


@pytest.mark.parametrize(
    ("difference", "expected"), [(0.1234, "+12.3"), (-0.5, "−50.0"), (0.0, "0.0"), (-0.0001, "0.0"), (1.0, "+100.0")]
)
def test_difference_is_in_points_with_its_sign(difference: float, expected: str) -> None:
    assert points(difference) == expected


# Colours.


def contrast(first: str, second: str) -> float:
    """Of WCAG 2, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_colours_stand_out_from_their_grounds_in_light_and_dark() -> None:
    schemes = re.findall(r":root \{(.*?)\}", page("usual"), re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for ground in ("page", "surface", "note"):
            assert contrast(colours["ink"], colours[ground]) >= 7
            assert contrast(colours["muted"], colours[ground]) >= 4.5
        for mark in ("main", "second", "real", "fake"):
            assert contrast(colours[mark], colours["surface"]) >= 4.5


# In a browser.


def browse(text: str, folder: Path, *options: str) -> str:
    """The page as a browser has it after loading."""
    assert BROWSER is not None
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom",
        (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_nothing_runs_in_a_browser(tmp_path: Path) -> None:
    smuggled = page("hostile").replace("</main>", "<script>document.title = 'owned'</script></main>")
    seen = browse(smuggled, tmp_path)
    assert "<title>Evaluation of detector &lt;script&gt;</title>" in seen


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_hostile_names_do_not_widen_the_page_of_a_phone(tmp_path: Path) -> None:
    measure = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join('/')</script></body>"
    open_page = re.sub(r"<meta http-equiv.*?>", "", page("hostile")).replace("</body>", measure)
    seen = browse(open_page, tmp_path, "--window-size=400,2000")
    found = re.search(r"<title>(\d+)/(\d+)</title>", seen)
    assert found is not None and int(found[2]) <= int(found[1]) <= 500
