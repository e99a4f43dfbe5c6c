"""The table of series, the dashboard, the alarms and the reference name the same things."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.pipeline import bottleneck, metrics
from jobs.pipeline.actors import Caption, Embed
from jobs.pipeline.scoring import Score
from jobs.runs.products import PRODUCTS
from jobs.telemetry import series
from jobs.telemetry.series import TABLE
from jobs.training import metrics as training
from tests.test_docs import anchors
from tools import dashboard

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster/monitoring"
REFERENCE = ROOT / "docs/reference/metrics.md"
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"][0]["rules"]
ALARMS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
GRAFANA_UNITS = {"short", "percentunit", "Bps", "s", "dateTimeFromNow", "cps", "reqps", "none"}
OF_SCRAPING = {"instance", "WorkerId"}
"""Labels that Prometheus and Ray add."""
SERIES = re.compile(r"(ray_\w+|nsnet:[\w:]+)(?:\{([^}]*)\})?")
PROMTOOL = os.environ.get("NSNET_PROMTOOL") or shutil.which("promtool") or ""
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="promtool, of Debian's package prometheus, is not installed")


def queries() -> dict[str, str]:
    """Name -> expression, of all panels and rules."""
    found = {f"{rule.get('alert', rule.get('record'))}": rule["expr"] for rule in RULES}
    for panel in dashboard.dashboard()["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {panel['id']} {target['refId']}"] = target["expr"]
    return found


def test_names_end_with_their_kind_and_labels_are_few() -> None:
    for name, one in TABLE.items():
        assert re.fullmatch(r"nsnet(_[a-z]+)+", name)
        assert name.endswith("_total") == (one.kind == "counter")
        assert len(one.labels) <= 4 and not {"uri", "run_id", "message", "job", "instance"} & set(one.labels)
        assert one.help.endswith(".") and "\n" not in one.help


@pytest.mark.parametrize("name", queries())
def test_query_names_series_and_labels_of_the_table(name: str) -> None:
    expression = queries()[name]
    used = SERIES.findall(expression)
    assert used
    labels: set[str] = set()
    for metric, matchers in used:
        if metric in RECORDED:
            continue
        one = TABLE[metric.removeprefix(series.EXPORTED_PREFIX)]
        labels |= set(one.labels)
        assert set(re.findall(r"(\w+)[=!]~?\"", matchers)) <= set(one.labels), metric
        is_rate = re.search(rf"rate\({metric}[{{\[]", expression) is not None
        assert not is_rate or one.kind == "counter", metric
    grouped = {label for names in re.findall(r"by \(([\w, ]*)\)", expression) for label in names.split(", ")}
    assert grouped <= labels | OF_SCRAPING


def emitted() -> dict[str, dict[str, set[str]]]:
    """Series -> label -> values that the code can emit, from its own names; only of labels that queries may match."""
    sources = "\n".join(path.read_text() for path in (ROOT / "jobs").rglob("*.py"))
    titles = set(re.findall(r'(?:\btitle=|progress\.watch\(\w+, )"(\w+)"', sources))
    assert titles == {"score", "caption", "examine", "train"}  # as the reference says
    model_stages = {stage.name for stage in (Caption, Embed, Score)}
    stages, times = set(metrics.STAGES.values()), {*bottleneck.OTHERS, *model_stages}
    assert model_stages < stages
    found: dict[str, dict[str, set[str]]] = {name: {"work": titles} for name, one in TABLE.items() if one.labels}
    found[series.IMAGES.name] |= {
        "stage": stages, "outcome": {"done", "failed"}, "error_class": {"", metrics.OTHER, *metrics.CLASSES}
    }  # fmt: skip
    found[series.STAGE_SECONDS.name]["stage"] = times
    found[series.QUEUE_IMAGES.name]["stage"] = stages
    parts = (training.WAITING, training.COMPUTING, training.VALIDATING, training.CHECKPOINTING)
    found[series.TRAINING_SECONDS.name]["part"] = set(parts)
    for one in (series.PUBLISHED_AT, series.PUBLISHED_IMAGES, series.PUBLISHED_SECONDS):
        found[one.name]["product"] = set(PRODUCTS)
    found[series.PUBLISHED_IMAGES.name]["status"] = {"scored", "failed"}
    return found


EMITTED = emitted()


def unknown_values(expression: str) -> list[str]:
    """Matchers of an expression that name a value which the code never emits, such as a stage under an old name."""
    found = []
    for metric, matchers in SERIES.findall(expression):
        values = EMITTED.get(metric.removeprefix(series.EXPORTED_PREFIX), {})
        for label, operator, text in re.findall(r'(\w+)([=!]~?)"([^"]*)"', matchers):
            for value in text.split("|") if "~" in operator else [re.escape(text)]:
                if not any(re.fullmatch(value, one) for one in values.get(label, ())):
                    found.append(f"{metric}: {label}{operator}{value}")
    return found


@pytest.mark.parametrize("name", queries())
def test_query_names_values_of_labels_that_the_code_emits(name: str) -> None:
    assert unknown_values(queries()[name]) == []


@pytest.mark.parametrize(
    "matcher",
    ['work="scoring"', 'stage="score"', 'stage=~"wait"', 'stage!~"fetching|decode"', 'stage="preparing"', 'label="x"'],
)
def test_value_that_the_code_never_emits_is_found(matcher: str) -> None:
    assert unknown_values(f"sum(rate(ray_nsnet_stage_seconds_total{{{matcher}}}[5m]))")


def test_every_series_is_shown_or_raises_an_alarm() -> None:
    used = {metric for expression in queries().values() for metric, _ in SERIES.findall(expression)}
    assert {one.exported for one in TABLE.values()} <= used


def test_reference_has_every_series_with_labels_and_help() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    rows = [
        f"| `{one.exported}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.help} |"
        for one in TABLE.values()
    ]
    assert [line for line in text.splitlines() if line.startswith("| `ray_nsnet")] == rows


# The dashboard.


def test_dashboard_on_disk_is_what_the_script_prints() -> None:
    command = [sys.executable, "-m", "tools.dashboard"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed == (MONITORING / "dashboard.json").read_text(), " ".join(command) + " > cluster/monitoring/…"


def test_panels_fill_the_grid_without_overlap() -> None:
    made = json.loads((MONITORING / "dashboard.json").read_text())
    assert made["schemaVersion"] >= 36 and made["uid"] == "nsnet"
    panels = made["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= dashboard.WIDTH
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = set(itertools.product(columns, lines))
        assert not cells & taken, panel["title"]
        taken |= cells
    height = max(y for _, y in taken) + 1
    assert len(taken) == dashboard.WIDTH * height, "\n" + drawn(panels, height)  # no hole either


def test_panels_have_units_and_legends() -> None:
    made = json.loads((MONITORING / "dashboard.json").read_text())
    groups = [panel["title"] for panel in made["panels"] if panel["type"] == "row"]
    assert groups == ["Night at a glance", "Stages", "Store", "Models", "Training"]
    for panel in made["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"] in GRAFANA_UNITS
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        for target in panel["targets"]:
            legend = re.findall(r"{{(\w+)}}", target["legendFormat"])
            assert target["legendFormat"] and all(f"{label}" in target["expr"] for label in legend)


def drawn(panels: list[dict[str, Any]], height: int) -> str:
    """The layout as text."""
    lines = [[" "] * dashboard.WIDTH for _ in range(height)]
    for panel in panels:
        place = panel["gridPos"]
        for y in range(place["y"], place["y"] + place["h"]):
            for x in range(place["x"], place["x"] + place["w"]):
                lines[y][x] = chr(ord("a") + panel["id"] % 26)
    return "\n".join("".join(line) for line in lines)


# The alarms.


def test_alarm_says_how_urgent_it_is_and_where_to_read_on() -> None:
    headings = anchors((ROOT / "docs/how-to/operations.md").read_text(encoding="utf-8"))
    assert len(ALARMS) == 6
    for name, rule in ALARMS.items():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        document, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert document == "docs/how-to/operations.md" and anchor == name.lower() and anchor in headings


def test_each_alarm_has_a_series_that_fires_it_and_one_that_does_not() -> None:
    tests = yaml.safe_load((MONITORING / "rules-test.yaml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    for name in ALARMS:
        assert {bool(check.get("exp_alerts")) for check in checks if check["alertname"] == name} == {True, False}, name


@needs_promtool
@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yaml"), ("test", "rules", "rules-test.yaml")])
def test_promtool_accepts_the_alarms_and_their_tests(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([PROMTOOL, *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_parses_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{i}", "expr": expression.replace(dashboard.WINDOW, "5m")}
        for i, expression in enumerate(queries().values())
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([PROMTOOL, "check", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
