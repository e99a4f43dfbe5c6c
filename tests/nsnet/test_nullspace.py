"""Null-space projections against the explicit D×D matrix, the semantic basis against the plain SVD."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsnet.configuration import BasisRule
from nsnet.errors import ConfigError, NullSpaceError
from nsnet.nullspace import SemanticSpectrum, StreamingSVD, project_global, project_per_sample, project_rank_k

SHAPES = [(1, 2), (3, 5), (8, 64), (4, 768)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explicit_per_sample(u: Tensor, v: Tensor, eps: float = 1e-8) -> Tensor:
    """Eq. 16, one D×D matrix per row."""
    rows = []
    for row, direction in zip(u, v, strict=True):
        matrix = torch.eye(len(row), dtype=u.dtype) - torch.outer(direction, direction) / max(
            direction @ direction, eps
        )
        rows.append(row @ matrix)
    return torch.stack(rows)


def explicit_span(u: Tensor, directions: Tensor) -> Tensor:
    """u minus its projection onto the row space of the directions, by the SVD of each row's directions."""
    rows = []
    for row, span in zip(u, directions, strict=True):
        _, values, right = torch.linalg.svd(span, full_matrices=False)
        basis = right[values > 1e-9]
        rows.append(row - basis.T @ (basis @ row))
    return torch.stack(rows)


def orthonormal(dim: int, rank: int, seed: int = 0) -> Tensor:
    basis: Tensor = torch.linalg.qr(randn(dim, rank, seed=seed)).Q
    return basis


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Gradients of a fixed weighted sum of the output."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    (out * randn(*out.shape, seed=99).to(out.dtype)).sum().backward()  # type: ignore[no-untyped-call]
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


# --- per sample (eq. 16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_per_sample_equals_the_explicit_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, v = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    projected = project_per_sample(u, v)
    assert projected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = explicit_per_sample(u.double(), v.double())
    assert (projected.double() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_per_sample_gradients_equal_those_of_the_explicit_matrix(shape: tuple[int, int]) -> None:
    u, v = randn(*shape, seed=1), randn(*shape, seed=2)
    ours, expected = gradients(project_per_sample, u, v), gradients(explicit_per_sample, u, v)
    for left, right in zip(ours, expected, strict=True):
        assert (left - right).abs().max() < 1e-12 * max(1.0, float(right.abs().max()))


def test_per_sample_passes_gradcheck() -> None:
    u, v = randn(3, 6, seed=1).requires_grad_(), randn(3, 6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(project_per_sample, (u, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_per_sample_has_the_properties_of_a_projection(dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    u, v = randn(32, 768, seed=1, dtype=dtype), randn(32, 768, seed=2, dtype=dtype)
    projected = project_per_sample(u, v)
    cosine = torch.nn.functional.cosine_similarity(projected, v)
    assert cosine.abs().max() < tolerance
    assert (project_per_sample(projected, v) - projected).abs().max() < tolerance
    assert (projected.norm(dim=1) <= u.norm(dim=1) * (1 + tolerance)).all()
    # what was removed is parallel to v: Pythagoras
    removed = u - projected
    whole = projected.square().sum(1) + removed.square().sum(1)
    torch.testing.assert_close(whole, u.square().sum(1), rtol=tolerance, atol=0)
    # linear in u
    other = randn(32, 768, seed=3, dtype=dtype)
    combined = project_per_sample(2 * u - 3 * other, v)
    assert (combined - 2 * projected + 3 * project_per_sample(other, v)).abs().max() < 10 * tolerance


@pytest.mark.parametrize("factor", [-1.0, 1e-3, 7.0, 1e6])
def test_per_sample_ignores_length_and_sign_of_the_direction(factor: float) -> None:
    u, v = randn(5, 64, seed=1), randn(5, 64, seed=2)
    assert (project_per_sample(u, factor * v) - project_per_sample(u, v)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_direction_leaves_the_feature_and_finite_gradients(dtype: torch.dtype) -> None:
    u, v = randn(2, 16, seed=1, dtype=dtype).requires_grad_(), torch.zeros(2, 16, dtype=dtype).requires_grad_()
    projected = project_per_sample(u, v)
    assert torch.equal(projected, u.to(projected.dtype))
    projected.sum().backward()  # type: ignore[no-untyped-call]
    assert u.grad is not None and v.grad is not None
    assert torch.isfinite(u.grad).all() and torch.isfinite(v.grad).all()


@pytest.mark.parametrize("factor", [-2.0, 0.5, 100.0])
def test_parallel_feature_becomes_zero(factor: float) -> None:
    v = randn(4, 64, seed=2)
    assert project_per_sample(factor * v, v).abs().max() < 1e-12 * abs(factor) * 10
    ours = gradients(project_per_sample, factor * v, v)
    assert all(torch.isfinite(gradient).all() for gradient in ours)


def test_direction_below_epsilon_is_divided_by_epsilon() -> None:
    u, v = randn(1, 8, seed=1), torch.full((1, 8), 1e-6, dtype=torch.float64)
    expected = u - (u * v).sum() * v / 1e-8
    torch.testing.assert_close(project_per_sample(u, v), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["per sample", "rank k", "global"])
def test_projection_runs_in_fp32_under_bf16_autocast(kind: str) -> None:
    u, v = randn(16, 256, seed=1, dtype=torch.float32), randn(16, 256, seed=2, dtype=torch.float32)
    basis = orthonormal(256, 5).float()
    project: Callable[[], Tensor] = {
        "per sample": lambda: project_per_sample(u, v),
        "rank k": lambda: project_rank_k(u, torch.stack([v, v.roll(1, 0)], dim=1)),
        "global": lambda: project_global(u, basis),
    }[kind]
    plain = project()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = project()
        # the same product outside the guard does run in bf16, so that this test can fail
        assert (u @ basis).dtype == torch.bfloat16
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


@pytest.mark.parametrize(("u", "v"), [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((4,), (4,)), ((2, 3, 4), (2, 3, 4))])
def test_per_sample_refuses_other_shapes(u: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        project_per_sample(torch.zeros(u), torch.zeros(v))


# --- rank k per sample


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("batch", "k", "dim"), [(1, 1, 3), (4, 2, 8), (3, 5, 64), (2, 8, 768), (2, 3, 3)])
def test_rank_k_equals_projection_off_the_span(batch: int, k: int, dim: int, dtype: torch.dtype) -> None:
    u, directions = randn(batch, dim, seed=1, dtype=dtype), randn(batch, k, dim, seed=2, dtype=dtype)
    projected = project_rank_k(u, directions)
    assert projected.dtype == dtype
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    assert (projected.double() - explicit_span(u.double(), directions.double())).abs().max() < tolerance


@pytest.mark.parametrize("seed", range(3))
def test_rank_k_gradients_equal_those_of_the_span(seed: int) -> None:
    u, directions = randn(3, 7, seed=seed), randn(3, 3, 7, seed=seed + 10)

    def by_solving(u: Tensor, directions: Tensor) -> Tensor:
        gram = directions @ directions.transpose(1, 2)
        weights = torch.linalg.solve(gram, (directions @ u[:, :, None]))
        removed: Tensor = (directions.transpose(1, 2) @ weights)[:, :, 0]
        return u - removed

    for left, right in zip(gradients(project_rank_k, u, directions), gradients(by_solving, u, directions), strict=True):
        assert (left - right).abs().max() < 1e-9


def test_rank_k_passes_gradcheck() -> None:
    u, directions = randn(2, 5, seed=1).requires_grad_(), randn(2, 2, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(project_rank_k, (u, directions))


def test_rank_1_equals_the_per_sample_projection() -> None:
    u, v = randn(6, 32, seed=1), randn(6, 32, seed=2)
    assert (project_rank_k(u, v[:, None]) - project_per_sample(u, v)).abs().max() < 1e-13
    ours = gradients(lambda u, v: project_rank_k(u, v[:, None]), u, v)
    for left, right in zip(ours, gradients(project_per_sample, u, v), strict=True):
        assert (left - right).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_and_dependent_directions_are_left_out(dtype: torch.dtype) -> None:
    u, a, b = (randn(4, 40, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    directions = torch.stack([a, torch.zeros_like(a), 3 * a, b, a - 2 * b, -b], dim=1)
    expected = explicit_span(u.double(), torch.stack([a, b], dim=1).double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (project_rank_k(u, directions).double() - expected).abs().max() < tolerance
    for gradient in gradients(project_rank_k, u, directions):
        assert torch.isfinite(gradient).all()


def test_rank_k_of_zeros_only_leaves_the_feature_and_finite_gradients() -> None:
    u, directions = randn(2, 8, seed=1), torch.zeros(2, 3, 8, dtype=torch.float64)
    assert torch.equal(project_rank_k(u, directions), u)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(project_rank_k, u, directions))


@pytest.mark.parametrize("gap", [1e-2, 1e-3])
def test_nearly_parallel_directions_are_both_removed_in_fp32(gap: float) -> None:
    u, a, b = (randn(3, 64, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    directions = torch.stack([a, a + gap * b], dim=1)
    projected = project_rank_k(u, directions)
    for direction in (a, directions[:, 1]):
        assert torch.nn.functional.cosine_similarity(projected, direction).abs().max() < 1e-5


def test_rank_k_is_idempotent_and_ignores_the_order_and_lengths() -> None:
    u, directions = randn(3, 32, seed=1), randn(3, 4, 32, seed=2)
    projected = project_rank_k(u, directions)
    assert (project_rank_k(projected, directions) - projected).abs().max() < 1e-12
    lengths = torch.tensor([1e-3, -5.0, 1e4, 2.0], dtype=torch.float64)[None, :, None]
    assert (project_rank_k(u, (directions * lengths).flip(1)) - projected).abs().max() < 1e-11


@pytest.mark.parametrize(("u", "v"), [((3, 4), (3, 4)), ((3, 4), (3, 2, 5)), ((3, 4), (2, 2, 4)), ((4,), (1, 1, 4))])
def test_rank_k_refuses_other_shapes(u: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, k, D\)"):
        project_rank_k(torch.zeros(u), torch.zeros(v))


# --- global (eq. 15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("batch", "dim", "rank"), [(1, 4, 1), (5, 32, 31), (8, 768, 100)])
def test_global_equals_the_explicit_matrix(batch: int, dim: int, rank: int, dtype: torch.dtype) -> None:
    u, basis = randn(batch, dim, seed=1, dtype=dtype), orthonormal(dim, rank).to(dtype)
    matrix = torch.eye(dim, dtype=torch.float64) - basis.double() @ basis.double().T
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    projected = project_global(u, basis)
    assert projected.dtype == dtype
    assert (projected.double() - u.double() @ matrix).abs().max() < tolerance


def test_global_gradients_equal_those_of_the_explicit_matrix() -> None:
    def explicit(u: Tensor, basis: Tensor) -> Tensor:
        return u @ (torch.eye(len(basis), dtype=u.dtype) - basis @ basis.T)

    u, basis = randn(3, 6, seed=1), orthonormal(6, 2)
    for left, right in zip(gradients(project_global, u, basis), gradients(explicit, u, basis), strict=True):
        assert (left - right).abs().max() < 1e-12
    assert torch.autograd.gradcheck(project_global, (u.clone().requires_grad_(), basis.clone().requires_grad_()))


def test_global_of_an_empty_basis_leaves_the_feature() -> None:
    u = randn(3, 6)
    assert torch.equal(project_global(u, torch.zeros(6, 0, dtype=torch.float64)), u)


@pytest.mark.parametrize(("u", "basis"), [((3, 4), (5, 2)), ((4,), (4, 2)), ((3, 4), (4,))])
def test_global_refuses_other_shapes(u: tuple[int, ...], basis: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"W \(D, R\)"):
        project_global(torch.zeros(u), torch.zeros(basis))


@pytest.mark.parametrize("count", [10, 100, 767])
def test_null_space_of_n_captions_has_768_minus_n_dimensions(count: int) -> None:
    captions = randn(count, 768, seed=count)
    basis = StreamingSVD(768).update(captions).spectrum().basis(tau=1e-6)
    matrix = project_global(torch.eye(768, dtype=torch.float64), basis)
    assert basis.shape == (768, count) == (768, torch.linalg.matrix_rank(captions))
    assert int(torch.linalg.matrix_rank(matrix, rtol=1e-9)) == 768 - count
    assert (matrix - matrix.T).abs().max() < 1e-12
    assert (matrix @ matrix - matrix).abs().max() < 1e-12
    assert project_global(captions, basis).norm() / captions.norm() < 1e-12
    in_fp32 = project_global(captions.float(), basis.float())
    assert in_fp32.norm() / captions.norm() < 1e-4


def test_captions_that_repeat_do_not_raise_the_rank() -> None:
    few = randn(20, 96, seed=1)
    mixed = randn(500, 20, seed=2) @ few
    basis = StreamingSVD(96).update(mixed).spectrum().basis(tau=1e-6)
    assert basis.shape == (96, 20)
    assert project_global(few, basis).norm() / few.norm() < 1e-10


@pytest.mark.parametrize("rule", [{"tau": 1e-6}, {"rank": 32}, {"rank": 40}, {"energy": 1.0}])
@pytest.mark.parametrize("count", [32, 200])
def test_basis_that_leaves_no_null_space_is_refused(count: int, rule: dict[str, float]) -> None:
    spectrum = StreamingSVD(32).update(randn(count, 32)).spectrum()
    with pytest.raises(NullSpaceError, match="span 32 of 32 dimensions, which allows ranks 1 to 31"):
        spectrum.basis(**rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 0, 6, 7])
def test_rank_that_the_captions_do_not_span_is_refused(rank: int) -> None:
    spectrum = StreamingSVD(32).update(randn(5, 32)).spectrum()
    assert spectrum.basis(rank=5).shape == (32, 5)
    with pytest.raises(NullSpaceError, match=f"rank {rank} is not possible: .* span 5 of 32 .* ranks 1 to 5"):
        spectrum.basis(rank=rank)


@pytest.mark.parametrize("captions", [torch.zeros(0, 8), torch.zeros(4, 8)])
@pytest.mark.parametrize("rule", [{"tau": 1e-6}, {"energy": 0.9}, {"rank": 1}])
def test_captions_without_content_have_no_basis(captions: Tensor, rule: dict[str, float]) -> None:
    spectrum = StreamingSVD(8).update(captions).spectrum()
    with pytest.raises(NullSpaceError, match="span 0 of 8"):
        spectrum.basis(**rule)  # type: ignore[arg-type]


# --- choosing the rank


def spectrum_of(*values: float, dim: int = 8) -> SemanticSpectrum:
    return SemanticSpectrum(
        singular_values=torch.tensor(values, dtype=torch.float64), directions=orthonormal(dim, len(values)).T
    )


@pytest.mark.parametrize(
    ("tau", "rank"), [(0.5, 1), (0.49, 2), (0.2, 2), (0.19, 3), (1e-3, 3), (0.9e-3, 4), (1e-6, 4), (1e-9, 5)]
)
def test_tau_keeps_the_values_above_its_share_of_the_largest(tau: float, rank: int) -> None:
    spectrum = spectrum_of(10.0, 5.0, 2.0, 1e-2, 1e-7)
    basis = spectrum.basis(tau=tau)
    assert torch.equal(basis, spectrum.directions[:rank].T)


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.01, 1), (0.64, 1), (0.6401, 2), (0.9, 2), (0.96, 2), (0.97, 3), (1.0, 3)]
)
def test_energy_keeps_the_fewest_values_that_hold_it(energy: float, rank: int) -> None:
    # squares 16, 8, 1 of 25
    spectrum = spectrum_of(4.0, 8.0**0.5, 1.0, 0.0)
    assert spectrum.basis(energy=energy).shape == (8, rank)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99])
def test_energy_equals_a_naive_count(energy: float) -> None:
    captions = randn(300, 24) * torch.linspace(0.1, 3, 24, dtype=torch.float64)
    values = torch.linalg.svdvals(captions)
    rank = next(r for r in range(1, 25) if sum(values[:r] ** 2) >= energy * sum(values**2))
    assert StreamingSVD(24).update(captions).spectrum().basis(energy=energy).shape == (24, rank)


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.5, float("nan")])
def test_energy_out_of_its_range_is_refused(energy: float) -> None:
    with pytest.raises(ValueError, match="energy must be in"):
        spectrum_of(2.0, 1.0).basis(energy=energy)


@pytest.mark.parametrize("rules", [{}, {"rank": 1, "tau": 0.1}, {"tau": 0.1, "energy": 0.5}])
def test_exactly_one_rule_chooses_the_rank(rules: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        spectrum_of(2.0, 1.0).basis(**rules)  # type: ignore[arg-type]


# --- streaming


def assert_same_spectrum(svd: StreamingSVD, captions: Tensor) -> None:
    spectrum = svd.spectrum()
    expected = torch.linalg.svd(captions.double(), full_matrices=False)
    size = min(captions.shape)
    assert svd.count == len(captions)
    assert spectrum.singular_values.dtype == spectrum.directions.dtype == torch.float64
    scale = float(expected.S[0])
    assert (spectrum.singular_values[:size] - expected.S).abs().max() < 1e-12 * scale * max(captions.shape)
    # directions are defined up to their sign
    cosine = (spectrum.directions[:size] * expected.Vh).sum(dim=1).abs()
    assert (cosine - 1).abs().max() < 1e-9
    identity = torch.eye(len(spectrum.directions), dtype=torch.float64)
    assert (spectrum.directions @ spectrum.directions.T - identity).abs().max() < 1e-12


@pytest.mark.parametrize("count", [1, 7, 24, 25, 333])
@pytest.mark.parametrize("block", [1, 5, 24, 100, 1000])
def test_stream_in_blocks_equals_the_svd_in_one_go(count: int, block: int) -> None:
    captions = randn(count, 24, seed=count)
    svd = StreamingSVD(24)
    for part in torch.split(captions, block):
        assert svd.update(part) is svd
    assert_same_spectrum(svd, captions)


def test_blocks_larger_than_the_limit_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsnet.nullspace.BLOCK_ROWS", 10)
    captions = randn(137, 24)
    assert_same_spectrum(StreamingSVD(24).update(captions), captions)


@pytest.mark.parametrize("sizes", [[100, 100], [3, 200], [200, 3], [0, 50], [50, 0], [5, 6, 7], [40, 1, 90, 0, 2]])
def test_merged_shards_equal_one_pass(sizes: list[int]) -> None:
    captions = randn(sum(sizes), 24, seed=1)
    shards = [StreamingSVD(24).update(part) for part in torch.split(captions, sizes)]
    merged = StreamingSVD(24)
    for shard in reversed(shards):
        before = shard.count
        assert merged.merge(shard) is merged and shard.count == before
    assert_same_spectrum(merged, captions)
    tree = shards[0]
    for shard in shards[1:]:
        tree.merge(shard)
    assert_same_spectrum(tree, captions)


def test_order_of_the_captions_does_not_change_the_projection() -> None:
    captions, u = randn(60, 48, seed=1), randn(5, 48, seed=2)
    one = StreamingSVD(48).update(captions).spectrum().basis(rank=7)
    other = StreamingSVD(48).update(captions[torch.randperm(60, generator=torch.Generator().manual_seed(0))])
    assert (project_global(u, one) - project_global(u, other.spectrum().basis(rank=7))).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_captions_are_factorised_in_fp64(dtype: torch.dtype) -> None:
    captions = randn(50, 16, dtype=dtype).requires_grad_()
    assert_same_spectrum(StreamingSVD(16).update(captions), captions.detach())


@pytest.mark.parametrize("shape", [(3, 7), (8,), (2, 3, 8)])
def test_stream_refuses_captions_of_another_width(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(n, 8\)"):
        StreamingSVD(8).update(torch.zeros(shape))


@pytest.mark.parametrize("sizes", [[100, 100], [3, 200], [0, 50], [40, 1, 90, 0, 2]])
def test_shards_restored_from_their_triangles_equal_one_pass(sizes: list[int]) -> None:
    """What travels between processes is the triangle and the count, as plain numbers."""
    captions = randn(sum(sizes), 24, seed=1)
    merged = StreamingSVD(24)
    for part in torch.split(captions, sizes):
        shard = StreamingSVD(24).update(part)
        assert shard.triangle.shape[0] <= 24 and shard.triangle.dtype == torch.float64
        sent = torch.tensor(shard.triangle.tolist(), dtype=torch.float64).reshape(-1, 24)
        restored = StreamingSVD.from_triangle(sent, shard.count)
        assert (restored.dim, restored.count) == (24, len(part))
        merged.merge(restored)
        assert torch.equal(sent, shard.triangle), "what was sent is left alone"
    assert_same_spectrum(merged, captions)


def test_restored_shard_goes_on() -> None:
    captions = randn(90, 24)
    shard = StreamingSVD(24).update(captions[:50])
    restored = StreamingSVD.from_triangle(shard.triangle, shard.count).update(captions[50:])
    assert_same_spectrum(restored, captions)
    assert shard.count == 50
    assert_same_spectrum(shard, captions[:50])


# --- the rule as text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("rank=64", BasisRule(rank=64)), ("rank=1", BasisRule(rank=1)), ("tau=1e-6", BasisRule(tau=1e-6)),
        ("tau=0.000001", BasisRule(tau=1e-6)), ("energy=0.9", BasisRule(energy=0.9)), ("energy=1", BasisRule(energy=1)),
    ],
)  # fmt: skip
def test_rule_is_read_from_its_text(text: str, rule: BasisRule) -> None:
    assert BasisRule.parse(text) == rule


shares = st.floats(0, 1, exclude_min=True, allow_nan=False)


@given(
    st.one_of(
        st.integers(1, 10**9).map(lambda rank: BasisRule(rank=rank)),
        shares.map(lambda tau: BasisRule(tau=tau)),
        shares.map(lambda energy: BasisRule(energy=energy)),
    )
)
@settings(deadline=None)
def test_text_of_a_rule_gives_the_same_rule_again(rule: BasisRule) -> None:
    assert BasisRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "", "rank", "rank=", "64", "rank=1.5", "rank=x", "rank=0", "rank=-3", "tau=0", "tau=-1", "tau=2", "tau=nan",
        "energy=0", "energy=1.01", "energy=nan", "energy=inf", "colour=3", "rank=64,tau=0.1",
    ],
)  # fmt: skip
def test_text_that_is_no_rule_is_refused_with_the_rules(text: str) -> None:
    with pytest.raises(ConfigError, match="rank.*tau.*energy") as caught:
        BasisRule.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rules", [{}, {"rank": 1, "tau": 0.1}, {"tau": 0.1, "energy": 0.5}, {"rank": 1, "tau": 0.1, "energy": 0.5}]
)
def test_rule_is_exactly_one_of_the_three(rules: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        BasisRule(**rules)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "rank"), [("rank=2", 2), ("tau=0.4", 2), ("energy=0.64", 1), ("energy=0.95", 2)])
def test_spectrum_takes_a_rule_as_its_settings(text: str, rank: int) -> None:
    # squares 16, 8, 1 of 25
    spectrum = spectrum_of(4.0, 8.0**0.5, 1.0)
    assert torch.equal(spectrum.basis(**vars(BasisRule.parse(text))), spectrum.directions[:rank].T)
