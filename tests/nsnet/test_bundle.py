"""A detector on disk: what is written is what is read, and whatever was tampered with is refused."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nsnet import bundle
from nsnet import captioner as captioner_module
from nsnet.calibration import Calibration
from nsnet.card import model_card
from nsnet.config import to_dict
from nsnet.configuration import MapperConfig, ProjectionConfig
from nsnet.detector import Detector
from nsnet.digest import file_digest
from nsnet.errors import BundleError, WeightsError
from tests.support import models

TRAINING = {"epochs": 3, "ap": 0.75, "data": "images of a café"}


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    captioner_module.save_tiny_captioner(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def detector() -> Detector:
    return models.as_if_trained()


@pytest.fixture(scope="module")
def saved(detector: Detector, captioner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with everything that a bundle can hold; do not change it."""
    folder = tmp_path_factory.mktemp("bundles") / "detector"
    detector.save(folder, captioner=captioner, training=TRAINING)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder: Path) -> str:
    """The message with which a bundle is refused: one line that names the place, by `read` and by `Detector.load`."""
    messages = set()
    for use in (bundle.read, Detector.load):
        with pytest.raises(BundleError) as caught:
            use(folder)
        assert caught.value.exit_code == 2
        messages.add(models.one_line(caught.value))
    (message,) = messages
    assert str(folder) in message
    return message


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / bundle.DESCRIPTION
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def sealed_again(folder: Path, **changed: Any) -> bundle.Description:
    """Seal a folder anew, as a release with other settings would have."""
    old = json.loads((folder / bundle.DESCRIPTION).read_text())
    kept = {name: old[name] for name in ("config", "calibration", "training", "clip_digest")}
    return bundle.seal(folder, **{**kept, **changed})


def test_description_is_read_as_it_was_written(saved: Path, detector: Detector) -> None:
    description = bundle.read(saved)
    assert description == Detector.load(saved).description
    assert description.training == TRAINING
    expected = to_dict(Calibration(temperature=0.5, threshold=0.4, fitted_on=10))
    assert description.calibration == json.loads(json.dumps(expected))
    on_disk = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert set(description.files) == on_disk - {bundle.DESCRIPTION, bundle.CARD}
    assert {name.partition("/")[0] for name in description.files} == {
        bundle.NETWORK, bundle.LORA, bundle.CLIP, bundle.CAPTIONER
    }  # fmt: skip


def test_bundle_is_readable_by_others(saved: Path) -> None:
    """`tempfile` and safetensors write for the owner alone; a bundle is for a cluster."""
    for path in (saved, *saved.rglob("*")):
        wanted = 0o555 if path.is_dir() else 0o444
        assert path.stat().st_mode & wanted == wanted, path


def test_card_states_identity_threshold_and_training(saved: Path) -> None:
    card = (saved / bundle.CARD).read_text(encoding="utf-8")
    description = bundle.read(saved)
    assert f"`{description.detector_id}`" in card and "| temperature, threshold | 0.5, 0.4 (fitted on 10" in card
    assert json.dumps(TRAINING, indent=2, ensure_ascii=False) in card
    assert "trained from random weights" in card and "captions without meaning" in card and "not proof" in card


def test_card_of_named_weights_claims_no_random_ones() -> None:
    config = {
        "clip": {"model": "ViT-L-14-quickgelu", "pretrained": "openai"}, "captioner": {"model": "some/blip"},
        "projection": to_dict(ProjectionConfig()), "mapper": to_dict(MapperConfig()),
    }  # fmt: skip
    card = model_card("0123456789abcdef", config, to_dict(Calibration()), {})
    assert "ViT-L-14-quickgelu, weights openai" in card and "some/blip" in card and "random" not in card


# --- identity --------------------------------------------------------------------------------------------------------


def test_identity_is_that_of_weights_configuration_and_calibration(
    detector: Detector, captioner: Path, tmp_path: Path
) -> None:
    first = detector.save(tmp_path / "first", captioner=captioner, training=TRAINING)
    again = detector.save(tmp_path / "again", captioner=captioner, training={"another": "record"})
    assert first.detector_id == again.detector_id
    assert len(first.detector_id) == 16 and int(first.detector_id, 16) >= 0
    ids = {first.detector_id}
    for i, calibration in enumerate(
        [
            replace(detector.calibration, threshold=0.41),
            replace(detector.calibration, temperature=0.51),
            replace(detector.calibration, uncertain_margin=0.01),
        ]
    ):
        other = models.as_if_trained().set_calibration(calibration)
        ids.add(other.save(tmp_path / f"calibration{i}", captioner=captioner).detector_id)
    assert len(ids) == 4
    longer = replace(models.FROZEN, captioner=replace(models.FROZEN.captioner, max_new_tokens=7))
    ids.add(models.as_if_trained(longer).save(tmp_path / "longer", captioner=captioner).detector_id)
    ids.add(models.as_if_trained().save(tmp_path / "without").detector_id)
    assert len(ids) == 6


@pytest.mark.parametrize(
    "name",
    [
        "visual.base_model.model.transformer.resblocks.1.attn.k_proj.lora_A.default.weight",
        "visual.base_model.model.transformer.resblocks.0.attn.v_proj.lora_B.default.weight",
        "visual.base_model.model.transformer.resblocks.0.attn.q_proj.base_layer.weight",
        "visual.base_model.model.ln_post.bias",
        "mapper.outer.bias",
        "head.classifier.bias",
    ],
)
def test_identity_changes_with_any_weight_of_the_network(name: str, detector: Detector, tmp_path: Path) -> None:
    before = detector.save(tmp_path / "before").detector_id
    other = models.as_if_trained()
    with torch.no_grad():
        weight = dict(other.network.named_parameters())[name].view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    assert other.save(tmp_path / "after").detector_id != before


@pytest.mark.parametrize("folder", [bundle.CLIP, bundle.CAPTIONER])
def test_identity_changes_with_the_weights_of_text_tower_and_captioner(folder: str, copied: Path) -> None:
    before = bundle.read(copied).detector_id
    (path,) = (copied / folder).glob("*.safetensors")
    state = load_file(path)
    name = next(name for name in state if name.startswith(("transformer.", "text_decoder.")))
    state[name] += 0.01
    save_file(state, path, metadata={"format": "pt"})
    assert sealed_again(copied).detector_id != before


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int | None = None, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= mask
    path.write_bytes(content)


def test_whole_bundle_is_accepted(copied: Path) -> None:
    assert bundle.read(copied).detector_id
    sealed_by_a_stranger(copied)
    assert bundle.read(copied).detector_id, "what is refused below must be refused for its own reason"


def test_missing_folder_or_description_is_no_bundle(tmp_path: Path) -> None:
    assert "detector.json is missing" in refused(tmp_path / "nowhere")
    assert "detector.json is missing" in refused(tmp_path)


def test_every_missing_file_is_named(saved: Path, tmp_path: Path) -> None:
    for name in bundle.read(saved).files:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(saved, folder)
        (folder / name).unlink()
        assert f"{name} is missing" in refused(folder)
        shutil.rmtree(folder)


def test_one_flipped_bit_in_any_file_is_found(saved: Path, tmp_path: Path) -> None:
    for name in bundle.read(saved).files:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(saved, folder)
        flip(folder / name)
        assert f"the SHA-256 of {name}" in refused(folder)
        shutil.rmtree(folder)


def test_one_flipped_bit_anywhere_in_the_description_is_found(copied: Path) -> None:
    path = copied / bundle.DESCRIPTION
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(whole), 150, replace=False):
        flip(path, int(position), mask=1 << int(rng.integers(8)))
        with pytest.raises(BundleError) as caught:
            bundle.read(copied)
        assert str(copied) in models.one_line(caught.value)
        path.write_bytes(whole)
    bundle.read(copied)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_description_cut_short_is_damaged(share: float, copied: Path) -> None:
    path = copied / bundle.DESCRIPTION
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "damaged" in refused(copied)


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", b'"text"', b"{}", b"\xff\xfe", b'{"format_version": 1}'])
def test_description_of_another_shape_is_damaged(content: bytes, copied: Path) -> None:
    (copied / bundle.DESCRIPTION).write_bytes(content)
    assert "damaged" in refused(copied)


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "threshold": lambda values: values["calibration"].update(threshold=0.9),
    "temperature": lambda values: values["calibration"].update(temperature=5.0),
    "projection": lambda values: values["config"]["projection"].update(kind="none"),
    "clip-digest": lambda values: values.update(clip_digest="0" * 64),
    "detector-id": lambda values: values.update(detector_id="0" * 16),
    "training-record": lambda values: values["training"].update(ap=0.99),
    "file-left-out": lambda values: values["files"].pop(f"{bundle.LORA}/adapter_config.json"),
    "unknown-key": lambda values: values.update(colour="red"),
    "missing-key": lambda values: values.pop("training"),
    "files-is-a-list": lambda values: values.update(files=[[1, "a"]]),
    "config-is-null": lambda values: values.update(config=None),
}


@pytest.mark.parametrize("kind", EDITS)
def test_edited_description_is_refused(kind: str, copied: Path) -> None:
    edit(copied, EDITS[kind])
    assert "damaged" in refused(copied)


def test_adapter_settings_edited_together_with_their_hash_are_refused(copied: Path) -> None:
    path = copied / bundle.LORA / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6.0', '"lora_alpha": 600.0'))
    assert '"lora_alpha": 600.0' in path.read_text()
    edit(copied, lambda values: values["files"].update({f"{bundle.LORA}/adapter_config.json": file_digest(path)}))
    assert "damaged" in refused(copied)


@pytest.mark.parametrize("version", [True, 1.0, 2.0])
def test_version_that_only_counts_as_equal_is_damage(version: Any, copied: Path) -> None:
    edit(copied, lambda values: values.update(format_version=version))
    assert "damaged" in refused(copied)


def test_training_record_may_hold_whatever_json_can_say(detector: Detector, tmp_path: Path) -> None:
    record = {10: "ten", 9: (1, 2), "nan": float("nan"), "text": "naïve 🙂", "nested": {"none": None}}
    detector.save(tmp_path / "one", training=record)
    read = bundle.read(tmp_path / "one").training
    assert (read["10"], read["9"], read["text"], read["nested"]) == ("ten", [1, 2], "naïve 🙂", {"none": None})
    assert math.isnan(read["nan"])


@pytest.mark.parametrize("version", [0, 3, "1", None, 1.5])
def test_bundle_of_another_version_is_refused_with_what_to_do(version: Any, copied: Path) -> None:
    edit(copied, lambda values: values.update(format_version=version))
    message = refused(copied)
    assert f"format version {version!r}" in message and "reads versions 1 and 2" in message and "train again" in message


@pytest.mark.parametrize("name", ["../outside.json", "lora/../../outside.json", "{tmp}/outside.json", "link.json"])
def test_file_outside_the_bundle_is_refused(name: str, copied: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    (copied / "link.json").symlink_to(outside)
    name = name.replace("{tmp}", str(tmp_path))
    edit(copied, lambda values: values["files"].update({name: file_digest(outside)}))
    assert "changed after it was written" in refused(copied)
    edit(copied, lambda values: values.update(sha256=bundle._seal_of(without(values, "sha256"))))
    assert f"{name!r}, which does not belong in a bundle" in refused(copied)


@pytest.mark.parametrize("name", ["weights.pkl", "lora/adapter_model.bin", "clip/open_clip_pytorch_model.bin", "a.pt"])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
def test_pickle_in_the_folder_is_refused(name: str, listed: bool, copied: Path) -> None:
    torch.save({"a": torch.zeros(1)}, copied / name)
    if listed:
        edit(copied, lambda values: values["files"].update({name: file_digest(copied / name)}))
        edit(copied, lambda values: values.update(sha256=bundle._seal_of(without(values, "sha256"))))
    assert name in refused(copied)
    with pytest.raises(BundleError, match="a bundle holds only"):
        sealed_again(copied)


@pytest.mark.parametrize("name", ["captioner/generation_config2.json", "clip/model.safetensors", "lora/README.md"])
def test_file_that_the_description_does_not_know_is_refused(name: str, copied: Path) -> None:
    (copied / name).write_text("{}")
    assert name in refused(copied)


def test_hidden_files_and_an_edited_card_do_no_harm(copied: Path) -> None:
    (copied / ".DS_Store").write_bytes(b"\x00")
    (copied / bundle.CARD).write_text("# Ours\n")
    assert bundle.read(copied) == Detector.load(copied).description


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda config: config.update(colour="red"), "colour"),
        (lambda config: config["clip"].update(colour="red"), "colour"),
        (lambda config: config.pop("loss"), "loss"),
        (lambda config: config["lora"].update(rank="six"), "rank"),
        (lambda config: config["head"].update(feature_dim=0), "head"),
        (lambda config: config["projection"].update(kind="sideways"), "kind"),
    ],
    ids=["unknown", "unknown-inside", "missing", "wrong-type", "out-of-range", "unknown-choice"],
)
def test_setting_that_this_release_does_not_know_is_refused(
    change: Callable[[dict[str, Any]], None], place: str, copied: Path
) -> None:
    config = json.loads((copied / bundle.DESCRIPTION).read_text())["config"]
    change(config)
    sealed_again(copied, config=config)
    with pytest.raises(BundleError, match="of another version") as caught:
        Detector.load(copied)
    assert place in models.one_line(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"threshold": True}, {"extra": 1}])
def test_calibration_that_makes_no_sense_is_refused(wrong: dict[str, Any], copied: Path) -> None:
    calibration = json.loads((copied / bundle.DESCRIPTION).read_text())["calibration"]
    sealed_again(copied, calibration={**calibration, **wrong})
    with pytest.raises(BundleError, match="of another version") as caught:
        Detector.load(copied)
    models.one_line(caught.value)


@pytest.mark.parametrize("kind", ["missing", "unknown", "other-size", "other-rank", "no-safetensors"])
def test_weights_that_do_not_fit_the_configuration_are_refused(kind: str, copied: Path) -> None:
    path = copied / bundle.NETWORK
    state = load_file(path)
    if kind == "missing":
        del state["head.classifier.bias"]
    elif kind == "unknown":
        state["head.colour"] = torch.zeros(1)
    elif kind == "other-size":
        state["mapper.inner.weight"] = torch.zeros(4, 32)
    if kind == "other-rank":
        adapters = copied / bundle.LORA / "adapter_model.safetensors"
        save_file({name: tensor[:1] for name, tensor in load_file(adapters).items()}, adapters)
    elif kind == "no-safetensors":
        path.write_bytes(b"not weights")
    else:
        save_file(state, path)
    sealed_again(copied)
    with pytest.raises(BundleError, match="does not fit its configuration") as caught:
        Detector.load(copied)
    models.one_line(caught.value)


# --- strangers' bundles ----------------------------------------------------------------------------------------------


def sealed_by_a_stranger(folder: Path) -> None:
    """Record every file as it lies there: a seal is a hash, which anyone can compute."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {name: file_digest(folder / name) for name in names if name not in (bundle.DESCRIPTION, bundle.CARD)}
    edit(folder, lambda values: values.update(files=files))
    edit(folder, lambda values: values.update(detector_id=id_by_the_rule(values)))
    edit(folder, lambda values: values.update(sha256=bundle._seal_of(without(values, "sha256"))))


def id_by_the_rule(values: dict[str, Any]) -> str:
    """The rules of the two versions, written down a second time."""
    files = sorted([name, digest] for name, digest in values["files"].items())
    if values["format_version"] == 1:
        files = [pair for pair in files if pair[0].endswith((".safetensors", ".txt"))]
    content = json.dumps([values["config"], values["calibration"], values["clip_digest"], files], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def as_version_1(folder: Path) -> str:
    """Make a bundle one of version 1, with the adapters' settings as peft wrote them then; its id."""
    path = folder / bundle.LORA / "adapter_config.json"
    mapping = {"base_model_class": "VisionTransformer", "parent_library": "open_clip.transformer"}
    settings = {**json.loads(path.read_text()), "peft_version": "0.21.2", "auto_mapping": mapping}
    path.write_text(json.dumps(settings))
    edit(folder, lambda values: values.update(format_version=1))
    sealed_by_a_stranger(folder)
    return str(json.loads((folder / bundle.DESCRIPTION).read_text())["detector_id"])


def test_bundle_of_version_1_is_read_by_its_own_rule_and_says_so(copied: Path, saved: Path) -> None:
    detector_id = as_version_1(copied)
    (copied / bundle.CAPTIONER / "vocab.txt").write_text("a\n")
    sealed_by_a_stranger(copied)
    assert bundle.read(copied).detector_id != detector_id, "word lists are covered"
    (copied / bundle.CAPTIONER / "vocab.txt").unlink()
    sealed_by_a_stranger(copied)
    described, present = bundle.read(copied), bundle.read(saved)
    assert described.detector_id == detector_id != present.detector_id
    assert detector_id in described.note and "format version 1" in described.note and present.note == ""
    images = [models.image(seed) for seed in range(2)]
    assert Detector.load(copied).predict(images) == Detector.load(saved).predict(images)


@pytest.mark.parametrize("version", [1, 2])
def test_id_that_is_not_that_of_the_content_is_refused(version: int, copied: Path) -> None:
    if version == 1:
        as_version_1(copied)
    edit(copied, lambda values: values.update(detector_id="0" * 16))
    edit(copied, lambda values: values.update(sha256=bundle._seal_of(without(values, "sha256"))))
    assert "its detector_id is not that of its content" in refused(copied)


@pytest.mark.parametrize("version", [1, 2])
def test_adapters_of_another_strength_than_the_configuration_are_refused(version: int, copied: Path) -> None:
    """In version 1 the id does not cover them, and they decide verdicts."""
    if version == 1:
        as_version_1(copied)
    path = copied / bundle.LORA / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 600.0}))
    sealed_by_a_stranger(copied)
    with pytest.raises(BundleError, match="settings of its adapters are not those of"):
        Detector.load(copied)


def test_identity_changes_with_every_file(copied: Path) -> None:
    before = bundle.read(copied)
    for name in before.files:
        if name.endswith(".json"):
            content = (copied / name).read_text()
            (copied / name).write_text(content + " ")
            assert sealed_again(copied).detector_id != before.detector_id, name
            (copied / name).write_text(content)
    assert sealed_again(copied).detector_id == before.detector_id


@pytest.mark.long
def test_detector_saved_again_by_another_process_has_the_same_id(saved: Path, tmp_path: Path) -> None:
    """peft writes a set, in an order that differs between processes, and releases put their versions into JSON."""
    code = (
        "import sys; from pathlib import Path; from tests.support import models; from nsnet import captioner\n"
        "folder = Path(sys.argv[1]); (folder / 'captioner').mkdir()\n"
        "captioner.save_tiny_captioner(folder / 'captioner', seed=0)\n"
        "print(models.as_if_trained().save(folder / 'out', captioner=folder / 'captioner').detector_id)"
    )
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)], cwd=Path(__file__).parents[2], capture_output=True,
            text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout.split()[-1] == bundle.read(saved).detector_id
    content = b"".join((saved / name).read_bytes() for name in bundle.read(saved).files if name.endswith(".json"))
    assert b"peft_version" not in content and b"transformers_version" not in content


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("clip/open_clip_config.json", "custom_pipelines", {}),
        ("captioner/config.json", "auto_map", {"AutoModel": "modeling.Foreign"}),
        ("captioner/tokenizer_config.json", "trust_remote_code", True),
        ("captioner/generation_config.json", "custom_generate", "a/b"),
        ("lora/adapter_config.json", "base_model_name_or_path", "a/b"),
    ],
)
def test_setting_that_runs_code_is_refused_though_it_is_sealed(name: str, key: str, value: Any, copied: Path) -> None:
    path = copied / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    sealed_by_a_stranger(copied)
    message = refused(copied)
    assert name in message and key in message and "may neither run code nor fetch" in message


@pytest.mark.parametrize(
    "name", ["clip/tokenizer.py", "captioner/pytorch_model.bin", "lora/adapter_model.bin", "x/a.json"]
)
def test_file_that_has_no_place_in_a_bundle_is_refused_though_it_is_sealed(name: str, copied: Path) -> None:
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("{}")
    sealed_by_a_stranger(copied)
    assert f"{name!r}, which does not belong in a bundle" in refused(copied)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"clip": {"model": "hf-hub:stranger/repository", "architecture": None}}, "that open_clip knows"),
        ({"clip": {"model": "local-dir:/data", "architecture": None}}, "that open_clip knows"),
        ({"clip": {"architecture": {"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}}}, "timm_model_name"),
        ({"captioner": {"model": "../../data"}}, "name on the hub"),
        ({"captioner": {"revision": "../../data"}}, "name on the hub"),
    ],
)
def test_configuration_that_names_a_place_is_refused(setting: dict[str, Any], message: str, copied: Path) -> None:
    config = json.loads((copied / bundle.DESCRIPTION).read_text())["config"]
    for part, values in setting.items():
        config[part].update(values)
    sealed_again(copied, config=config)
    with pytest.raises(BundleError, match=message) as caught:
        Detector.load(copied)
    models.one_line(caught.value)


def test_member_that_is_a_link_out_of_the_bundle_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "lora/adapter_config.json").rename(tmp_path / "outside.json")
    (copied / "lora/adapter_config.json").symlink_to(tmp_path / "outside.json")
    assert "adapter_config.json is a link out of its folder" in refused(copied)


@pytest.mark.parametrize("name", [bundle.DESCRIPTION, "lora/adapter_config.json", bundle.NETWORK])
def test_fifo_in_the_place_of_a_file_is_refused_at_once(name: str, copied: Path) -> None:
    (copied / name).unlink()
    os.mkfifo(copied / name)
    assert f"{name} cannot be read: not a regular file" in refused(copied)


@pytest.mark.parametrize("name", ["network.safetensors", "lora/adapter_model.safetensors", "captioner/vocab.txt"])
def test_fifo_that_is_not_listed_is_refused_at_once(name: str, copied: Path) -> None:
    """A loader that opened it would wait for ever."""
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    sealed_by_a_stranger(copied)
    assert f"files that detector.json does not list: {name}" in refused(copied)


def test_folder_that_is_a_link_out_of_the_bundle_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "captioner").rename(tmp_path / "elsewhere")
    (copied / "captioner").symlink_to(tmp_path / "elsewhere")
    sealed_by_a_stranger(copied)
    assert "files that detector.json does not list: captioner" in refused(copied)


@pytest.mark.parametrize("value", [[0.5, 0.5], [0.5, 0.5, [0.5]], 0.5, "0.5", [0.5, 0.5, float("nan")]])
def test_normalisation_that_is_not_three_numbers_is_refused(value: Any, copied: Path) -> None:
    path = copied / "clip/open_clip_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "preprocess_cfg": {"mean": value}}))
    sealed_by_a_stranger(copied)
    assert "'preprocess_cfg.mean' may not be" in refused(copied)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"[" * 10**6, "recursion"), (b" " * (bundle.MAX_DESCRIPTION_BYTES + 1), "larger")],
    ids=["deep", "large"],
)
def test_description_that_would_hurt_is_refused(content: bytes, reason: str, copied: Path) -> None:
    (copied / bundle.DESCRIPTION).write_bytes(content)
    assert reason in refused(copied)


@pytest.mark.parametrize("key", ["detector_id", "config", "calibration", "training", "clip_digest", "files"])
@pytest.mark.parametrize("value", [None, 7, [1], {"a": 1}, "text"], ids=str)
def test_description_with_a_value_of_another_kind_is_refused(key: str, value: Any, copied: Path) -> None:
    edit(copied, lambda values: values.update({key: value}))
    edit(copied, lambda values: values.update(sha256=bundle._seal_of(without(values, "sha256"))))
    if (key, type(value)) in [("training", dict), ("detector_id", str), ("clip_digest", str)]:
        return  # of the right kind
    with pytest.raises((BundleError, WeightsError)) as caught:
        Detector.load(copied)
    models.one_line(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("config", "head", "hidden_dim"), 2**63),
        (("config", "mapper", "hidden_dim"), 2**63),
        (("config", "captioner", "seed"), 2**70),
        (("config", "captioner", "max_new_tokens"), 33),
        (("calibration", "temperature"), math.inf),
    ],
    ids=str,
)
def test_number_that_no_model_can_have_is_refused(place: tuple[str, ...], value: float, copied: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        for name in place[:-1]:
            values = values[name]
        values[place[-1]] = value

    edit(copied, change)
    sealed_by_a_stranger(copied)
    with pytest.raises((BundleError, WeightsError)) as caught:
        Detector.load(copied)
    models.one_line(caught.value)


def test_thumbnails_of_endless_size_are_refused(copied: Path) -> None:
    path = copied / "captioner/config.json"
    described = json.loads(path.read_text())
    described["vision_config"]["image_size"] = math.inf
    path.write_text(json.dumps(described))
    sealed_by_a_stranger(copied)
    with pytest.raises(WeightsError, match="does not describe a BLIP model"):
        Detector.load(copied)


def test_bundle_that_lists_very_many_files_is_refused(copied: Path) -> None:
    edit(copied, lambda values: values.update(files=dict.fromkeys(map(str, range(bundle.MAX_FILES + 1)), "")))
    edit(copied, lambda values: values.update(sha256=bundle._seal_of(without(values, "sha256"))))
    assert f"a bundle holds at most {bundle.MAX_FILES}" in refused(copied)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_saving_onto_a_folder_with_content_is_refused_and_leaves_it_alone(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match="not empty") as caught:
        detector.save(tmp_path)
    assert str(tmp_path) in models.one_line(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_saving_onto_a_file_is_refused(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError) as caught:
        detector.save(tmp_path / "file")
    models.one_line(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_into_an_empty_or_a_deep_new_folder_leaves_only_the_bundle(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "new"):
        detector.save(folder)
        assert bundle.read(folder) and [path.name for path in folder.parent.iterdir() if path.name != "a"] == [
            folder.name
        ]


def test_captioner_with_pickled_weights_is_put_inside_as_safetensors(
    detector: Detector, captioner: Path, tmp_path: Path
) -> None:
    """The public BLIP comes as `pytorch_model.bin`, with files beside it that have no place in a bundle."""
    public = tmp_path / "public"
    shutil.copytree(captioner, public)
    torch.save(load_file(public / "model.safetensors"), public / "pytorch_model.bin")
    (public / "model.safetensors").unlink()
    (public / ".gitattributes").write_text("*.bin filter=lfs\n")
    (public / "tf_model.h5").write_bytes(b"weights of another library")
    detector.save(tmp_path / "bundle", captioner=public)
    given, inside = (Detector.load(tmp_path / "bundle", captioner=folder) for folder in (captioner, None))
    images = [models.image(seed) for seed in range(4)]
    assert inside.predict(images) == given.predict(images)
    inside_folder = tmp_path / "bundle" / bundle.CAPTIONER
    assert {path.suffix for path in inside_folder.iterdir()} <= {".json", ".safetensors", ".txt"}


def test_save_that_fails_leaves_nothing(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "captioner").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError) as caught:
        detector.save(tmp_path / "out" / "detector", captioner=tmp_path / "captioner")
    models.one_line(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_folder_without_description_is_no_bundle_at_any_time_of_writing(detector: Detector, tmp_path: Path) -> None:
    """`detector.json` comes last: sealing sees every other file, and itself is replaced in one go."""
    detector.save(tmp_path / "one")
    description = bundle.read(tmp_path / "one")
    (tmp_path / "one" / bundle.DESCRIPTION).unlink()
    assert "detector.json is missing" in refused(tmp_path / "one")
    assert sealed_again_from(description, tmp_path / "one") == description
    assert not [path for path in (tmp_path / "one").iterdir() if path.name.startswith(".")]


def sealed_again_from(description: bundle.Description, folder: Path) -> bundle.Description:
    return bundle.seal(
        folder,
        config=description.config,
        calibration=description.calibration,
        training=description.training,
        clip_digest=description.clip_digest,
    )
