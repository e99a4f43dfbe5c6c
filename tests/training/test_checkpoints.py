"""The state of a training: what is put back is what was saved, and whatever else lies there is refused."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from jobs.training import checkpoints
from jobs.training.checkpoints import CheckpointError, Progress
from jobs.training.validation import quality
from nsnet.configuration import TrainingConfig
from nsnet.detector import Detector
from nsnet.network import Network
from nsnet.training import build_optimizer, training_step
from tests.nsnet.test_training import batch
from tests.support.models import FROZEN, one_line
from tests.support.pickles import Bomb

DIGEST = checkpoints.settings_digest({"seed": 0})
CONFIG = TrainingConfig(head_lr=3e-3, backbone_lr=1e-3, precision="fp32")
CPU = torch.device("cpu")

Trained = tuple[Network, torch.optim.Optimizer]


def fresh(seed: int = 0, **changed: Any) -> Trained:
    network = Detector.build(replace(FROZEN, **changed), seed=seed).network
    return network, build_optimizer(network, CONFIG)


def take_step(trained: Trained, seed: int) -> None:
    network, optimizer = trained
    training_step(network.train(), batch(seed=seed), optimizer, FROZEN.loss, CONFIG, seed=seed)


def progress() -> Progress:
    return Progress(
        step=7, history=[{"epoch": 1, "loss": 0.5, "val_ap": None}], sums=[1.5, 0.25], failed=2, best_epoch=1,
        mlflow_run="abc", best={"head": torch.arange(3.0)},
        validation={"rows": torch.tensor([1, 4]), "logits": torch.tensor([0.25, -3.0], dtype=torch.float64)},
    )  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """A checkpoint after two steps."""
    trained = fresh()
    for seed in range(2):
        take_step(trained, seed)
    saved = checkpoints.save(*trained, progress(), DIGEST)
    yield saved
    checkpoints.remove(saved)


def refused(folder: Path, digest: str = DIGEST, **changed: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(folder, *fresh(**changed), CPU, digest)
    return one_line(caught.value)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(folder: Path) -> None:
    undisturbed = fresh()
    for seed in range(3):
        take_step(undisturbed, seed)
    continued = fresh(seed=9)
    # weights that do not train come from the seed; the rest from the checkpoint
    continued[0].load_state_dict(fresh()[0].state_dict() | checkpoints.trained_weights(continued[0]))
    checkpoints.restore(folder, *continued, CPU, DIGEST)
    take_step(continued, 2)
    assert_equal(continued[0].state_dict(), undisturbed[0].state_dict())


def test_moments_of_the_optimiser_are_needed_for_that(folder: Path) -> None:
    with_moments, without = fresh(), fresh()
    checkpoints.restore(folder, *with_moments, CPU, DIGEST)
    without[0].load_state_dict(with_moments[0].state_dict())
    for trained in (with_moments, without):
        take_step(trained, 2)
    name = "head.classifier.weight"
    assert not torch.equal(with_moments[0].state_dict()[name], without[0].state_dict()[name])


def test_progress_is_read_as_it_was_saved(folder: Path) -> None:
    found, expected = checkpoints.read_progress(folder, DIGEST), progress()
    for name, value in vars(expected).items():
        if isinstance(value, dict):
            assert_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value, name


def test_checkpoint_holds_only_weights_that_train(folder: Path) -> None:
    network, _ = fresh()
    names = set(checkpoints.trained_weights(network))
    assert names == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in names) and not any("visual" in n and "lora_" not in n for n in names)


def test_weights_are_copies(folder: Path) -> None:
    trained = fresh()
    before = checkpoints.trained_weights(trained[0])
    kept = {name: value.clone() for name, value in before.items()}
    take_step(trained, 0)
    assert_equal(before, kept)


def test_best_epoch_is_that_of_the_highest_ap_and_of_equal_ones_the_lowest_cross_entropy() -> None:
    epochs = [(0.9, 0.5), (0.9005, 0.9), (0.9005, 0.7), (None, 0.1)]
    history = [{"epoch": i, "val_ap": ap, "val_bce": bce} for i, (ap, bce) in enumerate(epochs)]
    assert sorted(history, key=quality)[-1]["epoch"] == 2 and sorted(history, key=quality)[0]["epoch"] == 3


def test_digest_is_of_every_setting_and_not_of_their_order() -> None:
    one = checkpoints.settings_digest({"a": 1, "b": {"c": 2}})
    assert one == checkpoints.settings_digest({"b": {"c": 2}, "a": 1})
    assert one != checkpoints.settings_digest({"a": 1, "b": {"c": 3}})


def test_checkpoint_of_other_settings_is_refused(folder: Path) -> None:
    assert "other settings: choose another --out" in refused(folder, checkpoints.settings_digest({"seed": 1}))


def test_checkpoint_of_another_recipe_is_refused_and_changes_nothing(folder: Path) -> None:
    other = fresh(head=replace(FROZEN.head, feature_dim=16))
    before = {name: value.clone() for name, value in other[0].state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of another recipe: \d+ weights differ .* head\.classifier\.weight"):
        checkpoints.restore(folder, *other, CPU, DIGEST)
    assert_equal(other[0].state_dict(), before)
    assert "of another recipe" in refused(folder, lora=replace(FROZEN.lora, rank=0))


@pytest.mark.parametrize(
    "name", [checkpoints.WEIGHTS, checkpoints.BEST, checkpoints.OPTIMIZER, checkpoints.VALIDATION, checkpoints.STATE]
)
def test_file_that_is_cut_short_or_missing_is_damage(name: str, folder: Path) -> None:
    path = folder / name
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        assert "damaged" in refused(folder)
    path.unlink()
    assert "damaged" in refused(folder)


@pytest.mark.parametrize("state", ["[]", "{}", "null", '{"settings": "x", "unknown": 1}'])
def test_state_of_another_shape_is_damage(state: str, folder: Path) -> None:
    (folder / checkpoints.STATE).write_text(state)
    assert "damaged" in refused(folder)


def test_optimiser_of_another_network_is_damage(folder: Path) -> None:
    torch.save({"state": {}, "param_groups": [{"lr": 1.0, "params": [0]}]}, folder / checkpoints.OPTIMIZER)
    assert "damaged" in refused(folder)


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_pickle_in_place_of_the_optimiser_is_never_run(write: str, folder: Path) -> None:
    path = folder / checkpoints.OPTIMIZER
    if write == "pickle":
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    else:
        torch.save({"state": Bomb(), "param_groups": []}, path)
    assert "damaged" in refused(folder)


def test_other_tensors_than_the_best_epochs_are_found_when_they_are_put_back(folder: Path) -> None:
    network, _ = fresh()
    save_file({"head.classifier.weight": torch.zeros(1, 2)}, folder / checkpoints.BEST)
    found = checkpoints.read_progress(folder, DIGEST)
    with pytest.raises(CheckpointError, match="another recipe"):
        checkpoints.load_weights(network, found.best)


def test_removed_checkpoint_leaves_nothing_and_may_be_removed_twice(folder: Path) -> None:
    assert json.loads((folder / checkpoints.STATE).read_text())["step"] == 7
    checkpoints.remove(folder)
    checkpoints.remove(folder)
    assert not folder.exists()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
