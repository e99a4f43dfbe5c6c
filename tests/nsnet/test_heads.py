"""Semantic mapper and projection head against their formulas in NumPy."""

from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from nsnet.configuration import HeadConfig, MapperConfig
from nsnet.errors import ConfigError
from nsnet.head import ProjectionHead
from nsnet.mapper import RowDropout, RowsOfBatch, SemanticMapper

Array = NDArray[np.float64]
M = TypeVar("M", bound=nn.Module)


def randomised(module: M, seed: int = 0) -> M:
    """Every parameter at random, biases and scales too: starting values hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arrays(module: nn.Module) -> dict[str, Array]:
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


def naive_mapper(v: Array, w: dict[str, Array]) -> Array:
    """Eq. 14, LayerNorm written out."""
    hidden = np.maximum(v @ w["inner.weight"].T + w["inner.bias"], 0)
    residual = v + hidden @ w["outer.weight"].T + w["outer.bias"]
    centred = residual - residual.mean(axis=1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return np.asarray(scaled * w["norm.weight"] + w["norm.bias"])


def naive_head(u: Array, w: dict[str, Array]) -> tuple[Array, Array]:
    """Eq. 17 and the logit of eq. 19."""
    hidden = np.maximum(u @ w["layers.0.weight"].T + w["layers.0.bias"], 0)
    out = hidden @ w["layers.2.weight"].T + w["layers.2.bias"]
    f = out / np.sqrt((out**2).sum(axis=1, keepdims=True))
    return f, f @ w["classifier.weight"][0] + w["classifier.bias"][0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("batch", "dim", "hidden"), [(1, 4, 3), (7, 32, 64), (3, 768, 1024)])
def test_mapper_equals_its_formula(batch: int, dim: int, hidden: int, dtype: torch.dtype, tolerance: float) -> None:
    mapper = randomised(SemanticMapper(dim, MapperConfig(hidden_dim=hidden)).double()).to(dtype).eval()
    v = randn(batch, dim).to(dtype)
    mapped = mapper(v)
    expected = naive_mapper(v.double().numpy(), arrays(mapper))
    assert mapped.shape == (batch, dim) and mapped.dtype == dtype
    np.testing.assert_allclose(mapped.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("batch", "dim", "hidden", "out"), [(1, 4, 3, 2), (7, 32, 64, 16), (3, 768, 768, 512)])
def test_head_equals_its_formula(
    batch: int, dim: int, hidden: int, out: int, dtype: torch.dtype, tolerance: float
) -> None:
    head = randomised(ProjectionHead(dim, HeadConfig(hidden_dim=hidden, feature_dim=out)).double()).to(dtype)
    u = randn(batch, dim).to(dtype)
    features, logit = head(u)
    expected_features, expected_logit = naive_head(u.double().numpy(), arrays(head))
    assert features.shape == (batch, out) and logit.shape == (batch,)
    assert features.dtype == logit.dtype == dtype
    np.testing.assert_allclose(features.detach().double().numpy(), expected_features, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(logit.detach().double().numpy(), expected_logit, rtol=tolerance, atol=10 * tolerance)


def numeric_gradient(function: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    """Central differences of a weighted sum of the output."""
    gradient = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[index] = 1e-6
        out = [function(x + sign * step) for sign in (1, -1)]
        up, down = ((part[0] if isinstance(part, tuple) else part) for part in out)
        gradient[index] = ((up - down) * weights).sum() / 2e-6
    return gradient


def test_gradients_of_mapper_and_head_equal_finite_differences() -> None:
    mapper = randomised(SemanticMapper(5, MapperConfig(hidden_dim=6)).double()).eval()
    head = randomised(ProjectionHead(5, HeadConfig(hidden_dim=6, feature_dim=4)).double())
    for module, width in ((mapper, 5), (head, 4)):
        x, weights = randn(3, 5).requires_grad_(), randn(3, width, seed=2)
        out = module(x)
        ((out[0] if isinstance(out, tuple) else out) * weights).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, numeric_gradient(module, x.detach(), weights), rtol=1e-5, atol=1e-7)


def test_parameters_have_the_shapes_of_the_paper() -> None:
    mapper, head = SemanticMapper(768, MapperConfig()), ProjectionHead(768, HeadConfig())
    assert {name: tuple(parameter.shape) for name, parameter in mapper.named_parameters()} == {
        "inner.weight": (1024, 768), "inner.bias": (1024,), "outer.weight": (768, 1024), "outer.bias": (768,),
        "norm.weight": (768,), "norm.bias": (768,),
    }  # fmt: skip
    assert {name: tuple(parameter.shape) for name, parameter in head.named_parameters()} == {
        "layers.0.weight": (768, 768), "layers.0.bias": (768,), "layers.2.weight": (512, 768), "layers.2.bias": (512,),
        "classifier.weight": (1, 512), "classifier.bias": (1,),
    }  # fmt: skip


def test_mapped_caption_starts_with_mean_0_and_variance_1() -> None:
    mapped = SemanticMapper(64, MapperConfig()).eval()(randn(5, 64).float())
    assert mapped.mean(dim=1).abs().max() < 1e-6
    assert (mapped.var(dim=1, unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_features_have_unit_length(scale: float) -> None:
    head = randomised(ProjectionHead(16, HeadConfig(hidden_dim=8, feature_dim=6)).double())
    features, _ = head(randn(9, 16) * scale)
    assert (features.norm(dim=1) - 1).abs().max() < 1e-12


def test_feature_of_length_zero_has_finite_gradients() -> None:
    head = ProjectionHead(4, HeadConfig(hidden_dim=3, feature_dim=2))
    nn.init.zeros_(head.layers[2].weight)  # type: ignore[arg-type]
    nn.init.zeros_(head.layers[2].bias)  # type: ignore[arg-type]
    features, logit = head(torch.randn(2, 4))
    assert torch.equal(features, torch.zeros(2, 2)) and torch.equal(logit, head.classifier.bias.expand(2))
    (features.sum() + logit.sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters() if parameter.grad is not None)


def test_logit_comes_from_the_unit_length_feature() -> None:
    head = randomised(ProjectionHead(8, HeadConfig(hidden_dim=8, feature_dim=4)).double())
    with torch.no_grad():
        before = head(randn(3, 8))
        head.layers[2].weight.mul_(5)  # type: ignore[operator]
        head.layers[2].bias.mul_(5)  # type: ignore[operator]
        after = head(randn(3, 8))
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=1e-12, atol=1e-12)


def test_features_are_normalised_in_fp32_under_bf16_autocast() -> None:
    head = ProjectionHead(64, HeadConfig(hidden_dim=64, feature_dim=32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = head(randn(8, 64).float())
    assert features.dtype == torch.float32
    assert (features.norm(dim=1) - 1).abs().max() < 1e-6


def test_dropout_acts_in_training_only() -> None:
    mapper = randomised(SemanticMapper(16, MapperConfig(hidden_dim=400, dropout=0.5)).double())
    v = randn(1, 16).expand(200, 16)
    mapper.eval()
    still = mapper(v)
    assert torch.equal(still, mapper(v)) and torch.equal(still[0], still[1])
    mapper.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moving = mapper(v)
        assert not torch.equal(moving[0], moving[1])
        hidden = mapper.dropout(torch.ones(20_000))
    assert set(hidden.tolist()) == {0.0, 2.0}
    assert abs(float(hidden.mean()) - 1) < 0.05


def test_without_dropout_training_and_inference_agree() -> None:
    mapper = randomised(SemanticMapper(16, MapperConfig(hidden_dim=32, dropout=0.0)).double())
    v = randn(4, 16)
    assert torch.equal(mapper.train()(v), mapper.eval()(v))


@pytest.mark.parametrize(
    "settings", [{"hidden_dim": -1}, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": float("nan")}]
)
def test_mapper_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="hidden_dim ≥ 0 and 0 ≤ dropout < 1"):
        MapperConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"hidden_dim": 0}, {"feature_dim": 0}, {"feature_dim": -3}])
def test_head_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        HeadConfig(**settings)  # type: ignore[arg-type]


# --- dropout that belongs to the rows of a global batch


def dropped(hidden: Tensor, rows: RowsOfBatch, p: float = 0.4) -> Tensor:
    """A process's rows after dropout in training; `hidden` holds these rows alone."""
    dropout = RowDropout(p)
    dropout.rows = rows
    found: Tensor = dropout(hidden)
    return found


def naive_dropout(hidden: Tensor, rows: RowsOfBatch, p: float) -> Tensor:
    """Each row by itself: its random numbers are the last of as many rows as the global batch has up to it."""
    kept = []
    for i, row in enumerate(hidden):
        place = rows.first + i
        generator = torch.Generator().manual_seed(rows.seed)
        drawn = [torch.rand(row.shape, generator=generator) for _ in range(place + 1)]
        kept.append(torch.where(drawn[place] >= p, row / (1 - p), 0.0))
    return torch.stack(kept)


@given(
    seed=st.integers(0, 2**40),
    widths=st.lists(st.integers(1, 19), min_size=1, max_size=2),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    p=st.sampled_from([0.1, 0.4, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_dropout_of_a_row_depends_on_the_seed_and_its_place_in_the_global_batch_alone(
    seed: int, widths: list[int], sizes: list[int], p: float
) -> None:
    total = sum(sizes)
    hidden = randn(total, *widths)
    whole = dropped(hidden, RowsOfBatch(seed=seed, first=0, total=total), p)
    expected = naive_dropout(hidden, RowsOfBatch(seed=seed, first=0, total=total), p)
    torch.testing.assert_close(whole, expected, rtol=1e-15, atol=0)
    start = 0
    for size in sizes:
        rows = RowsOfBatch(seed=seed, first=start, total=total)
        assert torch.equal(dropped(hidden[start : start + size], rows, p), whole[start : start + size])
        start += size


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("shape", [(33,), (3, 17)])
def test_processes_and_parts_drop_what_one_process_drops(
    shape: tuple[int, ...], world_size: int, micro_batch: int
) -> None:
    hidden, size = randn(8, *shape), 8 // world_size
    whole = dropped(hidden, RowsOfBatch(seed=5, first=0, total=8))
    parts = []
    for rank in range(world_size):
        for start in range(rank * size, (rank + 1) * size, micro_batch):
            end = min(start + micro_batch, (rank + 1) * size)
            parts.append(dropped(hidden[start:end], RowsOfBatch(seed=5, first=start, total=8)))
    assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole != 0}) == 8, "every row has a mask of its own"


@pytest.mark.parametrize("shape", [(1,), (7,), (15,), (16,), (17,), (1024,), (3, 5), (4, 256)])
def test_first_rows_of_a_longer_draw_are_those_of_a_shorter_one(shape: tuple[int, ...]) -> None:
    """What `RowDropout` relies on; torch draws 16 numbers at a time in places."""
    longest = torch.rand((131, *shape), generator=torch.Generator().manual_seed(9))
    for total in (1, 2, 3, 5, 16, 17, 64, 130):
        assert torch.equal(torch.rand((total, *shape), generator=torch.Generator().manual_seed(9)), longest[:total])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_keeps_its_share_and_scales_what_it_keeps(p: float, dtype: torch.dtype) -> None:
    hidden = torch.ones(200, 500, dtype=dtype)
    found = dropped(hidden, RowsOfBatch(seed=1, first=0, total=200), p)
    assert found.dtype == dtype
    kept = found[found != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    deviation = (p * (1 - p) / found.numel()) ** 0.5
    assert abs(len(kept) / found.numel() - (1 - p)) < 5 * deviation


def test_gradient_passes_where_the_value_does() -> None:
    hidden = randn(6, 40).requires_grad_()
    found = dropped(hidden, RowsOfBatch(seed=1, first=2, total=10), 0.3)
    weights = randn(6, 40, seed=2)
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, weights * (found != 0) / 0.7, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("training", "p"), [(False, 0.5), (True, 0.0)])
def test_dropout_outside_of_training_or_of_share_0_is_the_identity(training: bool, p: float) -> None:
    dropout = RowDropout(p).train(training)
    dropout.rows = RowsOfBatch(seed=1, first=0, total=3)
    hidden = randn(3, 20)
    assert torch.equal(dropout(hidden), hidden)
    # more rows than the batch of the last step has
    assert torch.equal(dropout(randn(9, 20)), randn(9, 20))


def test_dropout_of_rows_neither_reads_nor_moves_other_random_numbers() -> None:
    hidden, rows = randn(4, 30), RowsOfBatch(seed=1, first=0, total=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torch.random.get_rng_state()
        first = dropped(hidden, rows)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(1)
        assert torch.equal(dropped(hidden, rows), first)
    assert not torch.equal(dropped(hidden, RowsOfBatch(seed=2, first=0, total=4)), first)


@pytest.mark.parametrize("seed", [0, 2**62, 2**64, 20_261_231 * 1_000_003**2])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert dropped(randn(2, 8), RowsOfBatch(seed=seed, first=0, total=2)).shape == (2, 8)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_mapper_drops_by_the_rows_it_is_given(shape: tuple[int, ...]) -> None:
    """(B, D) and (B, k, D): in parts as in one go, and each of the k directions with a mask of its own."""
    mapper = randomised(SemanticMapper(5, MapperConfig(hidden_dim=64, dropout=0.5)).double()).train()
    v = randn(1, 5).expand(6, *shape)

    def mapped(first: int, last: int) -> Tensor:
        mapper.dropout.rows = RowsOfBatch(seed=7, first=first, total=6)
        found: Tensor = mapper(v[first:last])
        return found

    whole = mapped(0, 6)
    torch.testing.assert_close(torch.cat([mapped(0, 1), mapped(1, 4), mapped(4, 6)]), whole, rtol=1e-12, atol=1e-12)
    directions = whole.reshape(-1, 5)
    apart = torch.cdist(directions, directions) + torch.eye(len(directions))
    assert apart.min() > 1e-6, "equal captions under different masks"


# --- the linear head


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("batch", "dim"), [(1, 4), (7, 32), (3, 768)])
def test_linear_head_equals_its_formula(batch: int, dim: int, dtype: torch.dtype, tolerance: float) -> None:
    head = randomised(ProjectionHead(dim, HeadConfig(kind="linear")).double()).to(dtype)
    u = randn(batch, dim).to(dtype)
    features, logit = head(u)
    assert features.shape == (batch, dim) and logit.shape == (batch,) and features.dtype == logit.dtype == dtype
    w, row = arrays(head), u.double().numpy()
    expected = [sum(a * b for a, b in zip(one, w["classifier.weight"][0], strict=True)) for one in row]
    np.testing.assert_allclose(
        logit.detach().double().numpy(), np.array(expected) + w["classifier.bias"], rtol=tolerance, atol=dim * tolerance
    )
    lengths = np.sqrt((row**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(features.detach().double().numpy(), row / lengths, rtol=tolerance, atol=tolerance)


def test_linear_head_has_the_weights_of_one_linear_layer_only() -> None:
    head = ProjectionHead(768, HeadConfig(kind="linear", hidden_dim=5, feature_dim=3))
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    assert shapes == {"classifier.weight": (1, 768), "classifier.bias": (1,)}


def test_published_linear_head_gives_the_logits_of_a_linear_layer() -> None:
    """UniversalFakeDetect publishes `weight` (1, 768) and `bias` (1); the length of the feature counts."""
    probe = randomised(nn.Linear(768, 1).double(), seed=3)
    head = ProjectionHead(768, HeadConfig(kind="linear")).double()
    head.classifier.load_state_dict({"weight": probe.weight, "bias": probe.bias})
    u = (randn(9, 768) * torch.logspace(-2, 2, 9, dtype=torch.float64)[:, None]).requires_grad_()
    _, logit = head(u)
    assert torch.equal(logit, probe(u)[:, 0])
    logit.sum().backward()
    torch.testing.assert_close(u.grad, probe.weight.expand(9, 768), rtol=1e-14, atol=0)
    doubled = head(2 * u.detach())[1]
    torch.testing.assert_close(doubled - probe.bias, 2 * (logit - probe.bias), rtol=1e-10, atol=1e-10)


def test_linear_head_of_a_feature_of_length_zero_has_finite_gradients() -> None:
    head = ProjectionHead(4, HeadConfig(kind="linear"))
    u = torch.zeros(2, 4, requires_grad=True)
    features, logit = head(u)
    assert torch.equal(features, torch.zeros(2, 4)) and torch.equal(logit, head.classifier.bias.expand(2))
    (features.sum() + logit.sum()).backward()
    assert u.grad is not None and torch.isfinite(u.grad).all()


def test_unknown_kind_of_head_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'mlp' or 'linear', got 'conv'"):
        HeadConfig(kind="conv")  # type: ignore[arg-type]
