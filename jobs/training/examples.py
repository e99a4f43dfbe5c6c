"""Examples for training, validation and test, with their caption features.

Dimensions: n examples, D embedding.

A split is a Parquet manifest (`SPLIT`): it can serve as a source, and as the split of another training.
"""

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset import schema
from jobs.dataset.schema import SPLIT
from jobs.runs import products
from jobs.runs.catalog import untransformed
from jobs.storage import errors, parquet
from jobs.storage.errors import Fault
from jobs.storage.uris import Uri
from nsnet.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The images of a split, ordered by id, with their caption features."""

    table: pa.Table
    """(n,) rows of `SPLIT`."""
    text_features: npt.NDArray[np.float32] | None = None
    """(n, D), NaN for an image without caption; None: the detector needs no captions."""

    @cached_property
    def image_ids(self) -> list[str]:
        """(n,) ascending, so that the order does not depend on the files."""
        ids: list[str] = self.table.column("image_id").to_pylist()
        return ids

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """(n,) real = 0, fake = 1."""
        return np.asarray(self.table.column("label").to_numpy(), dtype=np.int64)

    @cached_property
    def generators(self) -> list[str | None]:
        """(n,) generator of each image."""
        names: list[str | None] = self.table.column("generator").to_pylist()
        return names

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Row numbers of a split."""
        return np.flatnonzero(pc.equal(self.table.column("split"), split).fill_null(False).to_numpy())

    def names(self, rows: npt.NDArray[np.int64]) -> list[dict[str, str]]:
        """`image_id` and `uri` of these rows."""
        names: list[dict[str, str]] = self.table.select(["image_id", "uri"]).take(rows).to_pylist()
        return names


def read_split(uri: str) -> pa.Table:
    """A stored split, ordered by id. Raises `SourceError` if the file is not a split."""
    try:
        table = pa.Table.from_batches(parquet.read(uri, SPLIT, optional=("column", "problem")), SPLIT)
    except FileNotFoundError as error:
        raise SourceError(f"there is no split {uri}") from error
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        if isinstance(error, OSError) and errors.kind(error) is not Fault.PERMANENT:
            raise
        raise SourceError(
            f"{uri} is not a training's split (split.parquet), or is damaged: {' '.join(str(error).split())[:200]}"
        ) from error
    return table.sort_by("image_id")


def write_split(table: pa.Table, uri: str) -> None:
    """Store a split atomically, since a training continues with any split that it finds."""
    parquet.write_whole(table.combine_chunks().to_batches(), SPLIT, uri)


def load_text_features(captions: Uri, features_id: str, table: pa.Table) -> npt.NDArray[np.float32]:
    """Caption features (n, D) of a split's images, memory-mapped from a local file; NaN: no caption."""
    columns = pa.schema([schema.CAPTIONS.field("image_id"), schema.TEXT_FEATURES])
    ids = table.column("image_id").combine_chunks()
    features: npt.NDArray[np.float32] | None = None
    for batch in untransformed(captions, columns, products.CAPTIONS, features_id):
        batch = batch.filter(pc.is_valid(batch.column("text_features")))
        positions = pc.index_in(batch.column("image_id"), value_set=ids)
        batch, positions = batch.filter(pc.is_valid(positions)), positions.drop_null().to_numpy()
        if len(positions) == 0:
            continue
        values = batch.column("text_features").flatten().to_numpy().reshape(len(positions), -1)
        if features is None:
            features = _mapped(len(ids), values.shape[1])
        features[positions] = values
    return features if features is not None else np.full((len(ids), 0), np.nan, dtype=np.float32)


def _mapped(rows: int, dim: int) -> npt.NDArray[np.float32]:
    """A memory-mapped array of NaN, so that it need not fit into memory; its file is deleted with the process."""
    with tempfile.NamedTemporaryFile(prefix="nsnet-features-") as file:
        array = np.memmap(Path(file.name), dtype=np.float32, mode="w+", shape=(rows, dim))
    for start in range(0, rows, parquet.BATCH_ROWS):
        array[start : start + parquet.BATCH_ROWS] = np.nan
    return array


def without_captions(table: pa.Table, features: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
    """The images of a split that have no caption features."""
    missing = np.isnan(features[:, :1]).any(axis=1) if features.shape[1] else np.ones(table.num_rows, dtype=bool)
    rows: list[dict[str, Any]] = table.select(["image_id", "uri"]).take(np.flatnonzero(missing)).to_pylist()
    return rows
