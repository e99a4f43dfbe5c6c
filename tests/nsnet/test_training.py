"""One process's training step on a small real network: rates, parameter groups, what moves and what stays."""

import copy
import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nsnet.configuration import DetectorConfig, LossConfig, ProjectionConfig, TrainingConfig
from nsnet.detector import Detector
from nsnet.errors import ConfigError
from nsnet.losses import Losses, objective
from nsnet.mapper import RowDropout, RowsOfBatch
from nsnet.network import Features, Network
from nsnet.precision import training_dtype
from nsnet.recipes import DGS_NET
from nsnet.training import (
    Batch,
    build_optimizer,
    set_learning_rate,
    training_step,
    use_activation_checkpointing,
)
from tests.support.models import ARCHITECTURE, FROZEN, SIDE_PX, as_if_trained, mosaics

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


def test_constant_rate_stays_at_its_highest_after_the_warm_up() -> None:
    assert factors(TrainingConfig(warmup=0.0, schedule="constant"), 7, steps=9) == [1.0] * 9
    assert factors(TrainingConfig(warmup=0.4, schedule="constant"), 10) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_without_decay_and_schedule_the_steps_are_those_of_adam() -> None:
    """The recipe of DGS-Net: torch's Adam at one rate, on a gradient that clipping leaves as it is."""
    config = replace(DGS_NET.training, clip_norm=1e9, precision="fp32")
    network, twin, data = build(), build(), batch()
    optimizer = build_optimizer(network, config)
    adam = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=1e-4)
    for step in range(3):
        set_learning_rate(optimizer, config, step, 3)
        training_step(network, data, optimizer, LossConfig(), config)
        adam.zero_grad()
        out = twin(data.mosaics, data.text_features)
        objective(out.features, out.logit, out.image, out.semantic, data.labels, LossConfig()).total.backward()  # type: ignore[no-untyped-call]
        adam.step()
    moved = weights(build())
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=2e-6, msg=name)
        assert not parameter.requires_grad or not torch.equal(parameter, moved[name]), name


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


@pytest.mark.parametrize("fused", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_gradient_that_is_not_finite_is_no_step_and_is_reported(fused: bool) -> None:
    network = build()
    before = weights(network)
    optimizer = build_optimizer(network, CONFIG)
    if fused:
        groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, fused=True)
    hook = network.head.classifier.weight.register_hook(lambda gradient: gradient * torch.inf)
    losses, _ = training_step(network, batch(), optimizer, STILL.loss, CONFIG)
    assert math.isnan(float(losses.total)) and math.isfinite(float(losses.bce))
    after = weights(network)
    assert all(torch.equal(after[name], before[name]) for name in before)
    moments = [value for state in optimizer.state.values() for name, value in state.items()]
    assert all(not value.any() for value in moments), "no moment and no count of steps"
    hook.remove()
    losses, _ = training_step(network, batch(), optimizer, STILL.loss, CONFIG)
    assert math.isfinite(float(losses.total))
    after = weights(network)
    assert any(not torch.equal(after[name], before[name]) for name in before)


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
    other = copy.deepcopy(one)
    assert other.text_features is not None
    other.mosaics[6:], other.text_features[6:] = 255 - other.mosaics[6:], 9.0
    other.labels[6:] = 1 - other.labels[6:]
    results = []
    for data in (one, other, Batch(*(value[:6] for value in one if value is not None))):
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


# --- a batch in parts

DROPPED = replace(FROZEN, mapper=replace(FROZEN.mapper, dropout=0.3))
TIMM = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 224, "timm_model_name": "siglip_for_tests", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": ARCHITECTURE["text_cfg"],
}
KINDS: dict[str, DetectorConfig] = {
    "per sample": DROPPED,
    "rank k": replace(DROPPED, projection=ProjectionConfig(kind="rank_k", rank=3, bank=6)),
    "global": replace(DROPPED, projection=ProjectionConfig(kind="global", rank=5)),
    "none": replace(DROPPED, projection=ProjectionConfig(kind="none")),
    "no mapper": replace(DROPPED, mapper=replace(DROPPED.mapper, hidden_dim=0)),
    "whole tower": replace(DROPPED, train_backbone=True),
    "linear probe": replace(
        DROPPED,
        projection=ProjectionConfig(kind="none"),
        head=replace(DROPPED.head, kind="linear"),
        lora=replace(DROPPED.lora, rank=0),
        loss=LossConfig(contrastive_weight=0.0, bce_weight=1.0, alignment_weight=0.0),
    ),
    "adapter dropout": replace(DROPPED, lora=replace(DROPPED.lora, dropout=0.4)),
    "timm": replace(
        DROPPED,
        clip=replace(FROZEN.clip, architecture=TIMM),
        patches=replace(FROZEN.patches, mosaic_px=224),
        projection=ProjectionConfig(kind="none"),
    ),
}


@functools.cache
def built_exact(kind: str) -> Network:
    network = as_if_trained(KINDS[kind]).network.double().train()
    generator = torch.Generator().manual_seed(8)
    for buffer in (network.caption_bank, network.semantic_basis):
        assert isinstance(buffer, Tensor)
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
        if buffer is network.semantic_basis:
            buffer.copy_(torch.linalg.qr(buffer).Q)
    return network


def build_exact(kind: str) -> Network:
    """A network in fp64 with dropout, away from its starting values, the same one at every call."""
    return copy.deepcopy(built_exact(kind))


def exact_batch(kind: str, count: int = 8, valid: list[bool] | None = None) -> Batch:
    data, config = batch(count, valid=valid), KINDS[kind]
    assert data.text_features is not None
    return data._replace(
        mosaics=torch.from_numpy(mosaics(count, config.patches.mosaic_px)),
        text_features=data.text_features.double() if config.projection.needs_captions else None,
    )


class Step(NamedTuple):
    losses: Losses
    energy: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def step(network: Network, kind: str, data: Batch, seed: int = 11, **settings: Any) -> Step:
    config = replace(CONFIG, **settings)
    losses, energy = training_step(network, data, build_optimizer(network, config), KINDS[kind].loss, config, seed=seed)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return Step(losses, energy, gradients, weights(network))


def assert_same_step(one: Step, other: Step) -> None:
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(one.energy, other.energy, rtol=1e-6, atol=0)
    assert one.gradients.keys() == other.gradients.keys()
    torch.testing.assert_close(one.gradients, other.gradients, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("adapter dropout", "timm")])
def test_batch_in_parts_steps_like_the_whole_batch(kind: str) -> None:
    """Parts that divide the batch and parts that do not, of one row and of more than there are; with dropout."""
    data = exact_batch(kind)
    network = build_exact(kind)
    whole = step(network, kind, data)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert whole.gradients.keys() == trained and all(gradient.any() for gradient in whole.gradients.values())
    for micro_batch in (1, 3, 4, 100):
        assert_same_step(step(build_exact(kind), kind, data, micro_batch=micro_batch), whole)
    drops = KINDS[kind].projection.needs_captions and KINDS[kind].mapper.hidden_dim > 0
    assert (step(build_exact(kind), kind, data, seed=12).losses.total != whole.losses.total) == drops


@pytest.mark.parametrize("kind", ["per sample", "rank k", "global", "linear probe"])
def test_batch_with_padding_in_parts_steps_like_the_whole_batch(kind: str) -> None:
    """One part is padding only, another in part."""
    data = exact_batch(kind, 7, [True, True, True, True, False, False, False])
    whole = step(build_exact(kind), kind, data)
    for micro_batch in (1, 2, 3, 4):
        assert_same_step(step(build_exact(kind), kind, data, micro_batch=micro_batch), whole)


def test_gradient_of_parts_is_clipped_as_a_whole() -> None:
    data = exact_batch("per sample")
    found = step(build_exact("per sample"), "per sample", data, micro_batch=3, clip_norm=1e-3)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in found.gradients.values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_parts_go_through_one_at_a_time() -> None:
    network, seen = build_exact("per sample"), list[int]()
    network.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    step(network, "per sample", exact_batch("per sample"), micro_batch=3)
    assert seen == [3, 3, 2] * 2
    seen.clear()
    step(network, "per sample", exact_batch("per sample"))
    assert seen == [8]


def by_hand(network: Network, data: Batch, size: int, seed: int) -> dict[str, Tensor]:
    """Gradients with the activations of all parts at once, each with its own random numbers."""
    assert data.text_features is not None
    outputs = []
    for start in range(0, len(data.labels), size):
        for module in network.modules():
            if isinstance(module, RowDropout):
                module.rows = RowsOfBatch(seed=seed, first=start, total=len(data.labels))
        torch.manual_seed(seed * 1_000_003 + start)
        outputs.append(network(data.mosaics[start : start + size], data.text_features[start : start + size]))
    out = Features(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
    loss = objective(out.features, out.logit, out.image, out.semantic, data.labels, LossConfig(), valid=data.valid)
    loss.total.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch", [3, 4, 8])
def test_both_passes_of_a_part_drop_the_same_in_the_adapters(micro_batch: int) -> None:
    data = exact_batch("adapter dropout")
    found = step(build_exact("adapter dropout"), "adapter dropout", data, micro_batch=micro_batch, clip_norm=1e9)
    expected = by_hand(build_exact("adapter dropout"), data, micro_batch, 11)
    torch.testing.assert_close(found.gradients, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_step_is_a_function_of_its_seed_and_not_of_other_random_numbers(micro_batch: int) -> None:
    kind, data = "adapter dropout", exact_batch("adapter dropout")
    found = []
    for seed, other in ((11, 0), (11, 1), (12, 0)):
        torch.manual_seed(other)
        found.append(step(build_exact(kind), kind, data, seed=seed, micro_batch=micro_batch))
    for part in ("losses", "gradients", "weights"):
        torch.testing.assert_close(getattr(found[0], part), getattr(found[1], part), rtol=0, atol=0)
    assert found[0].losses.total != found[2].losses.total


def test_step_of_a_seed_that_is_a_date_is_taken() -> None:
    """Training passes seed × 1,000,003 + step; times as much again is more than torch takes."""
    seed = 20_261_231 * 1_000_003 + 7
    losses = step(build_exact("per sample"), "per sample", exact_batch("per sample"), seed=seed).losses
    assert math.isfinite(float(losses.total))


# --- activations computed again


def blocks(network: Network) -> list[torch.nn.Module]:
    return [module for module in network.visual.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("kind", ["per sample", "whole tower", "adapter dropout", "timm"])
def test_activation_checkpointing_gives_the_same_step(kind: str, micro_batch: int) -> None:
    data, found, passes = exact_batch(kind, 4), {}, {}
    for on in (False, True):
        network, seen = build_exact(kind), list[int]()
        assert len(blocks(network)) == 2
        for block in blocks(network):
            block.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        if on:
            use_activation_checkpointing(network)
        found[on], passes[on] = step(network, kind, data, micro_batch=micro_batch), len(seen)
    # two blocks, and in two parts each part without gradients first
    assert passes == ({False: 2, True: 4} if micro_batch == 0 else {False: 8, True: 12})
    assert_same_step(found[True], found[False])


def test_tower_without_activation_checkpointing_is_refused() -> None:
    """open_clip's ResNet takes the call and does nothing; another module does not even take it."""
    vision = {"image_size": SIDE_PX, "layers": [1, 1, 1, 1], "width": 8}
    resnet = replace(
        FROZEN,
        clip=replace(FROZEN.clip, architecture={**ARCHITECTURE, "vision_cfg": vision}),
        lora=replace(FROZEN.lora, rank=0),
    )
    network = Detector.build(resnet).network
    with pytest.raises(
        ConfigError, match="ModifiedResNet does not support .* checkpointing: set activation_checkpointing=false"
    ):
        use_activation_checkpointing(network)
    network.visual = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Linear does not support activation checkpointing"):
        use_activation_checkpointing(network)


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
    assert training_dtype(precision, torch.device(device)) is dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs ≥ 1"), ({"batch_size": 1}, "batch_size ≥ 2"), ({"head_lr": 0.0}, "learning rates"),
        ({"head_lr": math.nan}, "learning rates"), ({"backbone_lr": -1.0}, "learning rates"),
        ({"weight_decay": -0.1}, "weight_decay"), ({"weight_decay": math.nan}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"), ({"warmup": 1.0}, "warmup < 1"), ({"warmup": -0.1}, "warmup < 1"),
        ({"warmup": math.nan}, "warmup < 1"), ({"validation_share": 0.0}, "need validation_share > 0"),
        ({"validation_share": 1.0}, "a sum below 1"), ({"precision": "fp16"}, "fp16"),
        ({"validation_share": 0.5, "test_share": 0.5}, "a sum below 1"), ({"test_share": -0.1}, "test_share ≥ 0"),
        ({"micro_batch": -1}, "micro_batch"), ({"patience": -1}, "patience"), ({"captions": "other"}, "shuffled"),
        ({"schedule": "linear"}, "schedule must be cosine or constant, got 'linear'"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**settings)


def test_step_leaves_the_random_numbers_of_its_caller_alone() -> None:
    network, data = build(), batch()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    training_step(network, data, build_optimizer(network, CONFIG), LossConfig(), CONFIG)
    assert torch.equal(torch.rand(3), expected)
