"""One process's training step on a small real network: rates, parameter groups, what moves and what stays."""

import copy
import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsnet.detector import Detector, DetectorConfig
from nsnet.errors import ConfigError
from nsnet.losses import LossConfig, objective
from nsnet.network import Network, ProjectionConfig
from nsnet.training import Batch, TrainingConfig, build_optimizer, set_learning_rate, training_step
from tests.models import FROZEN, SIDE_PX, mosaics

STILL = replace(FROZEN, mapper=replace(FROZEN.mapper, dropout=0.0))
"""Without dropout a step is a pure function of weights and batch."""

VARIANTS: dict[str, DetectorConfig] = {
    "still": STILL,
    "adapters": FROZEN,
    "whole tower": replace(FROZEN, train_backbone=True),
    "no adapters": replace(FROZEN, lora=replace(FROZEN.lora, rank=0)),
    "no projection": replace(FROZEN, projection=ProjectionConfig(kind="none")),
}
CONFIG = TrainingConfig(head_lr=3e-3, backbone_lr=1e-3, weight_decay=0.03, precision="fp32")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def built(variant: str) -> Network:
    return Detector.build(VARIANTS[variant], seed=1).network.train()


def build(variant: str = "still") -> Network:
    """A network to train, the same one at every call."""
    return copy.deepcopy(built(variant))


def batch(count: int = 8, seed: int = 0, valid: list[bool] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        mosaics=torch.from_numpy(mosaics(count, SIDE_PX, seed)),
        text_features=torch.randn(count, 32, generator=generator),
        labels=torch.arange(count) % 2,
        valid=torch.tensor(valid if valid is not None else [True] * count),
    )


def weights(network: Network) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


# --- schedule


def factors(config: TrainingConfig, total: int, steps: int | None = None) -> list[float]:
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(2)], "lr": 0.5, "max_lr": 0.5}])
    found = []
    for step in range(total if steps is None else steps):
        set_learning_rate(optimizer, config, step, total)
        found.append(optimizer.param_groups[0]["lr"] / 0.5)
    return found


@pytest.mark.parametrize(("warmup", "total"), [(0.0, 1), (0.0, 10), (0.05, 100), (0.1, 7), (0.5, 9), (0.99, 10)])
def test_rate_rises_linearly_then_falls_as_a_cosine(warmup: float, total: int) -> None:
    rising = max(1, round(warmup * total))
    expected = [
        (step + 1) / rising if step < rising else (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2
        for step in range(total)
    ]
    assert factors(TrainingConfig(warmup=warmup), total) == pytest.approx(expected, abs=1e-12)


def test_rate_has_known_values() -> None:
    found = factors(TrainingConfig(warmup=0.05), 100, steps=102)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5] == 1.0 and found[52] > 0.5 > found[53]
    assert found[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 94 / 95)))
    assert found[100:] == [0.0, 0.0]
    assert max(found) == 1.0 and all(a >= b for a, b in zip(found[5:], found[6:], strict=False))


def test_each_group_keeps_its_own_highest_rate() -> None:
    optimizer = build_optimizer(build(), CONFIG)
    for step in range(10):
        set_learning_rate(optimizer, CONFIG, step, 10)
        shares = {group["lr"] / group["max_lr"] for group in optimizer.param_groups}
        assert len({round(share, 12) for share in shares}) == 1
    assert {group["max_lr"] for group in optimizer.param_groups} == {3e-3, 1e-3}


# --- parameter groups


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_is_in_the_one_group_that_fits_it(variant: str) -> None:
    network = build(variant)
    optimizer = build_optimizer(network, CONFIG)
    where = [(id(p), group) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p): (name, p) for name, p in network.named_parameters() if p.requires_grad}
    assert sorted(key for key, _ in where) == sorted(trainable)
    for key, group in where:
        name, parameter = trainable[key]
        assert group["lr"] == (1e-3 if name.startswith("visual.") else 3e-3), name
        assert group["weight_decay"] == (0.03 if parameter.ndim >= 2 else 0.0), name


def test_only_adapters_mapper_and_head_are_trained_on_a_frozen_tower() -> None:
    names = [name for name, parameter in build("adapters").named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or name.startswith(("mapper.", "head.")) for name in names)
    assert sum("lora_" in name for name in names) == 2 * 3 * 2  # blocks × (q, k, v) × (A, B)
    assert sum(name.startswith("mapper.") for name in names) == 6
    assert sum(name.startswith("head.") for name in names) == 6


def test_whole_tower_is_trained_when_asked() -> None:
    assert all(parameter.requires_grad for parameter in build("whole tower").parameters())


# --- a step


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_steps_reduce_the_loss_and_leave_frozen_weights(variant: str) -> None:
    network = build(variant)
    before, data = weights(network), batch()
    optimizer = build_optimizer(network, CONFIG)
    history = [training_step(network, data, optimizer, LossConfig(), CONFIG) for _ in range(15)]
    totals = [float(losses.total) for losses, _ in history]
    assert all(math.isfinite(total) for total in totals)
    assert totals[-1] < 0.8 * totals[0]
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_step_returns_detached_losses_and_the_sum_of_residual_energies() -> None:
    network, data = build(), batch()
    with torch.no_grad():
        out = network(data.mosaics, data.text_features)
        expected = objective(out.features, out.logit, out.image, out.semantic, data.labels, LossConfig())
    shares = [float(p.norm() / u.norm()) for p, u in zip(out.projected, out.image, strict=True)]
    losses, energy = training_step(network, data, build_optimizer(network, CONFIG), LossConfig(), CONFIG)
    assert not any(value.requires_grad for value in losses)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert float(energy) == pytest.approx(sum(shares), rel=1e-5)


def test_step_equals_adamw_by_hand() -> None:
    """Eq. 21's gradient, clipped to the norm, then the update of Loshchilov and Hutter at its first step."""
    network, data, loss = build(), batch(), LossConfig(bce_weight=3.0)
    config = replace(CONFIG, clip_norm=0.01)
    twin = copy.deepcopy(network)
    out = twin(data.mosaics, data.text_features)
    objective(out.features, out.logit, out.image, out.semantic, data.labels, loss).total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.double() for name, p in twin.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert norm > 0.01
    before = weights(network)
    training_step(network, data, build_optimizer(network, config), loss, config)
    for name, parameter in network.named_parameters():
        if name not in gradients:
            continue
        lr = 1e-3 if name.startswith("visual.") else 3e-3
        gradient = gradients[name] * 0.01 / norm
        decayed = before[name].double() * (1 - lr * (0.03 if parameter.ndim >= 2 else 0.0))
        expected = decayed - lr * gradient / (gradient.abs() + 1e-8)
        # where the gradient is as small as Adam's ε, rounding of it shows
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=lr * 0.02, msg=name)


@pytest.mark.parametrize("clip_norm", [1e-3, 0.1])
def test_gradient_is_clipped_to_its_norm(clip_norm: float) -> None:
    network, config = build(), replace(CONFIG, clip_norm=clip_norm)
    training_step(network, batch(), build_optimizer(network, config), LossConfig(), config)
    squares = [float(p.grad.double().square().sum()) for p in network.parameters() if p.grad is not None]
    assert math.sqrt(sum(squares)) == pytest.approx(clip_norm, rel=1e-3)


def test_gradients_do_not_pile_up_over_steps() -> None:
    network, data = build(), batch()
    optimizer = build_optimizer(network, replace(CONFIG, head_lr=1e-12, backbone_lr=1e-12))
    norms = []
    for _ in range(2):
        training_step(network, data, optimizer, LossConfig(), replace(CONFIG, clip_norm=1e9))
        norms.append(sum(float(p.grad.square().sum()) for p in network.parameters() if p.grad is not None))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_padding_rows_change_nothing() -> None:
    valid = [True] * 6 + [False] * 2
    one = batch(8, seed=0, valid=valid)
    other = Batch(*(value.clone() for value in one))
    other.mosaics[6:], other.text_features[6:] = 255 - other.mosaics[6:], 9.0
    other.labels[6:] = 1 - other.labels[6:]
    results = []
    for data in (one, other, Batch(*(value[:6] for value in one))):
        network = build()
        losses, _ = training_step(network, data, build_optimizer(network, CONFIG), LossConfig(), CONFIG)
        results.append((losses, [p.grad for p in network.parameters() if p.grad is not None]))
    for losses, gradients in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-4, atol=1e-7)


def test_same_seed_and_batch_train_to_the_same_weights() -> None:
    trained = []
    for _ in range(2):
        network = build()
        optimizer = build_optimizer(network, CONFIG)
        for step in range(3):
            training_step(network, batch(seed=step), optimizer, LossConfig(), CONFIG)
        trained.append(weights(network))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_bf16_step_is_near_the_fp32_step_and_keeps_fp32_weights() -> None:
    totals = {}
    for precision in ("fp32", "bf16"):
        network, config = build(), replace(CONFIG, precision=precision)
        losses, _ = training_step(network, batch(), build_optimizer(network, config), LossConfig(), config)
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
        totals[precision] = float(losses.total)
    assert totals["bf16"] != totals["fp32"]
    assert totals["bf16"] == pytest.approx(totals["fp32"], rel=0.05)


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("fp32", "cpu", None), ("fp32", "cuda", None), ("auto", "cpu", None), ("auto", "cuda", torch.bfloat16),
        ("bf16", "cpu", torch.bfloat16), ("bf16", "cuda", torch.bfloat16),
    ],
)  # fmt: skip
def test_automatic_precision_is_bf16_on_a_gpu_only(precision: str, device: str, dtype: torch.dtype | None) -> None:
    assert TrainingConfig(precision=precision).autocast_dtype(torch.device(device)) is dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs ≥ 1"), ({"batch_size": 1}, "batch_size ≥ 2"), ({"head_lr": 0.0}, "learning rates"),
        ({"head_lr": math.nan}, "learning rates"), ({"backbone_lr": -1.0}, "learning rates"),
        ({"weight_decay": -0.1}, "weight_decay"), ({"weight_decay": math.nan}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"), ({"warmup": 1.0}, "warmup < 1"), ({"warmup": -0.1}, "warmup < 1"),
        ({"warmup": math.nan}, "warmup < 1"), ({"validation_share": 0.0}, "0 < validation_share"),
        ({"validation_share": 1.0}, "a rest for training"), ({"precision": "fp16"}, "fp16"),
        ({"validation_share": 0.5, "test_share": 0.5}, "a rest for training"), ({"test_share": -0.1}, "0 ≤ test_share"),
        ({"micro_batch": -1}, "micro_batch"), ({"patience": -1}, "patience"), ({"captions": "other"}, "shuffled"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**settings)
