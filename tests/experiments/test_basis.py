"""The semantic basis over published captions, as a stream, against one decomposition of them all."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from jobs.dataset import schema
from jobs.experiments import basis
from nsnet.errors import SourceError

DIM = 24
COLUMNS = pa.schema([schema.CAPTIONS.field("image_id"), schema.TEXT_FEATURES])


def features_of(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Captions that live mostly in a few directions, far from the origin, as CLIP's do."""
    rng = np.random.default_rng(seed)
    inside = rng.normal(size=(count, 6)) @ rng.normal(size=(6, DIM))
    return (inside + 0.05 * rng.normal(size=(count, DIM)) + 2.0 * rng.normal(size=DIM)).astype(np.float32)


def write(folder: Path, features: NDArray[np.float32], files: int) -> tuple[list[str], pa.Array]:
    folder.mkdir()
    ids = [f"{i:032x}" for i in range(len(features))]
    found = []
    for number, rows in enumerate(np.array_split(np.arange(len(features)), files)):
        path = folder / f"part-{number}.parquet"
        values = [features[i].tolist() if i % 10 else None for i in rows]  # every tenth failed
        columns = {"image_id": [ids[i] for i in rows], schema.TEXT_FEATURES.name: values}
        pq.write_table(pa.table(columns, schema=COLUMNS), path)
        found.append(str(path))
    return found, pa.array(ids)


def principal_angle(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest angle between two subspaces given by orthonormal columns, from the part of one outside of the other."""
    outside = second - first @ (first.T @ second)
    return math.asin(min(1.0, float(torch.linalg.matrix_norm(outside, 2))))


def test_streamed_basis_is_that_of_one_decomposition(cluster: None, tmp_path: Path) -> None:
    features = features_of(1000)
    files, ids = write(tmp_path / "captions", features, 7)
    found = basis.spectrum(files, ids.slice(0, 700), task_cpus=0.5)  # the others were not trained on
    used = features[[i for i in range(700) if i % 10]].astype(np.float64)
    _, values, directions = np.linalg.svd(used, full_matrices=False)
    np.testing.assert_allclose(found.singular_values.numpy(), values, rtol=1e-10)
    for rank in (1, 3, 7, 12):
        expected = torch.from_numpy(directions[:rank].T.copy())
        assert principal_angle(expected, found.basis(rank=rank)) < 1e-6
    with pytest.raises(SourceError, match="none of the training images has a caption"):
        basis.spectrum(files, pa.array(["nobody"]), task_cpus=0.5)


def test_without_files_there_is_no_basis() -> None:
    with pytest.raises(SourceError, match="no published captions"):
        basis.spectrum([], pa.array(["a"]), task_cpus=1.0)


def test_principal_angle_sees_a_turned_subspace() -> None:
    """The measure itself: equal subspaces have none, whatever their bases; a small turn has its size."""
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    plane = turn[:, :2]
    rotated = plane @ torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    assert principal_angle(plane, rotated) < 1e-12
    tilted = torch.stack([plane[:, 0], plane[:, 1] * math.cos(1e-5) + turn[:, 2] * math.sin(1e-5)], dim=1)
    assert principal_angle(plane, tilted) == pytest.approx(1e-5, rel=1e-6)


# --- the bank --------------------------------------------------------------------------------------------------------


def test_bank_holds_distinct_captions_that_depend_on_the_set_and_the_seed_alone() -> None:
    features = np.repeat(features_of(30), 3, axis=0)  # each caption three times
    features[5] = np.nan
    ids = [f"{i:03d}" for i in range(90)]
    found = basis.bank(ids, features, size=20, seed=1)
    assert found.shape == (20, DIM) and len({row.tobytes() for row in found}) == 20
    assert np.isfinite(found).all()
    order = np.random.default_rng(0).permutation(90)
    np.testing.assert_array_equal(basis.bank([ids[i] for i in order], features[order], size=20, seed=1), found)
    assert not np.array_equal(basis.bank(ids, features, size=20, seed=2), found)
    assert len(basis.bank(ids, features, size=1000, seed=1)) == 30
