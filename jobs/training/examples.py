"""Training examples: who is trained on, validated and tested on, and where their captions' features lie.

Dimensions: n examples, D embedding.

A split is a Parquet manifest (`SPLIT`): a source like any other, and everything that a second training needs to use the
same images for the same purpose.
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
from jobs.storage import errors, parquet, writing
from jobs.storage.errors import Fault
from jobs.storage.uris import Uri
from nsnet.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The images of a split, in the order of their ids, with the features of their captions."""

    table: pa.Table
    """(n,) rows of `SPLIT`."""
    text_features: npt.NDArray[np.float32] | None = None
    """(n, D), NaN where there is none; None where the detector needs no captions."""

    @cached_property
    def image_ids(self) -> list[str]:
        """(n,) ascending: the order does not depend on how files were written."""
        ids: list[str] = self.table.column("image_id").to_pylist()
        return ids

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """(n,) real = 0, fake = 1."""
        return np.asarray(self.table.column("label").to_numpy(), dtype=np.int64)

    @cached_property
    def generators(self) -> list[str | None]:
        """(n,) of each image."""
        names: list[str | None] = self.table.column("generator").to_pylist()
        return names

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Numbers of the rows of a split."""
        return np.flatnonzero(pc.equal(self.table.column("split"), split).fill_null(False).to_numpy())

    def names(self, rows: npt.NDArray[np.int64]) -> list[dict[str, str]]:
        """What people know images by."""
        found: list[dict[str, str]] = self.table.select(["image_id", "uri"]).take(rows).to_pylist()
        return found


def read_split(uri: str) -> pa.Table:
    """A stored split, ordered by id. Raises `SourceError` where the file is none."""
    try:
        table = pa.Table.from_batches(parquet.read(uri, SPLIT, optional=("column", "problem")), SPLIT)
    except FileNotFoundError as error:
        raise SourceError(f"there is no split {uri}") from error
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        if isinstance(error, OSError) and errors.kind(error) is not Fault.PERMANENT:
            raise
        raise SourceError(
            f"{uri} is no split of a training (split.parquet), or damaged: {' '.join(str(error).split())[:200]}"
        ) from error
    return table.sort_by("image_id")


def write_split(table: pa.Table, uri: str) -> None:
    """Store a split, whole or not at all: a training that finds one goes on with it."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "split.parquet"
        parquet.write(table.combine_chunks().to_batches(), SPLIT, str(written))
        writing.upload_file(written, uri)


def load_text_features(captions: Uri, features_id: str, table: pa.Table) -> npt.NDArray[np.float32]:
    """Features (n, D) of the captions of a split's images, as a file of this machine that is mapped; NaN: none."""
    columns = pa.schema([schema.CAPTIONS.field("image_id"), schema.TEXT_FEATURES])
    ids = table.column("image_id").combine_chunks()
    features: npt.NDArray[np.float32] | None = None
    for batch in untransformed(captions, columns, products.CAPTIONS, features_id):
        batch = batch.filter(pc.is_valid(batch.column("text_features")))
        at = pc.index_in(batch.column("image_id"), value_set=ids)
        batch, at = batch.filter(pc.is_valid(at)), at.drop_null().to_numpy()
        if len(at) == 0:
            continue
        values = batch.column("text_features").flatten().to_numpy().reshape(len(at), -1)
        if features is None:
            features = _mapped(len(ids), values.shape[1])
        features[at] = values
    return features if features is not None else np.full((len(ids), 0), np.nan, dtype=np.float32)


def _mapped(rows: int, dim: int) -> npt.NDArray[np.float32]:
    """Room for a large array that need not stay in memory, full of NaN; its file goes with the process."""
    with tempfile.NamedTemporaryFile(prefix="nsnet-features-") as file:
        room = np.memmap(Path(file.name), dtype=np.float32, mode="w+", shape=(rows, dim))
    for start in range(0, rows, parquet.BATCH_ROWS):
        room[start : start + parquet.BATCH_ROWS] = np.nan
    return room


def without_captions(table: pa.Table, features: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
    """The images of a split that have no caption features."""
    missing = np.isnan(features[:, :1]).any(axis=1) if features.shape[1] else np.ones(table.num_rows, dtype=bool)
    rows: list[dict[str, Any]] = table.select(["image_id", "uri"]).take(np.flatnonzero(missing)).to_pylist()
    return rows
