"""A bundle whose configuration describes a huge model: refused before it is built. Costs 20 s."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nsnet.detector import Detector
from nsnet.errors import BundleError, NsnetError, WeightsError
from nsnet.model_size import FACTOR, FREE_BYTES, ModelSize
from tests.fuzz.bundles import seal
from tests.fuzz.driver import status
from tests.support.tables import save_bundle

MAX_GROWTH_BYTES = 2**28
MAX_SECONDS = 20.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Nothing here may take much memory or time."""
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = status("VmHWM"), time.process_time()
    yield
    assert status("VmHWM") - before < MAX_GROWTH_BYTES and time.process_time() - begun < MAX_SECONDS


def edited(path: Path, keys: str, value: Any) -> None:
    """One setting of a JSON file is another."""
    whole = part = json.loads(path.read_text())
    *outer, last = keys.split(".")
    for key in outer:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("clip/open_clip_config.json", "model_cfg.vision_cfg.layers", 10**7),
        ("clip/open_clip_config.json", "model_cfg.vision_cfg.width", 2**20),
        ("clip/open_clip_config.json", "model_cfg.vision_cfg.image_size", 10**6),
        ("clip/open_clip_config.json", "model_cfg.vision_cfg.mlp_ratio", 1e9),
        ("clip/open_clip_config.json", "model_cfg.text_cfg.vocab_size", 2**31),
        ("clip/open_clip_config.json", "model_cfg.text_cfg.context_length", 10**6),
        ("clip/open_clip_config.json", "model_cfg.text_cfg.layers", 10**7),
        ("clip/open_clip_config.json", "model_cfg.embed_dim", 10**8),
        ("detector.json", "config.mapper.hidden_dim", 10**8),
        ("detector.json", "config.head.hidden_dim", 10**8),
        ("detector.json", "config.head.feature_dim", 10**8),
        ("detector.json", "config.projection", {"kind": "rank_k", "rank": 2, "bank": 10**9}),
        ("lora/adapter_config.json", "r", 2**12),
        ("captioner/config.json", "text_config.vocab_size", 2**31),
        ("captioner/config.json", "text_config.num_hidden_layers", 10**7),
        ("captioner/config.json", "vision_config.intermediate_size", 2**31),
        ("captioner/config.json", "vision_config.image_size", 10**6),
    ],
)
def test_size_that_the_weights_cannot_fill_is_refused(name: str, keys: str, value: Any, copied: Path) -> None:
    edited(copied / name, keys, value)
    if name == "lora/adapter_config.json":
        edited(copied / "detector.json", "config.lora.rank", value)
    seal(copied)
    with pytest.raises((BundleError, WeightsError)) as caught:
        Detector.load(copied)
    assert "\n" not in str(caught.value)


def test_mosaic_of_another_size_than_the_image_tower_takes_is_refused(copied: Path) -> None:
    edited(copied / "detector.json", "config.patches.mosaic_px", 64_000)
    seal(copied)
    with pytest.raises(BundleError, match="does not fit its configuration: mosaic_px is 64000"):
        Detector.load(copied)


def test_bundle_without_the_clip_that_it_does_not_name_is_refused(copied: Path) -> None:
    shutil.rmtree(copied / "clip")
    edited(copied / "detector.json", "config.clip.architecture", None)
    edited(copied / "detector.json", "config.clip.model", "ViT-bigG-14")
    seal(copied)
    with pytest.raises(BundleError, match=r"lacks clip/"):
        Detector.load(copied)


def test_new_tensors_may_take_what_the_weights_justify(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(2**20))
    most = FREE_BYTES + FACTOR * 2**20
    with ModelSize([weights, tmp_path / "none"]):
        torch.empty(most // 4)
    for build in (
        lambda: torch.empty(most // 4 + 1),
        lambda: torch.nn.Linear(2**12, 2**13, device="meta"),
        lambda: [torch.nn.LayerNorm(1) for _ in range(10**5)],
        lambda: torch.zeros((2**20, 2**20), dtype=torch.float64),
        lambda: torch.eye(2**20),
    ):
        with pytest.raises(NsnetError, match="the limit for its weight files"), ModelSize([tmp_path]):
            build()
