"""Draw the plots of an evaluation as SVG elements for an HTML page.

Lengths are CSS pixels. Each plot is drawn in the colours of `COLOURS`, which are then replaced by CSS variables of the
page, so that one plot serves the dark and the light style. The same numbers give the same bytes.
"""

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jobs.evaluation.curves import HISTOGRAM_BINS, MIN_FPR

INK, MUTED, GRID, SURFACE = "#010203", "#010204", "#010205", "#010206"
REAL, FAKE, MAIN, SECOND = "#010207", "#010208", "#010209", "#01020a"
COLOURS: Final = {
    INK: "ink", MUTED: "muted", GRID: "line", SURFACE: "surface", REAL: "real", FAKE: "fake", MAIN: "main",
    SECOND: "second",
}  # fmt: skip
"""Drawn colours -> CSS variables of the page."""

SVG: Final = "{http://www.w3.org/2000/svg}"
LINK: Final = "{http://www.w3.org/1999/xlink}href"
WIDTH: Final = 420
SMALL_WIDTH: Final = 340
FONT: Final = 12.0
ROW: Final = 22
MAX_ROWS: Final = 40
NAME_WIDTH: Final = 22
"""Maximum columns of a name beside a plot."""

UNSEEN: Final = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of control, format and invisible characters."""

Number = Mapping[str, Any]
"""Keys: `value`, `low`, `high`; None if undefined."""

STYLE: Final[Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "axes.unicode_minus": False, "font.size": FONT,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "axes.facecolor": "none", "figure.facecolor": "none",
    "grid.color": GRID, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "xtick.major.size": 3, "ytick.major.size": 0, "axes.linewidth": 1,
    "grid.linewidth": 1, "lines.linewidth": 2, "hatch.color": GRID, "hatch.linewidth": 1, "axes.labelsize": FONT,
}  # fmt: skip


def shown(name: str, longest: int) -> str:
    """An untrusted name as one line of at most `longest` columns, without control and format characters, and with at
    most one combining mark per letter; wide letters count as two columns."""
    kept: list[tuple[str, int]] = []
    accents = width = 0
    for letter in " ".join(unicodedata.normalize("NFC", name).split()):
        category = unicodedata.category(letter)
        accents = accents + 1 if category in ("Mn", "Me") else 0
        if category in UNSEEN or accents > 1:
            continue
        columns = 0 if accents else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        kept.append((letter, columns))
        width += columns
        if width > longest:
            break
    cut = width > longest
    while cut and width > longest - 1:
        width -= kept.pop()[1]
    text = "".join(letter for letter, _ in kept).strip()
    return (text + "…" if cut else text) or "(unnamed)"


def forest(
    chart: str, rows: Sequence[tuple[str, Number]], reference: float | None, title: str, description: str,
    width: int = WIDTH,
) -> str:  # fmt: skip
    """A forest plot: one row per name with a dot and its interval, the first on top, and a line at the reference."""
    rows = rows[:MAX_ROWS]
    with _plot(chart, width, ROW * len(rows) + 36, margins=(160, 42, 8, 28)) as (figure, axes):
        lows = [number["low"] if number["low"] is not None else number["value"] for _, number in rows]
        left = _left_end(lows)
        if reference is not None:
            axes.axvline(reference, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.5, zorder=1)
        for place, (_, number) in enumerate(rows):
            _dot(axes, place, number, left)
        _name_rows(axes, [name for name, _ in rows], left, 5 if width == WIDTH else 3)
        return _svg(figure, chart, title, description)


def pairs(
    chart: str, rows: Sequence[tuple[str, Number, Number]], title: str, description: str
) -> str:  # fmt: skip
    """One row per name with a circle at the first number and a dot at the second, the first row on top."""
    rows = rows[:MAX_ROWS]
    with _plot(chart, WIDTH, ROW * len(rows) + 36, margins=(160, 18, 8, 28)) as (figure, axes):
        values = [[number["value"] for number in numbers] for _, *numbers in rows]
        left = _left_end([value for row in values for value in row])
        for place, (first, second) in enumerate(values):
            if first is None or second is None:
                _undefined(axes, place, left)
                continue
            axes.plot([first, second], [place, place], color=MAIN, linewidth=3, alpha=0.4, zorder=2, clip_on=False)
            axes.plot([first], [place], "o", color=MAIN, markerfacecolor=SURFACE, markersize=8, zorder=3, clip_on=False)
            axes.plot([second], [place], "o", color=MAIN, markersize=6, zorder=4, clip_on=False)
        _name_rows(axes, [name for name, *_ in rows], left)
        return _svg(figure, chart, title, description)


def _left_end(values: Sequence[float | None]) -> float:
    """A round number below all values, and at most 0.8."""
    left = math.floor(20 * min([value for value in values if value is not None], default=0.5) - 0.2) / 20
    return max(0.0, min(left, 0.8))


def _name_rows(axes: Axes, names: Sequence[str], left: float, ticks: int = 5) -> None:
    """Set up the axes of a plot with one row per name, whose values are shares from `left` to 1."""
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(_per_cent)
    axes.set_yticks(range(len(names)), [shown(name, NAME_WIDTH) for name in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set(xlim=(left, 1.0), ylim=(len(names) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _undefined(axes: Axes, place: int, left: float) -> None:
    axes.annotate("undefined", (left, place), (8, 0), textcoords="offset points", color=MUTED, va="center",
                  fontsize=FONT - 1, style="italic")  # fmt: skip


def _dot(axes: Axes, place: int, number: Number, left: float) -> None:
    value = number["value"]
    if value is None:
        _undefined(axes, place, left)
        return
    if number["low"] is not None:
        axes.plot([number["low"], number["high"]], [place, place], color=MAIN, linewidth=3, alpha=0.55, zorder=2,
                  solid_capstyle="round", clip_on=False)  # fmt: skip
    axes.plot([value], [place], "o", color=MAIN, markersize=7, zorder=3, clip_on=False)
    axes.annotate(f"{100 * value:.1f}", (1.0, place), (8, 0), xycoords=("axes fraction", "data"), va="center",
                  textcoords="offset points", fontsize=FONT - 1, annotation_clip=False)  # fmt: skip


def roc(curve: Mapping[str, Any], points: Mapping[float, Number], title: str, description: str) -> str:
    """The ROC curve over a logarithmic FPR, with the TPR and its interval at the FPRs of `points`."""
    with _plot("roc") as (figure, axes):
        resolution = 1.0 / curve["reals"]
        if resolution > MIN_FPR:
            axes.axvspan(MIN_FPR, min(resolution, 1.0), facecolor="none", edgecolor=GRID, hatch="////", linewidth=0)
        chance = [10 ** (exponent / 20) for exponent in range(-60, 1)]
        axes.plot(chance, chance, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.5)
        axes.plot(curve["fpr"], curve["tpr"], color=MAIN, drawstyle="steps-post")
        for fpr, number in points.items():
            if number["value"] is not None:
                _bar(axes, max(fpr, MIN_FPR * 1.04), number, MAIN, "o")
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = (0.001, 0.01, 0.1, 1.0)
        axes.set_xticks(ticks, ["0.1 %", "1 %", "10 %", "100 %"])
        axes.set(xlim=(MIN_FPR, 1.0), ylim=(0.0, 1.02), xlabel="false positive rate: reals called fake")
        _percent(axes)
        return _svg(figure, "roc", title, description)


def _bar(axes: Axes, x: float, number: Number, colour: str, marker: str) -> None:
    """Draw a marker with its interval."""
    value = number["value"]
    if number["low"] is not None:
        axes.plot([x, x], [number["low"], number["high"]], color=colour, linewidth=1.5, solid_capstyle="butt")
    axes.plot([x], [value], marker, color=colour, markersize=6, clip_on=False)


def reliability(bins: Mapping[str, Any], title: str, description: str) -> str:
    """The reliability diagram: share of fakes against mean probability, per bin."""
    with _plot("reliability") as (figure, axes):
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.5)
        axes.plot(bins["probability"], bins["fakes"], color=MAIN, linewidth=1, alpha=0.6)
        for place, x in enumerate(bins["probability"]):
            number = {"value": bins["fakes"][place], "low": bins["low"][place], "high": bins["high"][place]}
            _bar(axes, x, number, MAIN, "o")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="probability of fake, from the detector")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        _percent(axes)
        return _svg(figure, "reliability", title, description)


def histogram(curves: Mapping[str, Any], title: str, description: str) -> str:
    """The histogram of probabilities: shares of the fakes upwards and of the reals downwards, per bin."""
    with _plot("histogram") as (figure, axes):
        edges = [place / HISTOGRAM_BINS for place in range(HISTOGRAM_BINS + 1)]
        highest = 0.0
        for name, sign, colour in (("fake", 1, FAKE), ("real", -1, REAL)):
            counts = curves["histogram"][name]
            shares = [sign * count / max(1, sum(counts)) for count in counts]
            highest = max(highest, *(abs(share) for share in shares))
            axes.stairs(shares, edges, fill=True, facecolor=colour, alpha=0.85, edgecolor=colour, linewidth=1)
        highest = highest or 1.0
        if curves["uncertain"]:
            axes.axvspan(*curves["uncertain"], facecolor=MUTED, alpha=0.25, linewidth=0)
        if curves["threshold"] is not None:
            axes.axvline(curves["threshold"], color=INK, linestyle=(0, (4, 2)), linewidth=1.5)
        axes.axhline(0, color=MUTED, linewidth=1)
        for name, x, y in (("fake ↑", 0.03, 0.94), ("real ↓", 0.97, 0.06)):  # where their bars are usually low
            side = "left" if x < 0.5 else "right"
            axes.text(x, y, name, transform=axes.transAxes, ha=side, va="center", color=INK, weight="bold")
        axes.set(xlim=(0, 1), ylim=(-1.15 * highest, 1.15 * highest), xlabel="probability of fake")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(_per_cent)
        return _svg(figure, "histogram", title, description)


def precision(curve: Mapping[str, Any], title: str, description: str) -> str:
    """Precision over a logarithmic base rate: with the measured FPR, and with its upper bound."""
    with _plot("precision") as (figure, axes):
        axes.plot(curve["base_rate"], curve["cautious"], color=SECOND, linestyle=(0, (5, 2)))
        axes.plot(curve["base_rate"], curve["value"], color=MAIN)
        axes.axvline(0.01, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.5)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks([1e-4, 1e-3, 1e-2, 1e-1, 0.5], ["0.01 %", "0.1 %", "1 %", "10 %", "50 %"])
        axes.set(xlim=(1e-4, 0.5), ylim=(0, 1.02), xlabel="share of fakes among the images")
        _percent(axes)
        return _svg(figure, "precision", title, description)


def levels(
    chart: str, names: Sequence[str], lines: Mapping[str, Sequence[Number]], thin: Sequence[Sequence[float | None]],
    untransformed: int, lowest: float, label: str, title: str, description: str,
) -> str:  # fmt: skip
    """AP and accuracy over the levels of a transform and untransformed; a thin line per generator."""
    with _plot(chart, width=SMALL_WIDTH, height=230, margins=(50, 12, 10, 40)) as (figure, axes):
        for values in thin:
            axes.plot(range(len(names)), _floats(values), color=MUTED, linewidth=1, alpha=0.35)
        looks = {"ap": (MAIN, "o", "solid"), "acc": (SECOND, "s", (0, (5, 2)))}
        for metric, (colour, marker, dashes) in looks.items():
            numbers = lines[metric]
            values = _floats([number["value"] for number in numbers])
            axes.axhline(values[untransformed], color=colour, linewidth=1, linestyle=(0, (1, 2)))
            axes.plot(range(len(names)), values, color=colour, linestyle=dashes)
            for place, number in enumerate(numbers):
                if number["value"] is not None:
                    _bar(axes, place, number, colour, marker)
        axes.set_xticks(range(len(names)), names)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(_per_cent)
        axes.set(xlim=(-0.3, len(names) - 0.7), ylim=(lowest, 1.02), xlabel=label)
        return _svg(figure, chart, title, description)


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


# From a figure to an SVG element.


@contextmanager
def _plot(
    chart: str, width: int = WIDTH, height: int = 290, margins: tuple[int, int, int, int] = (54, 18, 10, 42)
) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot in our style, independent of the machine's; margins are left, right, top and bottom, in px."""
    left, right, top, bottom = margins
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": chart})
        # the browser draws the letters, so our font need not have them
        warnings.filterwarnings(
            "ignore", message=r"Glyph \d+|.*missing from font|Matplotlib currently does not support"
        )
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
        yield figure, figure.add_axes(place)


def _percent(axes: Axes) -> None:
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(_per_cent)


def _per_cent(share: float, _place: float) -> str:
    return f"{100 * abs(share):.3g} %"


def _svg(figure: Figure, chart: str, title: str, description: str) -> str:
    """The figure as an <svg> element with a title and a description for screen readers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}style", f"{SVG}metadata"):  # a style element would apply to the whole page
                parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', text))
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        _rewrite(element, chart, used)
    _name(root, chart, title, description)
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, chart: str, used: set[str]) -> None:
    """Make ids unique on the page, and use the page's fonts and colours."""
    if LINK in element.attrib:
        element.set("href", "#" + chart + "-" + element.attrib.pop(LINK).removeprefix("#"))
    if (identity := element.attrib.pop("id", None)) in used:
        element.set("id", f"{chart}-{identity}")
    for name, value in element.attrib.items():
        value = re.sub(r"url\(#([\w.-]+)\)", rf"url(#{chart}-\1)", value)
        if name == "style":
            value = re.sub(r"font-family:[^;]*;?\s*", "", value)
            for colour, variable in COLOURS.items():
                value = value.replace(colour, f"var(--{variable})")
        element.set(name, value)


def _name(root: ElementTree.Element, chart: str, title: str, description: str) -> None:
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib.update({"role": "img", "aria-labelledby": f"{chart}-title {chart}-desc", "class": "chart"})
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{chart}-{tag}"})
        element.text = text
        root.insert(place, element)
