"""Training examples: prepared once by Ray Data, then read at random by the training workers.

Dimensions: n examples, K mosaic slots, N patch side, D embedding, G images of a step over all workers, B of one worker.

What does not change between epochs (decoding, patch ranking, captions, text features) is done once. An epoch then only
shuffles: the order of the pictures and the slots of each mosaic are pure functions of (seed, epoch, picture).
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from jobs import storage
from nsnet.patches import SCORING_SEED, PatchConfig, assemble_mosaic
from nsnet.training import Batch


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples of one node: light columns in memory, patches in a file that is mapped."""

    image_ids: list[str]
    """Ascending: the order does not depend on how the files were written."""
    labels: npt.NDArray[np.int64]
    """(n,) real = 0, fake = 1."""
    validation: npt.NDArray[np.bool_]
    """(n,) True: validation; False: training."""
    text_features: npt.NDArray[np.float32]
    """(n, D)."""
    patches: npt.NDArray[np.uint8]
    """(n, K, N, N, 3) memory-mapped, in the order of the files."""
    place: npt.NDArray[np.int64]
    """(n,) where in `patches` an example lies."""

    def batch(self, rows: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_], shuffle: str | None) -> Batch:
        """Rows as tensors on the CPU. `shuffle`: what the slot order depends on beside the picture; None: scoring's."""
        mosaics = np.stack([assemble_mosaic(self.patches[self.place[i]], self._slot_seed(i, shuffle)) for i in rows])
        return Batch(
            mosaics=torch.from_numpy(mosaics),
            text_features=torch.from_numpy(self.text_features[rows]),
            labels=torch.from_numpy(self.labels[rows]),
            valid=torch.from_numpy(valid),
        )

    def _slot_seed(self, row: int, shuffle: str | None) -> int:
        if shuffle is None:
            return SCORING_SEED
        digest = hashlib.sha256(f"{shuffle}/{self.image_ids[row]}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


def is_validation(content_hash: str, seed: int, share: float) -> bool:
    """Whether a picture of a pool without a split is kept for validation: by content, so copies stay together."""
    digest = hashlib.sha256(f"{seed}/{content_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


def read_labels(folder: str) -> list[dict[str, Any]]:
    """The light columns of all examples below a URI, failed ones included."""
    columns = ["image_id", "uri", "content_hash", "label", "generator", "split", "status", "error_stage"]
    columns += ["error_class", "error_message"]
    rows: list[dict[str, Any]] = []
    for entry in _files(folder):
        system, path = storage.arrow_filesystem(entry)
        rows += pq.read_table(path, columns=columns, filesystem=system).to_pylist()
    return rows


def load(folder: str, validation_ids: set[str], config: PatchConfig, cache: Path, *, write: bool) -> Examples:
    """Load the examples below a URI, but for failed ones and those kept for testing (split `test`).

    `write`: copy the patches to the file `cache`; else another process has.
    """
    shape = (config.slots, config.patch_px, config.patch_px, 3)
    ids: list[str] = []
    labels: list[int] = []
    features: list[npt.NDArray[np.float32]] = []
    with open(cache if write else os.devnull, "wb") as file:
        for entry in _files(folder):
            system, path = storage.arrow_filesystem(entry)
            columns = ["image_id", "label", "split", "status", "text_features", *(["patches"] if write else [])]
            for batch in pq.ParquetFile(path, filesystem=system).iter_batches(batch_size=256, columns=columns):
                for row in range(batch.num_rows):
                    if batch.column("status")[row].as_py() != "scored" or batch.column("split")[row].as_py() == "test":
                        continue
                    ids.append(batch.column("image_id")[row].as_py())
                    labels.append(batch.column("label")[row].as_py())
                    features.append(np.asarray(batch.column("text_features")[row].as_py(), dtype=np.float32))
                    if write:
                        file.write(batch.column("patches")[row].as_buffer())
    order = np.argsort(np.array(ids), kind="stable")
    return Examples(
        image_ids=[ids[i] for i in order],
        labels=np.array(labels, dtype=np.int64)[order],
        validation=np.array([ids[i] in validation_ids for i in order]),
        text_features=np.stack(features)[order],
        patches=np.memmap(cache, dtype=np.uint8, mode="r", shape=(len(ids), *shape)),
        place=order,
    )


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Optimisation steps of an epoch: every example is used once, the last step may be smaller."""
    return -(-count // batch_size)


def epoch_rows(
    rows: npt.NDArray[np.int64], *, batch_size: int, seed: int, epoch: int, rank: int, world_size: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """One worker's (rows (B,), valid (B,) bool) of every step of an epoch.

    The global order depends on seed and epoch, not on the number of workers. Each step's G rows are cut into equal
    parts; a part that comes out short is padded with rows that are marked as not valid.
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    for start in range(0, len(order), batch_size):
        yield part_of(order[start : start + batch_size], rank, world_size)


def part_of(
    rows: npt.NDArray[np.int64], rank: int, world_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """A worker's equal part of some rows, padded with the first row where it comes out short."""
    size = -(-len(rows) // world_size)
    part = rows[rank * size : (rank + 1) * size]
    padding = size - len(part)
    valid = np.arange(size) < len(part)
    return np.concatenate([part, np.repeat(rows[:1], padding)]), valid


def _files(folder: str) -> list[str]:
    return sorted(entry.uri for entry in storage.list_files(folder) if entry.uri.endswith(".parquet"))
