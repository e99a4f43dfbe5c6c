"""Parquet files as `datasets` writes them, scored unconverted on the shared cluster. One short run."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.dataset.plan import Selection
from jobs.runs import catalog
from jobs.workflows.score import score
from nsnet.detector import Detector
from tests.support.tables import image_file, parquet_bytes, put, save_bundle

IMAGES = [image_file(seed, width=80, height=70) for seed in range(6)]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["fake", "real"], "_type": "ClassLabel"}}
METADATA = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def test_three_shapes_are_scored_unconverted_with_the_labels_that_their_metadata_name(
    cluster: None, tmp_path: Path
) -> None:
    stored = pa.array([{"bytes": image, "path": "a.png"} for image in IMAGES[:2]], STRUCT)
    paths = ["pictures/4.png", "pictures/5.png", "../outside.png", "/etc/hostname", None]
    named = pa.array([{"bytes": None, "path": path} for path in paths], STRUCT)
    labels = {"label": [0, 1], "model_name": ["sdxl", None]}
    source = put(
        str(tmp_path / "source"),
        {
            "stored/a.parquet": parquet_bytes({"image": stored, **labels}, METADATA),
            "other/a.parquet": parquet_bytes({"image_data": IMAGES[2:4], **labels}, METADATA),
            "named/a.parquet": parquet_bytes({"image": named, "label": [0, 1, 0, 1, 0]}, METADATA),
            "pictures/4.png": IMAGES[4], "pictures/5.png": IMAGES[5],
        },
    )  # fmt: skip
    bundle = save_bundle(tmp_path / "detector")
    put(str(tmp_path), {"outside.png": image_file(9)})
    selection = Selection(exclude=("pictures/*",))  # the files that a Parquet file names are not listed a second time
    score(source, detector=str(bundle), out=str(tmp_path / "out"), selection=selection)
    verdicts = catalog.verdicts(str(tmp_path / "out")).to_table().to_pylist()
    rows = {row["uri"].removeprefix(f"{source}/"): row for row in verdicts}
    good = [f"{name}/a.parquet#{i}" for name in ("stored", "other", "named") for i in range(2)]
    assert [(rows[name]["status"], rows[name]["label"]) for name in good] == [("scored", 1), ("scored", 0)] * 3
    assert [rows[name]["generator"] for name in good[:4]] == ["sdxl", None] * 2
    expected = Detector.load(bundle).predict(IMAGES)
    assert [rows[name]["prob_fake"] for name in good] == pytest.approx([one.prob_fake for one in expected], abs=1e-5)
    bad = [rows[f"named/a.parquet#{i}"] for i in (2, 3, 4)]
    assert [row["error_class"] for row in bad] == ["FetchError", "FetchError", "ImageEmptyError"]
    assert "leads upwards" in bad[0]["error_message"] and "is absolute" in bad[1]["error_message"]
    assert len(rows) == 9
