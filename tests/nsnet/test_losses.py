"""The objective against loops over images, and several processes against one on the joined batch."""

import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.training.collectives import DistributedGather
from nsnet.configuration import HeadConfig, LossConfig, MapperConfig, ProjectionConfig, TrainingConfig
from nsnet.errors import ConfigError
from nsnet.head import ProjectionHead
from nsnet.losses import (
    LEAST_HSIC,
    Losses,
    alignment,
    binary_cross_entropy,
    decorrelation,
    objective,
    supervised_contrastive,
)
from nsnet.mapper import SemanticMapper
from nsnet.network import Network
from nsnet.nullspace import project_per_sample
from nsnet.training import Batch, build_optimizer, training_step


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(count: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return nn.functional.normalize(randn(count, width, seed=seed), dim=1).to(dtype)


def labels(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed))


def naive_contrastive(f: Tensor, y: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Eq. 18: every anchor, every positive, every other image."""
    rows = [i for i in range(len(f)) if valid is None or bool(valid[i])]
    anchors = []
    for i in rows:
        others = [j for j in rows if j != i]
        positives = [j for j in others if int(y[j]) == int(y[i])]
        if not positives:
            continue
        total = f.new_zeros(())
        for p in positives:
            denominator = f.new_zeros(())
            for j in others:
                denominator = denominator + torch.exp(f[i] @ f[j] / temperature)
            total = total + torch.log(torch.exp(f[i] @ f[p] / temperature) / denominator)
        anchors.append(-total / len(positives))
    return torch.stack(anchors).mean() if anchors else f.sum() * 0


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


# --- contrastive (eq. 18)


def test_contrastive_has_its_known_values() -> None:
    f = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    assert float(supervised_contrastive(f, torch.tensor([0, 0, 1, 1]), 1.0)) == pytest.approx(0.551445, abs=1e-6)
    same = torch.tensor([[0.6, 0.8]], dtype=torch.float64).expand(8, 2)
    assert float(supervised_contrastive(same, torch.arange(8) // 4, 0.07)) == pytest.approx(math.log(7), abs=1e-9)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
@pytest.mark.parametrize(("count", "width"), [(2, 3), (3, 2), (8, 4), (13, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_equals_the_loops(count: int, width: int, temperature: float, masked: bool) -> None:
    f, y = unit(count, width, seed=count), labels(count, seed=count)
    valid = labels(count, seed=count + 50).bool() if masked else None
    expected = naive_contrastive(f, y, temperature, valid)
    torch.testing.assert_close(supervised_contrastive(f, y, temperature, valid), expected, rtol=1e-12, atol=1e-12)
    ours = gradient(lambda x: supervised_contrastive(x, y, temperature, valid), f)
    theirs = gradient(lambda x: naive_contrastive(x, y, temperature, valid), f)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_contrastive_is_computed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    f, y = unit(12, 32, dtype=dtype), labels(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supervised_contrastive(f, y, 0.07)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(naive_contrastive(f.double(), y, 0.07)), rel=tolerance)


def test_anchor_without_a_positive_is_left_out() -> None:
    f, y = unit(5, 4), torch.tensor([0, 0, 1, 0, 0])
    loss = supervised_contrastive(f, y, 0.5)
    of_the_four = []
    for i in (0, 1, 3, 4):
        others = [j for j in range(5) if j != i]
        log_sum = torch.logsumexp(torch.stack([f[i] @ f[j] / 0.5 for j in others]), 0)
        of_the_four.append(sum(log_sum - f[i] @ f[p] / 0.5 for p in others if p != 2) / 3)
    assert float(loss) == pytest.approx(float(sum(of_the_four) / 4), abs=1e-12)


@pytest.mark.parametrize("y", [[0], [1], [0, 1], []])
def test_contrastive_without_any_positive_is_zero_with_finite_gradients(y: list[int]) -> None:
    f = unit(len(y), 4) if y else torch.zeros(0, 4, dtype=torch.float64)
    found = gradient(lambda x: supervised_contrastive(x, torch.tensor(y, dtype=torch.int64), 0.07), f)
    assert float(supervised_contrastive(f, torch.tensor(y, dtype=torch.int64), 0.07)) == 0.0
    assert torch.equal(found, torch.zeros_like(f))


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_images_of_one_label_are_all_each_others_positives(count: int, label: int) -> None:
    f, y = unit(count, 4), torch.full((count,), label)
    expected = naive_contrastive(f, y, 0.3)
    assert float(supervised_contrastive(f, y, 0.3)) == pytest.approx(float(expected), abs=1e-12)
    identical = f[:1].expand(count, 4)
    assert float(supervised_contrastive(identical, y, 0.3)) == pytest.approx(math.log(count - 1), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_masked_rows_are_as_if_they_were_dropped(seed: int) -> None:
    f, y = unit(10, 4, seed=seed), labels(10, seed=seed)
    valid = torch.rand(10, generator=torch.Generator().manual_seed(seed)) < 0.6
    masked = gradient(lambda x: supervised_contrastive(x, y, 0.2, valid), f)
    dropped = gradient(lambda x: supervised_contrastive(x, y[valid], 0.2), f[valid])
    torch.testing.assert_close(masked[valid], dropped, rtol=1e-12, atol=1e-14)
    assert torch.equal(masked[~valid], torch.zeros_like(masked[~valid]))
    assert float(supervised_contrastive(f, y, 0.2, torch.zeros(10, dtype=torch.bool))) == 0.0


def test_order_of_the_images_and_names_of_the_labels_change_nothing() -> None:
    f, y = unit(9, 5), labels(9)
    loss = supervised_contrastive(f, y, 0.2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(supervised_contrastive(f[order], y[order], 0.2), loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(supervised_contrastive(f, 1 - y, 0.2), loss, rtol=1e-13, atol=0)


def test_temperature_divides_the_similarity() -> None:
    f, y = unit(9, 5), labels(9)
    hotter = supervised_contrastive(f, y, 0.4)
    torch.testing.assert_close(supervised_contrastive(f * 2**0.5, y, 0.8), hotter, rtol=1e-12, atol=0)
    assert float(supervised_contrastive(f, y)) == float(supervised_contrastive(f, y, 0.07)) != float(hotter)


def test_small_temperature_does_not_overflow() -> None:
    f, y = unit(6, 4, dtype=torch.float32), torch.arange(6) % 2
    found = gradient(lambda x: supervised_contrastive(x, y, 1e-3), f)
    assert torch.isfinite(found).all() and found.abs().max() > 0


# --- cross-entropy (eq. 19) and alignment (eq. 20)


def test_binary_cross_entropy_equals_its_formula() -> None:
    s, y = randn(7) * 3, torch.tensor([0, 1, 1, 0, 1, 0, 0])
    valid = torch.tensor([True, True, False, True, True, True, False])
    terms = []
    for score, label, counts in zip(s.tolist(), y.tolist(), valid.tolist(), strict=True):
        fake = 1 / (1 + math.exp(-score))
        if counts:
            terms.append(-math.log(fake) if label else -math.log(1 - fake))
    found = binary_cross_entropy(s, y, valid, torch.tensor(4.0, dtype=torch.float64))
    assert float(found) == pytest.approx(sum(terms) / 4, abs=1e-12)
    # d/ds = (σ(s) − y)/total on rows that count
    expected = (torch.sigmoid(s) - y) * valid / 4
    ours = gradient(lambda x: binary_cross_entropy(x, y, valid, torch.tensor(4.0)), s)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("logit", [-1e4, -50.0, 50.0, 1e4])
def test_binary_cross_entropy_of_saturated_logits_is_finite(logit: float) -> None:
    s, one = torch.tensor([logit, logit]), torch.tensor(1.0)
    found = binary_cross_entropy(s, torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool), one)
    assert float(found) == pytest.approx(abs(logit), rel=1e-6)


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 5), ("sum", 1)])
def test_alignment_equals_its_formula_and_moves_the_mapper_only(reduction: Any, divisor: int) -> None:
    v, u, valid = randn(4, 5, seed=1), randn(4, 5, seed=2), torch.tensor([True, False, True, True])
    total = torch.tensor(3.0, dtype=torch.float64)
    expected = sum(float((v[i, d] - u[i, d]) ** 2) for i in (0, 2, 3) for d in range(5)) / 3 / divisor
    v.requires_grad_()
    u.requires_grad_()
    loss = alignment(v, u, valid, total, reduction)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)
    loss.backward()  # type: ignore[no-untyped-call]
    assert u.grad is None and v.grad is not None
    formula = 2 * (v - u).detach() * valid[:, None] / 3 / divisor
    torch.testing.assert_close(v.grad, formula, rtol=1e-12, atol=1e-14)


# --- decorrelation


def naive_hsic(k: Tensor, m: Tensor) -> float:
    """HSIC₁ by its definition, the mean over all quadruples of different rows."""
    terms = [
        float(k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q])
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("count", [4, 5, 8])
def test_decorrelation_equals_the_loops_over_quadruples(count: int) -> None:
    """Of centred features with a mean squared length of 1; the loops are over these as well."""
    x, t = randn(count, 3, seed=1) + 2.0, randn(count, 2, seed=2) - 1.0
    kernels = []
    for features in (x, t):
        centred = features - features.mean(dim=0)
        kernels.append(centred @ centred.T / centred.square().sum(dim=1).mean())
    k, m = kernels
    own = max(naive_hsic(k, k), LEAST_HSIC) * max(naive_hsic(m, m), LEAST_HSIC)
    assert float(decorrelation(x, t)) == pytest.approx(naive_hsic(k, m) / own**0.5, rel=1e-9)


def test_decorrelation_of_equal_features_is_one_and_of_independent_ones_zero_on_average() -> None:
    """The plain CKA, with biased estimates, says 0.9 of independent features of this size."""
    independent, plain = [], []
    for seed in range(60):
        x, t = randn(64, 768, seed=2 * seed), randn(64, 768, seed=2 * seed + 1)
        independent.append(float(decorrelation(x, t)))
        k, m = ((c := value - value.mean(dim=0)) @ c.T for value in (x, t))
        plain.append(float((k * m).sum() / (k.norm() * m.norm())))
    error = statistics.stdev(independent) / len(independent) ** 0.5
    assert abs(statistics.mean(independent)) < 3 * error < 0.02 and min(independent) < 0 < max(independent)
    assert 0.85 < statistics.mean(plain) < 0.95
    x = randn(64, 20)
    assert float(decorrelation(x, x)) == pytest.approx(1.0, abs=1e-12)
    half = torch.cat([x[:, :10], randn(64, 10, seed=9)], dim=1)
    assert 0.2 < float(decorrelation(half, x)) < 0.8


def test_length_rotation_mean_and_padding_do_not_lower_the_decorrelation() -> None:
    x, t = randn(12, 5, seed=1), randn(12, 4, seed=2)
    x[:, 0] += t[:, 0]
    value = decorrelation(x, t)
    rotation = torch.linalg.qr(randn(5, 5, seed=3)).Q
    for other in (0.01 * x, x @ rotation, x + 7.0):
        torch.testing.assert_close(decorrelation(other, t), value, rtol=1e-9, atol=0)
    padded = torch.cat([x, 100 + randn(3, 5, seed=4)]), torch.cat([t, randn(3, 4, seed=5)]), torch.arange(15) < 12
    torch.testing.assert_close(decorrelation(*padded), value, rtol=1e-10, atol=0)


def test_gradient_of_the_decorrelation_lowers_it_and_leaves_the_captions_alone() -> None:
    x, t = randn(16, 6, seed=1).requires_grad_(), randn(16, 6, seed=1).requires_grad_()
    start = float(decorrelation(x, t).detach())
    for _ in range(50):
        (slope,) = torch.autograd.grad(decorrelation(x, t), x)
        x = (x - 20.0 * slope).detach().requires_grad_()
    assert start == pytest.approx(1.0) and float(decorrelation(x, t).detach()) < 0.3
    decorrelation(x, t).backward()  # type: ignore[no-untyped-call]
    assert t.grad is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_decorrelation_of_too_few_rows_or_of_one_caption_is_zero_with_finite_gradients(count: int) -> None:
    few = torch.arange(9) < count
    assert float(decorrelation(randn(9, 4), randn(9, 4, seed=1), few)) == 0.0
    found = gradient(lambda x: decorrelation(x, randn(1, 4).expand(9, 4)), randn(9, 4, seed=1))
    assert float(decorrelation(randn(9, 4), randn(1, 4).expand(9, 4))) == 0.0 and torch.isfinite(found).all()
    assert torch.isfinite(gradient(lambda x: decorrelation(x, randn(9, 4), few), randn(9, 4, seed=1))).all()


# --- the objective (eq. 21)


class Inputs(NamedTuple):
    f: Tensor
    logit: Tensor
    u: Tensor
    v: Tensor
    y: Tensor


def inputs(count: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    return Inputs(
        f=unit(count, 6, seed=seed, dtype=dtype),
        logit=randn(count, seed=seed + 1, dtype=dtype),
        u=randn(count, 5, seed=seed + 2, dtype=dtype),
        v=randn(count, 5, seed=seed + 3, dtype=dtype),
        y=labels(count, seed=seed),
    )


def naive_objective(batch: Inputs, config: LossConfig, valid: Tensor) -> list[Tensor]:
    rows = valid.nonzero().flatten().tolist()
    contrastive = naive_contrastive(batch.f, batch.y, config.temperature, valid)
    fake = torch.sigmoid(batch.logit)
    bce = sum(-torch.log(fake[i] if batch.y[i] else 1 - fake[i]) for i in rows) / len(rows)
    squared = [(batch.v[i] - batch.u[i].detach()) ** 2 for i in rows]
    aligned = sum(s.mean() if config.alignment_reduction == "mean" else s.sum() for s in squared) / len(rows)
    total = config.contrastive_weight * contrastive + config.bce_weight * bce + config.alignment_weight * aligned
    return [torch.as_tensor(value) for value in (total, contrastive, bce, aligned, total.new_zeros(()))]


CONFIGS = [
    LossConfig(),
    LossConfig(temperature=0.5, bce_weight=1.5, alignment_weight=0.7, alignment_reduction="sum"),
    LossConfig(bce_weight=0.0, alignment_weight=0.0),
    LossConfig(contrastive_weight=2.5, bce_weight=0.7),
    LossConfig(contrastive_weight=0.0, bce_weight=1.0, alignment_weight=0.0),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=["paper", "own", "contrastive only", "more contrastive", "bce only"])
def test_objective_equals_the_weighted_sum_of_the_loops(config: LossConfig, masked: bool) -> None:
    valid = torch.tensor([True, True, False] * 3) if masked else torch.ones(9, dtype=torch.bool)
    gradients, values = [], []

    def ours(batch: Inputs) -> list[Tensor]:
        return list(objective(*batch, config, valid=valid if masked else None))

    def loops(batch: Inputs) -> list[Tensor]:
        return naive_objective(batch, config, valid)

    for compute in (ours, loops):
        batch = inputs()
        for leaf in batch[:4]:
            leaf.requires_grad_()
        losses = compute(batch)
        losses[0].backward()  # type: ignore[no-untyped-call]
        values.append(torch.stack(losses).detach())
        gradients.append([leaf.grad for leaf in batch[:4]])
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)
    for left, right in zip(*gradients, strict=True):
        # u is detached: neither side has a gradient for it
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_without_a_contrastive_weight_cross_entropy_alone_decides_the_gradient() -> None:
    batch = inputs()
    for leaf in batch[:4]:
        leaf.requires_grad_()
    config = LossConfig(contrastive_weight=0.0, bce_weight=0.6, alignment_weight=0.0)
    losses = objective(*batch, config)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert float(losses.total.detach()) == pytest.approx(0.6 * float(losses.bce.detach()), abs=1e-15)
    assert losses.contrastive > 0, "it is reported, though it has no weight"
    for leaf in (batch.f, batch.v):
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))
    # d/ds of the mean cross-entropy
    expected = 0.6 * (torch.sigmoid(batch.logit.detach()) - batch.y) / 9
    torch.testing.assert_close(batch.logit.grad, expected, rtol=1e-12, atol=1e-15)


def test_objective_adds_the_decorrelation_by_its_weight_alone() -> None:
    batch, t = inputs(), randn(9, 5, seed=8)
    plain, off = objective(*batch, LossConfig()), objective(*batch, LossConfig(), projected=batch.u, text=t)
    assert [float(loss) for loss in off] == [float(loss) for loss in plain] and float(off.decorrelation) == 0.0
    weighted = objective(*batch, LossConfig(decorrelation_weight=0.4), projected=batch.u, text=t)
    assert float(weighted.decorrelation) == float(decorrelation(batch.u, t)) != 0.0
    assert float(weighted.total) == pytest.approx(float(plain.total + 0.4 * weighted.decorrelation), abs=1e-12)
    assert float(objective(*batch, LossConfig(decorrelation_weight=0.4)).total) == float(plain.total)  # no captions


def test_objective_without_a_mapper_has_no_alignment() -> None:
    batch = inputs()
    losses = objective(batch.f, batch.logit, batch.u, None, batch.y, LossConfig())
    full = objective(*batch, LossConfig())
    assert float(losses.alignment) == 0.0 and losses[1:3] == full[1:3]
    assert float(losses.total) == pytest.approx(float(full.contrastive + 0.2 * full.bce), abs=1e-12)


def test_objective_of_padding_only_is_zero_with_finite_gradients() -> None:
    batch = inputs()
    for leaf in batch[:4]:
        leaf.requires_grad_()
    losses = objective(*batch, LossConfig(), valid=torch.zeros(9, dtype=torch.bool))
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert [loss.item() for loss in losses] == [0.0] * 5
    assert all(leaf.grad is None or torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in batch[:4])


def test_objective_of_bf16_features_is_computed_in_fp32() -> None:
    narrow = inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = objective(*narrow, LossConfig())
    wide = Inputs(*(value.double() if value.is_floating_point() else value for value in narrow))
    expected = naive_objective(wide, LossConfig(), torch.ones(9, dtype=torch.bool))
    assert all(loss.dtype == torch.float32 for loss in losses)
    torch.testing.assert_close(torch.stack(list(losses)).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": math.nan}, {"bce_weight": -0.1},
        {"bce_weight": math.nan}, {"alignment_weight": -0.1}, {"alignment_weight": math.nan},
        {"alignment_reduction": "max"}, {"contrastive_weight": -0.1}, {"contrastive_weight": math.nan},
        {"contrastive_weight": 0.0, "bce_weight": 0.0}, {"decorrelation_weight": -0.1},
        {"decorrelation_weight": math.nan},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LossConfig(**settings)


# --- several processes

DECORRELATED = LossConfig(decorrelation_weight=1.5)
ROWS = 4
"""Rows of one process, B."""
SECONDS = 120
"""Limit for the processes of all cases together."""


class Small(nn.Module):
    """The network's own mapper, projection and head on a linear tower, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(7, 5)
        self.mapper = SemanticMapper(5, MapperConfig(hidden_dim=6, dropout=0.0))
        self.head = ProjectionHead(5, HeadConfig(hidden_dim=6, feature_dim=4))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, v = self.tower(x), self.mapper(text)
        projected = project_per_sample(u, v)
        f, logit = self.head(projected)
        return f, logit, u, v, projected


class Case(NamedTuple):
    """A global batch by its labels and its rows that count, both as one digit per row."""

    y: str
    valid: str
    config: LossConfig = CONFIGS[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, valid = (torch.tensor([int(digit) for digit in digits]) for digits in (self.y, self.valid))
        return randn(len(y), 7, seed=1), randn(len(y), 5, seed=2), y, valid.bool()


CASES: dict[int, dict[str, Case]] = {
    2: {
        "all rows": Case("01011010", "11111111"),
        "uneven padding": Case("01011010", "11110100"),
        "a process of padding only": Case("01011010", "11010000"),
        "one label per process": Case("00001111", "11111110"),
        "positives on the other process only": Case("01101001", "11001100"),
        "no positive at all": Case("01101001", "10001000"),
        "sum, other weights": Case("01011010", "11110110", CONFIGS[1]),
        "more contrastive": Case("01011010", "11110110", CONFIGS[3]),
        "decorrelation": Case("01011010", "11110110", DECORRELATED),
    },
    3: {
        "all rows": Case("010110100011", "111111111111"),
        "uneven padding": Case("010110100011", "111101000011"),
        "one label per process": Case("000011110000", "111111101101", CONFIGS[1]),
        "decorrelation": Case("010110100011", "111101000011", DECORRELATED),
    },
}


def step(model: nn.Module, case: Case, rows: slice, gather: Any = None) -> Losses:
    """Losses and gradients of some rows of the global batch."""
    model.zero_grad(set_to_none=True)
    x, text, y, valid = (value[rows] for value in case.tensors())
    f, logit, u, v, projected = model(x, text)
    options = {"gather": gather} if gather else {}
    losses = objective(f, logit, u, v, y, case.config, valid=valid, projected=projected, text=text, **options)
    losses.total.backward()  # type: ignore[no-untyped-call]
    return losses


PROJECTIONS = {"per sample": ProjectionConfig(), "rank k": ProjectionConfig(kind="rank_k", rank=3, bank=6)}
MICRO_BATCHES = (0, 3)
"""Rows of a process that go through at a time; 0: all."""


def small_network(projection: ProjectionConfig) -> Network:
    """The network itself, with dropout, on a linear tower in fp64."""
    tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    facts: Any = SimpleNamespace(embed_dim=5, mean=(0.5, 0.4, 0.3), std=(0.3, 0.3, 0.2))
    network = Network(
        tower, facts, projection, MapperConfig(hidden_dim=6, dropout=0.3), HeadConfig(hidden_dim=6, feature_dim=4)
    ).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (*network.parameters(), network.caption_bank):
            assert isinstance(tensor, Tensor)
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return network


def trained(
    model: nn.Module, network: Network, rows: slice, micro_batch: int = 0, gather: Any = None
) -> dict[str, Any]:
    """Losses, gradients and weights of one step on some rows of a global batch of twelve, two of them padding."""
    generator = torch.Generator().manual_seed(5)
    batch = Batch(
        mosaics=torch.randint(0, 256, (12, 4, 4, 3), generator=generator, dtype=torch.uint8),
        text_features=torch.randn(12, 5, generator=generator, dtype=torch.float64),
        labels=torch.arange(12) % 3 % 2,
        valid=torch.arange(12) % 5 != 3,
    )
    config = TrainingConfig(precision="fp32", micro_batch=micro_batch, clip_norm=0.5)
    options = {"gather": gather} if gather else {}
    mine = Batch(*(value[rows] for value in batch if value is not None))
    losses, _ = training_step(
        model, mine, build_optimizer(network, config), DECORRELATED, config, seed=20_261_231 * 1_000_003, **options
    )
    assert float(losses.decorrelation) != 0.0
    return {
        "losses": torch.stack(list(losses)),
        "gradients": {key: of(parameter).clone() for key, parameter in network.named_parameters()},
        "weights": {key: parameter.detach().clone() for key, parameter in network.named_parameters()},
    }


def gathered(gather: DistributedGather) -> dict[str, Any]:
    """What the gather itself returns, forward and backward."""
    weight = torch.arange(1.0, gather.world_size * 2 + 1, dtype=torch.float64)[:, None]
    local = torch.full((2, 3), float(gather.rank), dtype=torch.float64) + torch.arange(3) / 10
    leaf = local.clone().requires_grad_()
    everyone = gather(leaf)
    # every process weighs the rows by its rank + 1: a row's gradient is the sum over processes
    (everyone * weight * (gather.rank + 1)).sum().backward()  # type: ignore[no-untyped-call]
    return {
        "everyone": everyone.detach(),
        "gradient": leaf.grad,
        "labels": gather(torch.tensor([gather.rank, 7])),
        "flags": gather(torch.tensor([gather.rank == 0, True])),
        "strided": gather(torch.arange(6.0).reshape(2, 3).T + gather.rank),
        "identity": (gather.rank, gather.world_size),
    }


def of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def run_rank(rank: int, folder: Path) -> None:
    """One process: every case of two processes, then every case of three."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    for world_size, cases in CASES.items():
        if rank >= world_size:
            continue
        address = f"file://{folder}/rendezvous-{world_size}"
        limit = timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=limit)
        gather = DistributedGather()
        found: dict[str, Any] = {"gather": gathered(gather)}
        model = DistributedDataParallel(Small())
        for name, case in cases.items():
            losses = step(model, case, slice(rank * ROWS, (rank + 1) * ROWS), gather)
            gradients = {key: of(parameter).clone() for key, parameter in model.module.named_parameters()}
            found[name] = {"losses": torch.stack(list(losses)).detach(), "gradients": gradients}
        size = 12 // world_size
        for kind, projection in PROJECTIONS.items():
            for micro_batch in MICRO_BATCHES:
                network = small_network(projection)
                rows = slice(rank * size, (rank + 1) * size)
                step_of = trained(DistributedDataParallel(network), network, rows, micro_batch, gather)
                found[f"{kind}, {micro_batch}"] = step_of
        torch.save(found, folder / f"{world_size}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size -> what each of its processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    # what DDP needs takes seconds to import: one server process does it, and the ranks start from it
    multiprocessing.set_forkserver_preload(["torch._dynamo"])
    context = multiprocessing.start_processes(  # type: ignore[attr-defined, no-untyped-call]
        run_rank, args=(folder,), nprocs=3, join=False, start_method="forkserver"
    )
    try:
        # each join returns when one process ends, and raises when it failed
        for _ in range(3):
            if context.join(timeout=SECONDS):
                break
        else:
            pytest.fail(f"the processes did not end within {SECONDS} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)] for size in CASES
    }


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_processes_together_equal_one_process_on_the_joined_batch(
    processes: dict[int, list[dict[str, Any]]], size: int, name: str
) -> None:
    model, case = Small(), CASES[size][name]
    losses = torch.stack(list(step(model, case, slice(None)))).detach()
    ranks = [found[name] for found in processes[size]]
    mean = torch.stack([rank["losses"] for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(mean, losses, rtol=1e-10, atol=1e-10)
    for key, parameter in model.named_parameters():
        for rank in ranks:
            torch.testing.assert_close(rank["gradients"][key], parameter.grad, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_step_of_processes_in_whole_and_in_parts_equals_that_of_one_process(
    processes: dict[int, list[dict[str, Any]]], kind: str, micro_batch: int, size: int
) -> None:
    """Dropout included: it belongs to the rows, not to who computes them."""
    network = small_network(PROJECTIONS[kind])
    before = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    expected = trained(network, network, slice(None))
    ranks = [found[f"{kind}, {micro_batch}"] for found in processes[size]]
    mean = torch.stack([rank["losses"] for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(mean, expected["losses"], rtol=1e-10, atol=1e-10)
    for rank in ranks:
        for part, atol in (("gradients", 1e-10), ("weights", 1e-9)):
            torch.testing.assert_close(rank[part], expected[part], rtol=1e-8, atol=atol)
    assert all(not torch.equal(before[key], after) for key, after in expected["weights"].items())


def test_cases_of_several_processes_tell_right_from_wrong() -> None:
    """Averaging losses of separate batches, without a gather, gives other values: the test above can fail."""
    for size, cases in CASES.items():
        case = cases["uneven padding"]
        model = Small()
        joined = step(model, case, slice(None)).total
        apart = [step(model, case, slice(r * ROWS, (r + 1) * ROWS)).total for r in range(size)]
        assert abs(float((sum(apart) / size - joined).detach())) > 0.01


@pytest.mark.parametrize("size", CASES)
def test_gather_joins_rows_in_rank_order_and_sums_their_gradients(
    processes: dict[int, list[dict[str, Any]]], size: int
) -> None:
    weight = torch.arange(1.0, size * 2 + 1, dtype=torch.float64)[:, None]
    blocks = [torch.full((2, 3), float(rank), dtype=torch.float64) + torch.arange(3) / 10 for rank in range(size)]
    for rank, found in enumerate(processes[size]):
        gather = found["gather"]
        assert tuple(gather["identity"]) == (rank, size)
        assert torch.equal(gather["everyone"], torch.cat(blocks))
        expected = weight[2 * rank : 2 * rank + 2].expand(2, 3) * sum(range(1, size + 1))
        torch.testing.assert_close(gather["gradient"], expected, rtol=1e-12, atol=0)
        assert gather["labels"].tolist() == [value for other in range(size) for value in (other, 7)]
        assert gather["flags"].tolist() == [True, True] + [False, True] * (size - 1)
        strided = torch.arange(6.0).reshape(2, 3).T
        assert torch.equal(gather["strided"], torch.cat([strided + other for other in range(size)]))
