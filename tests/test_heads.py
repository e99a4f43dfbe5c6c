"""Semantic mapper and projection head against their formulas in NumPy."""

from typing import TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nsnet.errors import ConfigError
from nsnet.head import HeadConfig, ProjectionHead
from nsnet.mapper import MapperConfig, SemanticMapper

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
        HeadConfig(**settings)
