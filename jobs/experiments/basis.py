"""Compute the semantic basis or the caption bank from all captions of a training; Ray streams the captions of a basis.

Dimensions: n captions, D embedding, R rank, N captions of a bank.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from ray.data import TaskPoolStrategy
from safetensors.numpy import load_file, save_file

from jobs.cluster import resources
from jobs.console.output import say
from jobs.dataset import schema
from jobs.experiments.experiment import Experiment
from jobs.experiments.paths import FITTED_FILE
from jobs.pipeline.datasource import ParquetFiles
from jobs.runs import catalog, products
from jobs.storage import listing, reading, writing
from jobs.storage.uris import Uri
from jobs.training.examples import Examples
from nsnet.errors import NullSpaceError, SourceError
from nsnet.nullspace import SemanticSpectrum, StreamingSVD
from nsnet.recipes import BANK

TRIANGLE: Final = pa.schema([pa.field("count", pa.int64()), pa.field("triangle", pa.binary())])


def caption_files(captions: Uri, features_id: str) -> list[str]:
    """URIs of the files with one maker's published captions and features."""
    records = catalog.runs(captions, products.CAPTIONS)
    return catalog.paths(captions, (record for record in records if record.get("features_id") == features_id))


def spectrum(files: list[str], ids: pa.Array, *, task_cpus: float) -> SemanticSpectrum:
    """Singular values and directions of the caption features in these Parquet files.

    `ids`: the images whose captions count. Each task reduces its file to one D × D triangle, and the driver merges the
    triangles in the order of the files, so memory does not depend on the number of captions.
    """
    if not files:
        raise SourceError("there are no published captions to compute a semantic basis from")
    ids_ref = [ray.put(ids.sort())]
    total: StreamingSVD | None = None
    for count, triangle in _triangles(files, ids_ref, task_cpus):
        part = StreamingSVD.from_triangle(triangle, count)
        total = part if total is None else total.merge(part)
    if total is None:
        raise SourceError("none of the training images has a caption: there is no semantic basis")
    return total.spectrum()


def _triangles(
    files: list[str], ids_ref: list[Any], task_cpus: float
) -> Iterator[tuple[int, torch.Tensor]]:  # fmt: skip
    columns = pa.schema([schema.CAPTIONS.field("image_id"), schema.TEXT_FEATURES])
    dataset = ray.data.read_datasource(ParquetFiles(files, columns), num_cpus=task_cpus, override_num_blocks=len(files))

    def reduce(table: pa.Table) -> pa.Table:
        return _reduced(table, ray.get(ids_ref[0]))

    triangles = dataset.map_batches(
        reduce, batch_format="pyarrow", batch_size=None, zero_copy_batch=True, compute=TaskPoolStrategy(),
        num_cpus=task_cpus,
    )  # fmt: skip
    triangles.context.execution_options.preserve_order = True
    for batch in triangles.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in pa.table(batch).to_pylist():
            count, data = row["count"], row["triangle"]
            if count:
                dim = int.from_bytes(data[:8], "little")
                yield count, torch.from_numpy(np.frombuffer(data[8:], dtype=np.float64).reshape(-1, dim).copy())


def _reduced(table: pa.Table, ids: pa.Array) -> pa.Table:
    """The triangle of a block's features, as one row."""
    column = schema.TEXT_FEATURES.name
    positions = pc.index_in(table.column("image_id"), value_set=ids)
    chosen = table.filter(pc.and_(pc.is_valid(positions), pc.is_valid(table.column(column))))
    if chosen.num_rows == 0:
        return pa.table({"count": [0], "triangle": [b""]}, schema=TRIANGLE)
    features = _matrix(chosen.column(column))
    svd = StreamingSVD(features.shape[1]).update(torch.from_numpy(features))
    data = features.shape[1].to_bytes(8, "little") + svd.triangle.numpy().tobytes()
    return pa.table({"count": [len(features)], "triangle": [data]}, schema=TRIANGLE)


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """A column of lists of equal length as a matrix."""
    flat = column.combine_chunks().flatten().to_numpy()
    return np.asarray(flat, dtype=np.float32).reshape(len(column), -1).copy()


def bank(
    image_ids: Iterable[str], text_features: npt.NDArray[np.float32], *, size: int, seed: int
) -> npt.NDArray[np.float32]:
    """Features (≤ size, D) of a sample of distinct captions: a pure function of the set of images and the seed."""
    shuffled = sorted(range(len(text_features)), key=_keys(list(image_ids), seed).__getitem__)
    chosen: dict[bytes, int] = {}
    for row in shuffled:
        if len(chosen) == size:
            break
        if np.isfinite(text_features[row]).all():
            chosen.setdefault(text_features[row].tobytes(), row)
    return text_features[list(chosen.values())]


def _keys(image_ids: list[str], seed: int) -> list[bytes]:
    return [hashlib.sha256(f"{seed}/{image_id}".encode()).digest() for image_id in image_ids]


def fit_projection(experiment: Experiment, examples: "Examples") -> Experiment:
    """The experiment with its projection fitted to all training captions; stores the basis or bank if it is new."""
    request, recipe = experiment.request, experiment.recipe
    projection = recipe.detector.projection
    if projection.fitted:
        return experiment
    if examples.text_features is not None and projection.rank >= (dim := examples.text_features.shape[1]):
        raise NullSpaceError(
            f"{projection.rank} directions leave nothing of an image feature with {dim} dimensions: choose a rank of 1 "
            f"to {dim - 1}"
        )

    uri = experiment.file(FITTED_FILE)
    if not listing.exists(uri):
        assert examples.text_features is not None
        rows = examples.rows("train")
        ids = examples.table.column("image_id").take(rows)
        if projection.kind == "global":
            resources.connect(request.address)
            files = caption_files(experiment.facts.place, experiment.facts.maker)
            decomposition = spectrum(files, ids.combine_chunks(), task_cpus=resources.cluster_shares().task_cpus)
            assert recipe.basis is not None
            tensors = {"semantic_basis": decomposition.basis(**vars(recipe.basis)).float().numpy()}
            say(f"semantic basis: rank {tensors['semantic_basis'].shape[1]} ({recipe.basis})")
        else:
            features = examples.text_features[rows]
            tensors = {"caption_bank": bank(ids.to_pylist(), features, size=BANK, seed=request.seed)}
            say(f"bank: {len(tensors['caption_bank'])} captions")
        with tempfile.TemporaryDirectory() as scratch:
            save_file(tensors, Path(scratch) / FITTED_FILE)
            writing.upload_file(Path(scratch) / FITTED_FILE, uri)
    with reading.local_copy(uri) as path:
        tensors = load_file(path)
    if projection.kind == "global":
        projection = replace(projection, rank=tensors["semantic_basis"].shape[1])
    else:
        projection = replace(projection, bank=len(tensors["caption_bank"]))
    fitted = replace(recipe, detector=replace(recipe.detector, projection=projection))
    return experiment.with_recipe(fitted)
