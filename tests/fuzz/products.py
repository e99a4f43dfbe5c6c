"""Parquet files that jobs wrote, and read back, in the driver, from a bucket that others may write to."""

import random
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Final

import pyarrow as pa

from jobs.dataset import schema
from jobs.storage import parquet
from nsnet.errors import NsnetError
from tests.fuzz.tables import damaged, pickled
from tests.support.tables import manifest_row, manifest_table, parquet_bytes, verdict_row

READ_BACK: Final = (schema.VERDICTS, schema.MANIFEST, schema.TODO, schema.CAPTIONS, schema.FACTS)
MAX_BATCHES: Final = 100


@cache
def corpus() -> list[bytes]:
    """One file of each product, and one with a column that would be unpickled."""
    rows = [verdict_row(f"{i}.png", 0.5, caption="a cat") for i in range(200)]
    todo = [dict.fromkeys(schema.TODO.names) | manifest_row("a.png")]
    captions = [dict.fromkeys(schema.CAPTIONS.names) | verdict_row("a", 0.5) | {"text_features": [0.5] * 32}] * 9
    verdicts = pa.Table.from_pylist(rows, schema=schema.stored(schema.VERDICTS))
    poisoned = verdicts.set_column(verdicts.schema.get_field_index("caption"), "caption", pickled(200))
    found = [verdicts, poisoned, manifest_table(*[manifest_row(f"{i}.png") for i in range(30)])]
    found += [pa.Table.from_pylist(todo, schema=schema.TODO), pa.Table.from_pylist(captions, schema=schema.CAPTIONS)]
    return [parquet_bytes(dict(zip(t.column_names, t.columns, strict=True)), compression="zstd") for t in found]


def write(seed: int, folder: Path) -> None:
    """The file of a case."""
    rng = random.Random(f"products {seed}")
    (folder / "part.parquet").write_bytes(damaged(rng, rng.choice(corpus()), rng.choice(corpus())))


def run(folder: Path) -> str:
    """Read it as each product: rows of the product's types, or an error that pyarrow or the reader names."""
    outcome = "no rows"
    for columns in READ_BACK:
        try:
            for batch in islice(
                parquet.read(str(folder / "part.parquet"), columns, optional=columns.names), MAX_BATCHES
            ):
                assert batch.schema == columns
                outcome = "rows" if batch.to_pylist() else outcome
        except (pa.ArrowException, NsnetError) as error:  # too much memory may be asked for, and not used
            outcome = type(error).__name__
    return outcome


def close() -> None:
    """Nothing is left."""
