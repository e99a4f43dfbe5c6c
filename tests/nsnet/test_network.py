"""The network's projections against brute force: one image, one direction at a time, in NumPy and fp64."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nsnet.configuration import DetectorConfig, LossConfig, ProjectionConfig
from nsnet.detector import Detector
from nsnet.errors import ConfigError, NullSpaceError
from nsnet.losses import objective
from nsnet.network import SAME_CAPTION, Features, Network, residual_energy
from tests.support import models

Array = NDArray[np.float64]

BANK = 9
DIM = 32


def rank_k(rank: int = 4, bank: int = BANK, hidden_dim: int = 48) -> DetectorConfig:
    return replace(
        models.FROZEN,
        projection=ProjectionConfig(kind="rank_k", rank=rank, bank=bank),
        mapper=replace(models.FROZEN.mapper, hidden_dim=hidden_dim),
    )


GLOBAL = replace(models.FROZEN, projection=ProjectionConfig(kind="global", rank=5))
NO_MAPPER = replace(models.FROZEN, mapper=replace(models.FROZEN.mapper, hidden_dim=0))


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BUILT: dict[str, Network] = {}


def network(config: DetectorConfig, bank: Tensor | None = None) -> Network:
    """In fp64, without dropout, everything away from its starting values, with a bank and a basis."""
    if repr(config) not in BUILT:
        BUILT[repr(config)] = models.as_if_trained(config).network.double()
    built: Any = copy.deepcopy(BUILT[repr(config)])
    built.caption_bank.copy_(bank if bank is not None else randn(*built.caption_bank.shape, seed=2))
    built.semantic_basis.copy_(torch.linalg.qr(randn(*built.semantic_basis.shape, seed=3)).Q)
    found: Network = built.requires_grad_(True)
    return found


def forward(built: Network, text: Tensor | None, count: int = 5) -> Features:
    found: Features = built(torch.from_numpy(models.mosaics(count)), text)
    return found


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def nearest(own: Array, bank: Array, count: int) -> list[Array]:
    """The captions of the bank with the largest cosines that are not the image's own."""
    others = [one for one in bank if cosine(own, one) <= SAME_CAPTION]
    return sorted(others, key=lambda one: -cosine(own, one))[:count]


def without_span(u: Array, directions: list[Array]) -> Array:
    """u minus its least-squares fit by the directions."""
    spanning = np.stack(directions, axis=1)
    weights = np.linalg.lstsq(spanning, u, rcond=None)[0]
    return np.asarray(u - spanning @ weights)


def mapped_alone(built: Network, direction: Array) -> Array:
    if built.mapper is None:
        return direction
    with torch.no_grad():
        found: Array = built.mapper(torch.from_numpy(direction)[None])[0].numpy()
    return found


def brute_force(built: Network, image: Tensor, text: Tensor, bank: Tensor) -> Array:
    k = built.projection.rank
    rows = []
    for u, own in zip(image.detach().numpy(), text.numpy(), strict=True):
        directions = [own, *nearest(own, bank.numpy(), k - 1)]
        assert len(directions) == k
        rows.append(without_span(u, [mapped_alone(built, one) for one in directions]))
    return np.stack(rows)


# --- rank k


@pytest.mark.parametrize("hidden_dim", [48, 0])
@pytest.mark.parametrize(("rank", "bank"), [(2, 2), (2, BANK), (4, BANK), (9, BANK), (6, 40)])
def test_rank_k_removes_the_caption_and_its_nearest_of_the_bank(rank: int, bank: int, hidden_dim: int) -> None:
    captions, text = randn(bank, DIM, seed=2), randn(5, DIM, seed=4)
    built = network(rank_k(rank, bank, hidden_dim), captions)
    out = forward(built, text)
    expected = brute_force(built, out.image, text, captions)
    np.testing.assert_allclose(out.projected.detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    assert (out.projected - out.image).abs().max() > 0.01
    if hidden_dim:
        assert out.semantic is not None
        own = np.stack([mapped_alone(built, one) for one in text.numpy()])
        np.testing.assert_allclose(out.semantic.detach().numpy(), own, rtol=1e-12, atol=1e-12)
    else:
        assert out.semantic is None


def test_nearest_is_meant_by_cosine_and_not_by_product_or_distance() -> None:
    own = torch.zeros(1, DIM, dtype=torch.float64)
    own[0, 0] = 1.0
    bank = torch.zeros(3, DIM, dtype=torch.float64)
    bank[0, :2] = torch.tensor([3e-3, 4e-3])  # cosine 0.6, though short
    bank[1, 0], bank[1, 2] = 50.0, 100.0  # largest product
    bank[2, 3] = 0.1  # smallest distance but for the first
    built = network(rank_k(2, 3, hidden_dim=0), bank)
    out = forward(built, own.expand(1, -1), 1)
    expected = out.image.detach().clone()
    expected[:, :2] = 0.0
    torch.testing.assert_close(out.projected.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1.0, 0.2, 3.0])
def test_own_caption_in_the_bank_is_not_taken_twice(length: float) -> None:
    text, others = randn(5, DIM, seed=4), randn(BANK, DIM, seed=2)
    without = forward(network(rank_k(4, BANK), others), text)
    bank = torch.cat([others, text * length])
    out = forward(network(rank_k(4, BANK + 5), bank), text)
    # each has its own caption in the bank, and those of the others
    expected = brute_force(network(rank_k(4, BANK + 5), bank), out.image, text, bank)
    np.testing.assert_allclose(out.projected.detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    alone = [
        forward(network(rank_k(4, BANK + 1), torch.cat([others, text[i : i + 1] * length])), text).projected[i]
        for i in range(5)
    ]
    torch.testing.assert_close(torch.stack(alone), without.projected, rtol=1e-12, atol=1e-12)


def test_smallest_bank_has_enough_captions_beside_the_image_s_own() -> None:
    text = randn(1, DIM, seed=4)
    bank = torch.cat([randn(2, DIM, seed=2), text])
    built = network(rank_k(3, 3), bank)
    out = forward(built, text, 1)
    expected = brute_force(built, out.image, text, bank)
    np.testing.assert_allclose(out.projected.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_caption_that_is_nearly_the_image_s_own_is_taken() -> None:
    text = randn(1, DIM, seed=4)
    close = text + 0.01 * randn(1, DIM, seed=5)
    bank = torch.cat([randn(3, DIM, seed=2), close])
    assert 0.9998 < cosine(text[0].numpy(), close[0].numpy()) < SAME_CAPTION
    out = forward(network(rank_k(2, 4, hidden_dim=0), bank), text, 1)
    expected = without_span(out.image[0].detach().numpy(), [text[0].numpy(), close[0].numpy()])
    np.testing.assert_allclose(out.projected[0].detach().numpy(), expected, rtol=1e-7, atol=1e-9)


def test_gradients_of_rank_k_equal_those_of_a_qr_of_the_mapped_captions() -> None:
    """They reach the mapper through every direction, and the image tower's adapters."""
    text, weights = randn(5, DIM, seed=4), randn(5, DIM, seed=6)
    built = network(rank_k())
    bank: Any = built.caption_bank
    names, parameters = zip(
        *((name, p) for name, p in built.named_parameters() if "lora_" in name or name.startswith("mapper.")),
        strict=True,
    )
    ours = torch.autograd.grad((forward(built, text).projected * weights).sum(), parameters)
    assert built.mapper is not None
    image, rows = forward(built, text).image, []
    for i in range(5):
        found = nearest(text[i].numpy(), bank.numpy(), 3)
        directions = torch.stack([text[i], *map(torch.from_numpy, found)])
        q = torch.linalg.qr(built.mapper(directions).T).Q
        rows.append(image[i] - q @ (q.T @ image[i]))
    theirs = torch.autograd.grad((torch.stack(rows) * weights).sum(), parameters)
    for name, left, right in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9, msg=name)
        assert left.abs().max() > 1e-6, name


def test_bank_and_basis_are_stored_and_not_trained() -> None:
    built = network(rank_k())
    assert {"caption_bank", "semantic_basis"} <= built.heads_state().keys()
    assert not any(name in ("caption_bank", "semantic_basis") for name, _ in built.named_parameters())
    assert not any(name.startswith("visual.") for name in built.heads_state())


# --- no mapper


def test_without_a_mapper_the_raw_caption_is_removed_and_there_is_no_alignment() -> None:
    text = randn(5, DIM, seed=4)
    built = network(NO_MAPPER)
    out = forward(built, text)
    assert built.mapper is None and out.semantic is None
    assert not any(name.startswith("mapper.") for name in built.state_dict())
    expected = np.stack([without_span(u, [v]) for u, v in zip(out.image.detach().numpy(), text.numpy(), strict=True)])
    np.testing.assert_allclose(out.projected.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert nn.functional.cosine_similarity(out.projected, text).abs().max() < 1e-12
    losses = objective(
        out.features, out.logit, out.image, out.semantic, torch.arange(5) % 2, LossConfig(alignment_weight=9.0)
    )
    assert float(losses.alignment) == 0.0
    torch.testing.assert_close(losses.total, losses.contrastive + 0.2 * losses.bce)


# --- mapped and raw; a detached mapper

RAW_TOO = replace(models.FROZEN, projection=ProjectionConfig(kind="mapped_and_raw"))
DETACHED = replace(models.FROZEN, mapper=replace(models.FROZEN.mapper, detached=True))


def test_what_is_left_is_orthogonal_to_the_mapped_and_to_the_raw_caption() -> None:
    text = randn(5, DIM, seed=4)
    built = network(RAW_TOO)
    out = forward(built, text)
    assert out.semantic is not None
    for removed in (text, out.semantic):
        assert nn.functional.cosine_similarity(out.projected, removed).abs().max() < 1e-12
        assert nn.functional.cosine_similarity(out.image, removed).abs().max() > 1e-3
    rows = zip(out.image.detach().numpy(), out.semantic.detach().numpy(), text.numpy(), strict=True)
    expected = np.stack([without_span(u, [v, t]) for u, v, t in rows])
    np.testing.assert_allclose(out.projected.detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    # each of the two alone leaves a part of the other
    for config in (models.FROZEN, NO_MAPPER):
        alone = forward(network(config), text).projected
        cosines = [nn.functional.cosine_similarity(alone, removed).abs().max() for removed in (text, out.semantic)]
        assert max(cosines) > 1e-3


def test_mapped_and_raw_caption_without_a_mapper_are_one_direction() -> None:
    text = randn(5, DIM, seed=4)
    raw_too = replace(NO_MAPPER, projection=RAW_TOO.projection)
    torch.testing.assert_close(
        forward(network(raw_too), text).projected, forward(network(NO_MAPPER), text).projected, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("projection", [ProjectionConfig(), RAW_TOO.projection, rank_k(3, BANK).projection])
def test_detached_mapper_gets_no_gradient_of_the_detection_losses(projection: ProjectionConfig) -> None:
    text, y = randn(5, DIM, seed=4), torch.arange(5) % 2
    built = [network(replace(config, projection=projection)) for config in (models.FROZEN, DETACHED)]
    assert torch.equal(forward(built[0], text).logit, forward(built[1], text).logit)  # it says the same

    def gradients(net: Network, **weights: float) -> dict[str, Tensor | None]:
        net.zero_grad(set_to_none=True)
        net.requires_grad_(True)
        out = forward(net, text)
        loss = LossConfig(**weights)
        losses = objective(
            out.features, out.logit, out.image, out.semantic, y, loss, projected=out.projected, text=text
        )  # fmt: skip
        losses.total.backward()  # type: ignore[no-untyped-call]
        return {name: parameter.grad for name, parameter in net.named_parameters()}

    detection: Any = {"contrastive_weight": 1.0, "bce_weight": 0.5, "decorrelation_weight": 0.5}
    attached, detached = (gradients(net, **detection, alignment_weight=0.0) for net in built)
    for name, gradient in detached.items():
        if name.startswith("mapper."):
            assert attached[name] is not None and attached[name].abs().max() > 0, name  # type: ignore[union-attr]
            assert gradient is None or torch.equal(gradient, torch.zeros_like(gradient)), name
        else:
            torch.testing.assert_close(gradient, attached[name], rtol=0, atol=0)
    with_alignment = gradients(built[1], **detection, alignment_weight=0.3)
    alone = gradients(built[0], contrastive_weight=0.0, bce_weight=1e-300, alignment_weight=0.3)
    for name in (name for name in alone if name.startswith("mapper.")):
        torch.testing.assert_close(with_alignment[name], alone[name], rtol=1e-10, atol=1e-14)


def test_detached_mapper_without_an_alignment_is_refused() -> None:
    with pytest.raises(ConfigError, match="alignment_weight is 0: give it a weight > 0, or set mapper.detached=false"):
        replace(DETACHED, loss=LossConfig(alignment_weight=0.0))
    for config in (NO_MAPPER, GLOBAL):  # there is no mapper to train
        replace(config, mapper=replace(config.mapper, detached=True), loss=LossConfig(alignment_weight=0.0))


# --- global, none


def test_global_projection_leaves_no_component_in_the_basis() -> None:
    built = network(GLOBAL)
    basis: Any = built.semantic_basis
    out = forward(built, None)
    assert out.semantic is None and built.mapper is None
    assert (out.projected @ basis).abs().max() < 1e-12 < 0.01 < (out.image @ basis).abs().max()
    expected = np.stack([without_span(u, list(basis.numpy().T)) for u in out.image.detach().numpy()])
    np.testing.assert_allclose(out.projected.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    lost = 1 - residual_energy(out).double() ** 2
    torch.testing.assert_close(lost, ((out.image @ basis) ** 2).sum(1) / (out.image**2).sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["global", "none"])
def test_projection_without_captions_takes_none_and_reads_none(kind: str) -> None:
    config = GLOBAL if kind == "global" else replace(models.FROZEN, projection=ProjectionConfig(kind="none"))
    built = network(config)
    assert torch.equal(forward(built, None).logit, forward(built, randn(5, DIM)).logit)


@pytest.mark.parametrize("kind", ["none", "global"])
def test_linear_head_judges_the_projected_feature_by_one_product(kind: Any) -> None:
    projection = ProjectionConfig(kind=kind, rank=5 if kind == "global" else 0)
    built = network(replace(models.FROZEN, projection=projection, head=replace(models.FROZEN.head, kind="linear")))
    out = forward(built, None)
    weight, bias = (p.detach().numpy() for p in built.head.classifier.parameters())
    np.testing.assert_allclose(
        out.logit.detach().numpy(), out.projected.detach().numpy() @ weight[0] + bias, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(out.features, out.projected / out.projected.norm(dim=1, keepdim=True))


# --- what is not there yet


UNFITTED = {"global": ProjectionConfig(kind="global"), "rank_k": ProjectionConfig(kind="rank_k", rank=3)}


@pytest.mark.parametrize("kind", UNFITTED)
def test_projection_that_was_not_computed_yet_is_refused(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=f"the {kind} projection has no basis or bank yet: compute it first"
    ) as caught:
        Detector.build(replace(models.FROZEN, projection=UNFITTED[kind]))
    models.one_line(caught.value)


@pytest.mark.parametrize("kind", ["global", "rank_k"])
@pytest.mark.parametrize("rank", [DIM, DIM + 1])
def test_as_many_directions_as_dimensions_are_refused(kind: Any, rank: int) -> None:
    bank = 99 if kind == "rank_k" else 0
    with pytest.raises(
        NullSpaceError, match=f"{rank} directions leaves nothing .* with 32 dimensions: choose at most 31"
    ) as caught:
        Detector.build(replace(models.FROZEN, projection=ProjectionConfig(kind=kind, rank=rank, bank=bank)))
    models.one_line(caught.value)


@pytest.mark.parametrize(
    ("projection", "needs_captions", "fitted"),
    [
        (ProjectionConfig(), True, True),
        (ProjectionConfig(kind="mapped_and_raw"), True, True),
        (ProjectionConfig(kind="none"), False, True),
        (ProjectionConfig(kind="global"), False, False),
        (ProjectionConfig(kind="global", rank=1), False, True),
        (ProjectionConfig(kind="rank_k", rank=2), True, False),
        (ProjectionConfig(kind="rank_k", rank=2, bank=2), True, True),
    ],
)
def test_projection_knows_what_it_needs(projection: ProjectionConfig, needs_captions: bool, fitted: bool) -> None:
    assert (projection.needs_captions, projection.fitted) == (needs_captions, fitted)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "per_sample", "bank": 3}, {"kind": "global", "rank": 3, "bank": 3}, {"kind": "none", "bank": 1},
        {"kind": "rank_k"}, {"kind": "rank_k", "rank": 1, "bank": 5}, {"kind": "rank_k", "rank": 4, "bank": 3},
        {"kind": "rank_k", "rank": 3, "bank": -1},
    ],
)  # fmt: skip
def test_bank_that_does_not_fit_the_projection_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="bank"):
        ProjectionConfig(**settings)


def test_batch_norms_of_a_tower_keep_their_statistics_in_training() -> None:
    visual: Any = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(DIM)
    )
    built = network(NO_MAPPER)
    built.visual = visual.double()
    mosaics, text = torch.from_numpy(models.mosaics(4)), randn(4, DIM)
    built.eval()(mosaics, text)  # the lazy layer finds its size
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    for _ in range(2):
        built.train()(mosaics, text)
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())
    assert [module.training for module in visual] == [True, False, True, True, True]  # dropout drops
