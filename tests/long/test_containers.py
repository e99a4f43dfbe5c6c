"""The same images in a folder, a manifest, image Parquet and a tar get the same verdicts."""

import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.dataset import synthetic
from jobs.runs import catalog
from jobs.workflows.score import score
from tests.support.tables import save_bundle


def test_manifest_image_parquet_and_tar_score_like_the_folder(cluster: None, tmp_path: Path) -> None:
    folder, detector = tmp_path / "pictures", str(save_bundle(tmp_path / "detector"))
    synthetic.write_bucket(folder / "files", range(200, 203), seed=0, size_px=224, processes=1)
    files = sorted(path for path in folder.rglob("*.jpg"))
    labels = [int("1_fake" in path.as_posix()) for path in files]
    pq.write_table(pa.table({"uri": [str(path) for path in files], "label": labels}), tmp_path / "manifest.parquet")
    pq.write_table(
        pa.table({"bytes": [path.read_bytes() for path in files], "label": labels}), folder / "images.parquet"
    )
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for path in files:
            tar.add(path, arcname=path.relative_to(folder).as_posix())
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for source in (folder, tmp_path / "manifest.parquet"):
        out = f"{tmp_path}/scored-{source.name}"
        # each by itself: otherwise equal files are judged once for all of them
        score(str(source), detector=detector, out=out, reuse=False)
        for row in catalog.verdicts(out).to_table().to_pylist():
            uri = row["uri"]
            kind = next((name for name in ("images.parquet", "shard.tar") if name in uri), source.name)
            found[kind][str(row["content_hash"])] = row
    assert found.keys() == {"pictures", "manifest.parquet", "images.parquet", "shard.tar"}
    for rows in found.values():
        assert rows.keys() == found["pictures"].keys() and len(rows) == 6
        assert [row["label"] for row in rows.values()].count(1) == 3
        for content, row in rows.items():
            assert row["prob_fake"] == pytest.approx(found["pictures"][content]["prob_fake"], abs=1e-9)
            assert row["label"] == found["pictures"][content]["label"]
