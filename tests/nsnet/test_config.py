"""Configurations to JSON and back: equal, or an error that names the place."""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest

from nsnet.calibration import Calibration, OperatingPoint
from nsnet.config import from_dict, override, to_dict
from nsnet.configuration import (
    CaptionerConfig,
    ClipConfig,
    DetectorConfig,
    HeadConfig,
    LoraSettings,
    LossConfig,
    MapperConfig,
    ProjectionConfig,
    TrainingConfig,
)
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits
from nsnet.patches import PatchConfig
from nsnet.recipes import TINY

OWN = DetectorConfig(
    clip=ClipConfig(model="other", pretrained=None, architecture={"embed_dim": 8, "text_cfg": {"layers": [1]}}, seed=9),
    captioner=CaptionerConfig(model="a/b", revision="c0ffee", max_new_tokens=3, seed=4),
    patches=PatchConfig(patch_px=16, mosaic_px=64, spectrum="power", selection="center", grey="luma", fill="black"),
    lora=LoraSettings(rank=2, alpha=0.1, dropout=0.25),
    projection=ProjectionConfig(kind="rank_k", rank=5, bank=7),
    mapper=MapperConfig(hidden_dim=7, dropout=0.0, detached=True),
    head=HeadConfig(kind="linear", hidden_dim=5, feature_dim=3),
    loss=LossConfig(
        temperature=1 / 3,
        contrastive_weight=0.5,
        bce_weight=0.0,
        alignment_weight=2.0,
        alignment_reduction="sum",
        decorrelation_weight=0.5,
    ),  # fmt: skip
    train_backbone=True,
    normalisation="imagenet",
)
"""Every setting differs from its default."""

CONFIGS = {
    "default": DetectorConfig(),
    "tiny": TINY.detector,
    "own": OWN,
    "no projection": replace(DetectorConfig(), projection=ProjectionConfig(kind="none")),
    "training": TrainingConfig(epochs=3, precision="bf16", warmup=0.1),
    "calibration": Calibration(temperature=0.1 + 0.2, threshold=1 / 3, fitted_on=17),
    "limits": DecodeLimits(max_bytes=5, max_seconds=0.5),
}


def places(values: dict[str, Any], kind: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every nested configuration, the outermost too."""
    yield path
    for name, value in values.items():
        if isinstance(value, dict) and name != "architecture":
            yield from places(value, kind, (*path, name))


def inside(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        values = values[name]
    return values


STORED = json.loads(json.dumps(to_dict(OWN)))
OBJECTS = list(places(STORED, DetectorConfig))
SETTINGS = [(*path, name) for path in OBJECTS for name in inside(STORED, path) if (*path, name) not in OBJECTS]


LATER = [
    ("patches", "grey"), ("patches", "fill"), ("normalisation",),
    ("mapper", "detached"), ("loss", "decorrelation_weight")
]  # fmt: skip
"""Settings that releases added (`config.added`)."""


def dotted(path: tuple[str, ...]) -> str:
    return ".".join(("DetectorConfig", *path))


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_survives_json(name: str) -> None:
    config = CONFIGS[name]
    stored = json.dumps(to_dict(config), allow_nan=False)
    assert from_dict(type(config), json.loads(stored)) == config
    assert json.dumps(to_dict(from_dict(type(config), json.loads(stored)))) == stored


def test_every_setting_of_the_detector_is_covered_here() -> None:
    default = json.loads(json.dumps(asdict(DetectorConfig())))
    same = [path for path in SETTINGS if inside(default, path[:-1])[path[-1]] == inside(STORED, path)]
    assert same == []
    assert len(OBJECTS) == 9 and len(SETTINGS) > 20


@pytest.mark.parametrize("path", OBJECTS, ids=dotted)
def test_unknown_setting_is_refused_with_its_place(path: tuple[str, ...]) -> None:
    values = copy.deepcopy(STORED)
    inside(values, path)["colour"] = 1
    with pytest.raises(ConfigError, match=rf"^{dotted(path)}: unknown settings \['colour'\], missing settings \[\]"):
        from_dict(DetectorConfig, values)


@pytest.mark.parametrize("path", [path for path in (*OBJECTS[1:], *SETTINGS) if path not in LATER], ids=dotted)
def test_missing_setting_is_refused_with_its_place(path: tuple[str, ...]) -> None:
    values = copy.deepcopy(STORED)
    del inside(values, path[:-1])[path[-1]]
    with pytest.raises(ConfigError, match=rf"^{dotted(path[:-1])}: .*missing settings \['{path[-1]}'\]"):
        from_dict(DetectorConfig, values)


@pytest.mark.parametrize("path", LATER, ids=dotted)
def test_setting_that_a_release_added_is_written_and_needed_only_where_it_differs(path: tuple[str, ...]) -> None:
    """Ids of detectors are hashes of the JSON, and bundles of older releases lack the setting."""
    plain = json.loads(json.dumps(to_dict(DetectorConfig())))
    assert path[-1] not in inside(plain, path[:-1]) and path[-1] in inside(STORED, path[:-1])
    values = copy.deepcopy(STORED)
    del inside(values, path[:-1])[path[-1]]
    found = from_dict(DetectorConfig, values)
    default, own, read = DetectorConfig(), OWN, found
    for name in path:
        default, own, read = (getattr(config, name) for config in (default, own, read))
    assert read == default != own
    assert to_dict(found) == to_dict(override(OWN, ".".join(path), json.dumps(default)))


def test_calibration_of_an_older_release_is_read_and_written_as_it_was() -> None:
    stored = to_dict(Calibration())
    assert "confidence" not in stored["point"]
    assert from_dict(Calibration, stored) == Calibration()
    sure = Calibration(point=OperatingPoint(rule="fpr", fpr=0.01, confidence=0.95))
    assert from_dict(Calibration, json.loads(json.dumps(to_dict(sure)))) == sure


@pytest.mark.parametrize("path", OBJECTS, ids=dotted)
@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_object_that_is_none_is_refused_with_its_place(path: tuple[str, ...], value: object) -> None:
    values = copy.deepcopy(STORED)
    if path:
        inside(values, path[:-1])[path[-1]] = value
    else:
        values = value
    with pytest.raises(ConfigError, match=f"^{dotted(path)} must be an object, got {type(value).__name__}"):
        from_dict(DetectorConfig, values)


WRONG: dict[type, list[Any]] = {
    str: [3, 1.5, True, ["text"], {}],
    int: ["3", 1.5, True, None, []],
    float: ["0.1", True, None, []],
    bool: [1, 0.0, "true", None, []],
    dict: [3, "text", True, []],
}


@pytest.mark.parametrize("path", SETTINGS, ids=dotted)
def test_setting_of_a_wrong_type_is_refused_with_its_place(path: tuple[str, ...]) -> None:
    # one setting of OWN is None where text could be
    kind = str if path == ("clip", "pretrained") else type(inside(STORED, path))
    for wrong in WRONG[kind]:
        values = copy.deepcopy(STORED)
        inside(values, path[:-1])[path[-1]] = wrong
        with pytest.raises(ConfigError, match=f"^{dotted(path)} must be "):
            from_dict(DetectorConfig, values)


CHOICES = [
    ("patches", "spectrum"), ("patches", "selection"), ("projection", "kind"), ("head", "kind"),
    ("loss", "alignment_reduction"), ("patches", "grey"), ("patches", "fill"), ("normalisation",),
]  # fmt: skip


@pytest.mark.parametrize("path", CHOICES, ids=dotted)
@pytest.mark.parametrize("value", ["other", "", None, 1])
def test_choice_outside_its_list_is_refused_with_its_place(path: tuple[str, ...], value: object) -> None:
    values = copy.deepcopy(STORED)
    inside(values, path[:-1])[path[-1]] = value
    with pytest.raises(ConfigError, match=f"^{dotted(path)} must be one of"):
        from_dict(DetectorConfig, values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("patches", "mosaic_px"), 65, r"mosaic_px \(65\)"),
        (("lora", "dropout"), 1.0, "dropout < 1"),
        (("projection", "rank"), 0, "rank_k needs rank ≥ 2"),
        (("loss", "temperature"), 0.0, "temperature > 0"),
        (("loss", "bce_weight"), float("nan"), "bce_weight nan"),
        (("head", "feature_dim"), 0, "must be positive"),
        (("projection", "bank"), 4, "a bank of at least 5 captions, got 4"),
        (("loss", "contrastive_weight"), 0.0, "one of the contrastive and the bce weight > 0"),
    ],
)
def test_value_out_of_range_is_refused_on_reading(path: tuple[str, ...], value: float, message: str) -> None:
    values = copy.deepcopy(STORED)
    inside(values, path[:-1])[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        from_dict(DetectorConfig, values)


def test_whole_number_is_read_as_a_float_where_one_belongs() -> None:
    values = copy.deepcopy(STORED)
    values["lora"]["alpha"] = 6
    alpha = from_dict(DetectorConfig, values).lora.alpha
    assert alpha == 6.0 and type(alpha) is float


@dataclass(frozen=True)
class Pair:
    sizes: tuple[int, ...]
    limit: float | None


def test_list_is_read_as_a_tuple_of_checked_items() -> None:
    assert from_dict(Pair, {"sizes": [1, 2], "limit": None}) == Pair((1, 2), None)
    assert from_dict(Pair, json.loads(json.dumps(to_dict(Pair((3,), 0.5))))) == Pair((3,), 0.5)
    for sizes in (["1"], [1.5], "12", 7, None):
        with pytest.raises(ConfigError, match=r"^Pair\.sizes must be"):
            from_dict(Pair, {"sizes": sizes, "limit": None})


def test_place_can_be_given_a_name() -> None:
    with pytest.raises(ConfigError, match="^bundle.json: unknown"):
        from_dict(Pair, {}, "bundle.json")


@pytest.mark.parametrize("settings", [("none", 3), ("per_sample", 1), ("global", -1), ("rank_k", 1)])
def test_projection_and_rank_that_contradict_each_other_are_refused(settings: tuple[Any, int]) -> None:
    with pytest.raises(ConfigError, match=f"other kinds allow neither; got {settings[0]}, rank {settings[1]}"):
        ProjectionConfig(kind=settings[0], rank=settings[1])


@pytest.mark.parametrize(("rank", "bank"), [(2, 1), (5, 1), (5, 3), (5, 4)])
def test_bank_with_fewer_captions_than_directions_is_refused(rank: int, bank: int) -> None:
    with pytest.raises(ConfigError, match=f"at least {rank} captions, got {bank}: choose fewer directions"):
        ProjectionConfig(kind="rank_k", rank=rank, bank=bank)
    assert ProjectionConfig(kind="rank_k", rank=rank, bank=rank).fitted


# --- one setting replaced


@pytest.mark.parametrize("path", SETTINGS, ids=dotted)
def test_setting_replaced_by_itself_changes_nothing(path: tuple[str, ...]) -> None:
    assert override(OWN, ".".join(path), json.dumps(inside(STORED, path))) == OWN


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lora.rank", "8", 8), ("lora.alpha", "3", 3.0), ("lora.dropout", "2.5e-1", 0.25),
        ("train_backbone", "true", True), ("head.kind", "linear", "linear"),
        ("patches.spectrum", "power", "power"), ("patches.selection", '"center"', "center"),
        ("clip.pretrained", "null", None), ("clip.pretrained", "laion2b_s34b_b88k", "laion2b_s34b_b88k"),
        ("clip.model", '"7"', "7"), ("clip.model", "ViT-B-32", "ViT-B-32"), ("captioner.model", "a/b.c", "a/b.c"),
        ("clip.architecture", '{"embed_dim": 4}', {"embed_dim": 4}), ("loss.temperature", "0.5", 0.5),
        ("projection", '{"kind": "global", "rank": 3, "bank": 0}', {"kind": "global", "rank": 3, "bank": 0}),
    ],
)  # fmt: skip
def test_one_setting_is_replaced_and_no_other(name: str, value: str, expected: Any) -> None:
    config = DetectorConfig()
    values = to_dict(config)
    found = override(config, name, value)
    assert isinstance(found, DetectorConfig) and config == DetectorConfig()
    path = tuple(name.split("."))
    inside(values, path[:-1])[path[-1]] = expected
    assert to_dict(found) == values != to_dict(config)


def test_setting_inside_a_free_object_is_replaced_in_a_copy() -> None:
    found = override(OWN, "clip.architecture.embed_dim", "9")
    assert found.clip.architecture == {"embed_dim": 9, "text_cfg": {"layers": [1]}}
    assert OWN.clip.architecture is not None and OWN.clip.architecture["embed_dim"] == 8


def test_settings_of_training_are_replaced_nested_or_not() -> None:
    config = override(TrainingConfig(), "precision", "bf16")
    config = override(config, "augmentation.jpeg_range", "[50, 90]")
    config = override(config, "augmentation.jpeg_share", "0.5")
    expected = TrainingConfig(
        precision="bf16", augmentation=replace(TrainingConfig().augmentation, jpeg_share=0.5, jpeg_range=(50, 90))
    )
    assert config == expected


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "colour", "lora.colour", "lora.", ".rank", "lora.rank.x", "colour.rank", "train_backbone.x",
        "clip.architecture.embed_dim", "LORA.rank", "lora rank", "detector.lora.rank",
    ],
)  # fmt: skip
def test_unknown_setting_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        ConfigError, match="DetectorConfig has no setting .*; it has captioner, clip, head, lora"
    ) as caught:
        override(DetectorConfig(), name, "1")
    assert repr(name) in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora.rank", "many", r"^DetectorConfig\.lora\.rank must be int, got 'many'"),
        ("lora.rank", "1.5", r"lora\.rank must be int, got 1\.5"), ("lora.rank", "", "lora.rank must be int, got ''"),
        ("lora.rank", "null", "lora.rank must be int, got None"),
        ("lora.rank", "true", "lora.rank must be int, got True"), ("lora.alpha", '"6"', "must be float, got '6'"),
        ("train_backbone", "yes", "must be bool, got 'yes'"), ("train_backbone", "1", "must be bool, got 1"),
        ("clip.model", "7", "clip.model must be str, got 7"),
        ("clip.architecture", "[1]", "clip.architecture must be dict"), ("patches.spectrum", "log", "must be one of"),
        ("patches.spectrum", "[]", "must be one of"), ("lora", "3", "lora must be an object, got int"),
        ("lora", '{"rank": 3}', r"missing settings \['alpha', 'dropout'\]"), ("lora.rank", "-1", "need rank ≥ 0"),
        ("loss.temperature", "NaN", "temperature nan"), ("projection.rank", "4", "needs rank ≥ 1"),
    ],
)  # fmt: skip
def test_value_that_does_not_fit_is_refused_with_its_place(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(DetectorConfig(), name, value)
