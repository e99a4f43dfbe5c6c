"""`nsnet score` on workers without internet: they load from a mirror in a bucket, once per node."""

import json
from pathlib import Path

import pytest

from jobs.runs import catalog
from jobs.storage import mirror, reading, writing
from jobs.storage.uris import Uri
from jobs.workflows import weights
from nsnet.captions import captioner_id
from nsnet.detector import Detector
from tests.support import hub
from tests.support.multinode import running
from tests.support.proxy import FaultyProxy
from tests.support.tables import image_file, new_bucket, put, run_command

pytestmark = pytest.mark.usefixtures("forked_workers")

RUN_SECONDS = 560.0
IMAGES = {f"{i}.png": image_file(i) for i in range(12)}


def test_workers_without_internet_score_from_the_mirror_and_refuse_a_changed_one(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = new_bucket()
    place, bundle, out = (Uri(f"{bucket}/{name}") for name in ("mirror", "detector", "out"))
    hub.fill(tmp_path / "hub", tmp_path / "made")
    hub.referring_bundle(tmp_path / "bundle", tmp_path / "made")
    writing.upload_folder(tmp_path / "bundle", bundle, last="detector.json")
    with hub.offline(tmp_path / "hub"):
        weights.mirror_models(to=place, detectors=[bundle])
        expected = Detector.load(tmp_path / "bundle").predict([*IMAGES.values()])
        blip = hub.REFERRING.captioner
        its_id = captioner_id(blip, tmp_path / "hub/models--Salesforce--blip-image-captioning-base/snapshots" /
                              hub.BLIP_REVISION)  # fmt: skip
    put(f"{bucket}/images", IMAGES)
    variables = {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "no hub"), "NSNET_CACHE": str(tmp_path / "cache"),
        "NSNET_WEIGHTS": place,
    }  # fmt: skip
    arguments = [f"{bucket}/images", "--detector", bundle, "--batch-size", "4"]
    proxy.forget()
    with running(*arguments, "--out", out, env=variables) as run:
        assert run.end(RUN_SECONDS) == 0, run.text()
    rows = {row["uri"].rpartition("/")[2]: row for row in catalog.verdicts(out).to_table().to_pylist()}
    assert [rows[name]["caption"] for name in IMAGES] == [verdict.caption for verdict in expected]
    assert [rows[name]["prob_fake"] for name in IMAGES] == pytest.approx([v.prob_fake for v in expected], abs=1e-5)
    (record,) = catalog.runs(out)
    assert record["captioner_id"] == its_id and place not in json.dumps(record)
    entries = [mirror.read_entry(uri) for uri in mirror.descriptions(place)]
    files = {name: mirror.file_uri(place, file) for entry in entries for name, file in entry.files.items()}
    downloads = {name: proxy.requests(f"GET {uri.removeprefix('s3:/')}") for name, uri in files.items()}
    assert downloads == dict.fromkeys(files, 1), "driver and workers of one node share one download"

    changed = files["open_clip_model.safetensors"]
    content = reading.read_bytes(changed)
    writing.write_bytes(changed, content[:-1] + bytes([content[-1] ^ 1]))
    for name, value in (variables | {"NSNET_CACHE": str(tmp_path / "another node")}).items():
        monkeypatch.setenv(name, value)
    code, out_text, err = run_command("predict", f"{bucket}/images/0.png", "--detector", bundle)
    assert (code, out_text) == (2, "") and changed in err.splitlines()[-1] and "was recorded" in err.splitlines()[-1]
