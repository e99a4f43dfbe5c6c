"""Leakage of a training, from features that are made up; no training is done."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.dataset.schema import SPLIT
from jobs.experiments import leakage as module
from jobs.experiments.leakage import mean, measure
from jobs.runs import products
from jobs.training.checkpoints import LOGITS, ROWS, Progress
from jobs.training.examples import Examples
from tests.support.tables import manifest_row

COUNT = 80
DIM = 6


def examples(text: bool) -> Examples:
    rows = [
        dict.fromkeys(SPLIT.names)
        | manifest_row(
            f"/data/progan/{'dog' if i % 2 else 'cat'}/{'1_fake' if i % 3 else '0_real'}/{i}.png",
            image_id=f"{i:032x}", label=int(i % 3 > 0), generator="progan", split="test",
        ) | {"content_hash": f"{i}", "group": i // 2 * 2 if i < 20 else None}
        for i in range(COUNT)
    ]  # fmt: skip
    features = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32) if text else None
    return Examples(table=pa.Table.from_pylist(rows, schema=SPLIT), text_features=features)


def test_features_of_test_images_meet_their_labels_classes_and_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "leakage", lambda u, p, t, **others: given.append({"u": u, "p": p, "t": t, **others}))
    read: list[Any] = []
    everything = examples(text=True)
    monkeypatch.setattr(
        "jobs.training.examples.load_text_features", lambda *call: read.append(call) or everything.text_features
    )
    rows = torch.arange(COUNT).flip(0)
    features = {"image": torch.randn(30, DIM), "projected": torch.randn(30, DIM)}
    progress = Progress(test={ROWS: rows, LOGITS: torch.zeros(COUNT)}, features=features)
    facts = SimpleNamespace(place="captions", product=products.CAPTIONS, maker="m")
    experiment: Any = SimpleNamespace(request=SimpleNamespace(source="/data/"), facts=facts)
    for text in (True, False):  # a variant without captions reads those that were published
        measure(experiment, examples(text), progress)
    facts.product = products.FACTS
    measure(experiment, examples(False), progress)
    first = rows[:30].numpy()
    assert [call[0] for call in read] == ["captions"] and given[2]["t"] is None
    assert everything.text_features is not None
    for one in given:
        assert np.array_equal(one["u"], features["image"]) and np.array_equal(one["p"], features["projected"])
        assert one["labels"].tolist() == [int(i % 3 > 0) for i in first]
        assert one["classes"].tolist() == [int(i % 2) for i in first]
        assert one["groups"] == [f"group {i // 2 * 2}" if i < 20 else f"{i}" for i in first]
    for one in given[:2]:
        assert np.array_equal(one["t"], everything.text_features[first])


def test_mean_of_an_undefined_probe_is_undefined() -> None:
    known = {"value": 0.5, "low": 0.4, "high": 0.6, "permuted": 0.5, "chance": 0.5, "reason": None}
    unknown = {**dict.fromkeys(known), "reason": "no class"}

    def of(value: dict[str, Any]) -> dict[str, Any]:
        probes = {"u": value, "projected": known, "caption": known}
        return {"images": 9, "residual_energy": 0.2, "object_class": probes, "caption_cluster": probes, "label": known}

    found = mean([of({**known, "value": 0.7}), of(unknown)])
    assert found["object_class"]["u"] == unknown and found["object_class"]["projected"] == known
    assert mean([of(known), of({**known, "value": 0.7})])["object_class"]["u"]["value"] == pytest.approx(0.6)
