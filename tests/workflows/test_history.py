"""`nsnet runs`: the runs of an output, and an alarm where verdicts drift."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.dataset import schema
from jobs.runs.publication import Run
from jobs.storage import parquet
from tests.support.tables import batches, manifest_row, rows_file, run_command, verdict_row

ROWS = 1000


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight nights of one detector, of which the last calls 30 % more images fake, and one of another."""
    place = tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    nights = [("one", 0.2)] * 7 + [("two", 0.2), ("one", 0.5)]
    for night, (detector, share) in enumerate(nights):
        run = Run(out=str(place), run_id=f"202601{night + 1:02}T000000Z-000000")
        probabilities = np.where(rng.random(ROWS) < share, 0.9, 0.1) + rng.uniform(-0.05, 0.05, ROWS)
        rows = [verdict_row(f"/{night}/{i}.jpg", float(p), run_id=run.run_id, residual_energy=0.9, requests=1)
                for i, p in enumerate(probabilities)]  # fmt: skip
        rows.append(verdict_row(f"/{night}/broken.jpg", None, run_id=run.run_id, requests=1))
        manifest, staged = f"{run.staging}/manifest.parquet", rows_file(f"{run.staging}/attempt-00000001")
        parquet.write(batches([manifest_row(row["uri"]) for row in rows], schema.MANIFEST), schema.MANIFEST, manifest)
        parquet.write(batches(rows, schema.VERDICTS), schema.VERDICTS, staged)
        run.publish(manifest, [staged], {"detector_id": detector, "source": "s3://in", "seconds": 10.0})
    return place


def test_runs_are_listed_with_what_they_did(out: Path) -> None:
    code, text, err = run_command("runs", str(out))
    lines = [line for line in text.splitlines() if not line.startswith("-")]
    assert code == 0 and err == "" and len(lines) == 1 + 9 + 1
    assert lines[0].split() == ["run", "detector", "rows", "failed", "images/s", "called", "fake", "expected", "drift"]
    assert all("1,001" in line and "100.1" in line for line in lines[1:10])
    assert [line.split()[0] for line in lines[1:10]] == [f"202601{night:02}T000000Z-000000" for night in range(1, 10)]
    assert lines[9].endswith("flagged, prob_fake") and lines[7].endswith("none") and lines[10].startswith("– no comp")


def test_json_has_one_object_per_run_and_detectors_are_compared_with_themselves(out: Path) -> None:
    code, text, _ = run_command("runs", str(out), "--json", "--detector-id", "one")
    runs = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [run["drift"] is None for run in runs] == [True] * 5 + [False] * 3
    last = runs[-1]["drift"]
    assert last["runs"] == 7 and last["alarms"] == ["flagged", "prob_fake"]
    assert last["expected_share"] == pytest.approx(0.2, abs=0.03) and runs[-1]["flagged_share"] > 0.45
    assert [run["drift"]["alarms"] for run in runs[5:7]] == [[], []]
    assert json.loads(run_command("runs", str(out), "--json", "--detector-id", "two")[1])["rows"] == ROWS + 1


def test_output_without_runs_is_one_line(out: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([str(tmp_path)], "holds no published runs"),
        ([f"{tmp_path}/missing"], "missing"),
        ([str(out), "--detector-id", "three"], "holds no published runs of detector three"),
    ):
        code, text, err = run_command("runs", *arguments)
        assert (code, text) == (2, "") and message in err and len(err.splitlines()) == 1
