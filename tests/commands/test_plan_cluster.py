"""`nsnet plan-cluster` on the command line: its numbers, its output, and what it refuses."""

import json
from pathlib import Path

import click
import pytest

from jobs.console import parameters
from jobs.planning.plan import plan_cluster
from nsnet.config import to_dict
from tests.support.rates import file_of
from tests.support.tables import run_command

pytestmark = pytest.mark.usefixtures("no_cluster")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1), ("250k", 250_000), ("10M", 10_000_000), ("10m", 10_000_000), ("1B", 10**9), ("2.5M", 2_500_000),
        ("1_000", 1000), ("1,000", 1000), ("12,345,678", 12_345_678), (" 7 ", 7), ("1.50k", 1500), ("3.0", 3),
        ("0", 0), ("007", 7),
    ],
)  # fmt: skip
def test_count_is_read_with_its_unit(text: str, number: int) -> None:
    assert parameters.COUNT.convert(text, None, None) == number


@pytest.mark.parametrize(
    "text",
    ["", " ", "M", "ten", "-1", "+1", "1.5", "1.2345k", "1e6", "10MB", "10 M", "1,00", "1,0000", ",1", "1,", "1_", "_1",
     "1__0", "1.", ".5M", "nan", "inf", "0x10", "१०", "10M\x1b[2J", "9" * 31, "9" * 100_000],
)  # fmt: skip
def test_count_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(
        click.BadParameter, match="is not a whole number such as 1000, 1,000, 300k, 2.5M or 1B"
    ) as found:
        parameters.COUNT.convert(text, None, None)
    assert len(found.value.message) < 150


def test_command_prints_the_plan() -> None:
    code, out, err = run_command("plan-cluster", "--images", "10M", "--hours", "6")
    made = plan_cluster(images=10_000_000, hours=6.0)
    assert (code, err) == (0, "")
    first = out.splitlines()[0]
    assert first.startswith(f"{made.cluster.gpus} GPU") and f" {made.cluster.cpus} CPUs, " in first
    assert first.endswith(f"10,000,000 images in {made.hours:.2f} hours (deadline: 6)")
    assert "The rates of GPUs are estimates" in out
    assert made.rates.machine in " ".join(out.split())


def test_json_holds_the_whole_plan(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps(to_dict(file_of())))
    options = [
        "--gpus",
        "4",
        "--cpus",
        "1_000",
        "--cpus-per-gpu",
        "16",
        "--known-captions",
        "30%",
        "--megapixels",
        "12",
    ]
    prices = ["--price-gpu", "3", "--price-cpu", "0"]
    code, out, err = run_command(
        "plan-cluster", "--images", "1B", *options, *prices, "--rates", str(tmp_path / "rates.json"), "--json",
        "--image-bytes", "3M",
    )  # fmt: skip
    assert (code, err, out.count("\n")) == (0, "", 1)
    values = json.loads(out)
    assert values["workload"] == {
        "images": 10**9, "megapixels": 12.0, "image_bytes": 3_000_000, "known_captions": 0.3
    }  # fmt: skip
    assert values["cluster"] == {"gpus": 4, "cpus": 1000, "cpus_per_gpu": 16}
    assert values["rates"]["machine"] == "a machine" and values["deadline_hours"] is None
    assert values["cost"]["total"] == pytest.approx(values["hours"] * 12.0)
    assert [stage["name"] for stage in values["stages"]] == [
        "fetching", "decoding", "captioning", "scoring", "writing"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--hours 6", "Missing option '--images'"),
        ("--images lots --hours 6", "'lots' is not a whole number"),
        ("--images 10M --hours soon", "'soon' is not a valid float"),
        ("--images 10M --hours 6 --known-captions 120%", "'120%' is not between 0 and 100%"),
        ("--images 10M", "give either --hours, for a cluster, or --gpus and --cpus"),
        ("--images 10M --hours nan", "--hours must be above 0 and at most 100,000, got nan"),
        ("--images 1B --hours 1", "starting, listing and publishing take"),
        ("--images 10M --hours 6 --rates /absent/rates.json", "--rates /absent/rates.json: No such file or directory"),
        ("--images 10M --hours 6 --rates gs://bucket/rates", "not gs://"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: str, reason: str) -> None:
    code, out, err = run_command("plan-cluster", *arguments.split())
    assert (code, out) == (2, "") and "Traceback" not in err
    assert reason in err.splitlines()[-1]


def test_text_of_a_strange_file_reaches_no_terminal_as_an_escape(tmp_path: Path) -> None:
    file = file_of(machine="a \x1b[2J\nmachine", versions={"\x1b[1m": "\x9b31m"})
    (tmp_path / "rates.json").write_text(json.dumps(to_dict(file)))
    for form in ([], ["--json"]):
        code, out, _ = run_command(
            "plan-cluster", "--images", "1M", "--hours", "6", "--rates", str(tmp_path / "rates.json"), *form
        )
        assert code == 0 and all(line.isprintable() for line in out.splitlines())
