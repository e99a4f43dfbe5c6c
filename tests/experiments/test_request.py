"""What a training was asked for: overrides, places, and when it is the same training as the one that lies there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from jobs.console.parameters import WorkersType
from jobs.experiments.paths import SETTINGS_FILE
from jobs.experiments.request import TrainRequest
from jobs.storage import uris, writing
from jobs.storage.uris import Uri
from nsnet import recipes
from nsnet.configuration import BasisRule
from nsnet.errors import ConfigError, StorageError, UsageError
from nsnet.images import DecodeLimits
from tests.support.models import one_line
from tests.support.tables import put

REQUEST = TrainRequest(source="/pictures", out="/models/one")


def identity(request: TrainRequest) -> dict[str, Any]:
    return request.identity(request.resolved())


def test_recipe_comes_out_as_it_is_without_wishes() -> None:
    assert REQUEST.resolved() == recipes.variant(recipes.TINY, "advanced")


def test_wishes_change_what_they_name() -> None:
    request = replace(
        REQUEST, variant="original:rank=8", epochs=3, batch_size=16,
        settings=("patience=2", "augmentation.jpeg_share=0.25", "detector.lora.rank=2", "precision=bf16"),
    )  # fmt: skip
    found, before = request.resolved(), recipes.variant(recipes.TINY, "original:rank=8")
    assert (found.training.epochs, found.training.batch_size, found.training.patience) == (3, 16, 2)
    assert (found.training.augmentation.jpeg_share, found.training.precision) == (0.25, "bf16")
    assert found.detector == replace(before.detector, lora=replace(before.detector.lora, rank=2))
    assert found.basis == BasisRule.parse("rank=8")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("patience", "give NAME=VALUE"),
        ("patients=3", "no setting 'patients'; it has .*patience"),
        ("patience=many", "patience must be int, got 'many'"),
        ("detector.lora.rang=3", "no setting 'lora.rang'"),
        ("detector=3", "no setting 'detector'"),
        ("epochs=0", "need epochs ≥ 1"),
        ("captions=none", "captions must be one of"),
        ("augmentation.jpeg_share=2", "jpeg_share"),
        ("test_share=0.9", "a sum below 1"),
        ("detector.captioner.max_new_tokens=12", "choose another --recipe"),
        ("detector.clip.model=x", "choose another --recipe"),
    ],
)
def test_wish_that_cannot_be_met_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        replace(REQUEST, settings=(setting,)).resolved()
    one_line(caught.value)


@pytest.mark.parametrize("changed", [{"workers": (0, 1)}, {"workers": (3, 2)}, {"seed": -1}])
def test_ranges_are_checked(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--workers must be N or MIN-MAX"):
        replace(REQUEST, **changed)


@pytest.mark.parametrize(("text", "expected"), [("4", (4, 4)), ("2-8", (2, 8)), ((1, 2), (1, 2))])
def test_workers_are_a_number_or_a_range(text: Any, expected: tuple[int, int]) -> None:
    assert WorkersType().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "-", "2-", "-2", "two", "2-4-8", "1.5"])
def test_workers_that_are_neither_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is neither a number such as 4"):
        WorkersType().convert(text, None, None)


def test_stored_split_leaves_no_generator_out() -> None:
    with pytest.raises(ConfigError, match="give --split or --leave-out, not both"):
        replace(REQUEST, split="/split.parquet", leave_out="ADM")


def test_place_of_a_training_lies_beside_its_bundle() -> None:
    assert TrainRequest(source="s3://a", out=Uri("s3://b/c/")).work == "s3://b/c.training"


def test_whole_bucket_is_no_place_for_a_detector() -> None:
    with pytest.raises(UsageError, match="whole bucket; give a prefix in it"):
        TrainRequest(source="s3://a", out="s3://b")


CHANGES: dict[str, dict[str, Any]] = {
    "source": {"source": "/others"}, "recipe": {"recipe": "vit-l-14"}, "variant": {"variant": "linear"},
    "seed": {"seed": 1}, "captions": {"captions": "/captions"}, "split": {"split": "/split.parquet"},
    "leave_out": {"leave_out": "ADM"}, "clip_weights": {"clip_weights": "/w"}, "captioner": {"captioner": "/c"},
    "limits": {"limits": DecodeLimits(max_pixels=10)}, "max_failed": {"max_failed": 0.5},
    "training": {"settings": ("patience=1",)}, "detector": {"settings": ("detector.lora.rank=1",)},
    "basis": {"variant": "original:rank=8"},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_place_belongs_to_the_training_with_its_settings(name: str, tmp_path: Path) -> None:
    request = replace(REQUEST, out=str(tmp_path / "out"), variant="original:rank=4" if name == "basis" else "advanced")
    settings = identity(request)
    assert not request.belongs_to(settings)
    writing.write_json(uris.join(request.work, SETTINGS_FILE), settings)
    assert request.belongs_to(settings)
    other = replace(request, **CHANGES[name])
    with pytest.raises(UsageError, match=rf"other settings \(.*\b{name}\b.*\)") as caught:
        other.belongs_to(identity(other))
    one_line(caught.value)


def test_machines_may_change_between_the_parts_of_a_training() -> None:
    here = identity(REQUEST)
    there = replace(REQUEST, workers=(2, 8), address="ray://head:10001", operating_point="fpr=1%", caption_missing=True)
    assert identity(there) == here
    assert json.loads(json.dumps(here)) == here


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000])
def test_damaged_settings_are_named_with_what_to_do(content: bytes, tmp_path: Path) -> None:
    request = TrainRequest(source="s", out=str(tmp_path / "out"))
    put(request.work, {"settings.json": content})
    with pytest.raises(StorageError, match=f"^{request.work}/settings.json is damaged .*choose another --out"):
        request.belongs_to({})
