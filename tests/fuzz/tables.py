"""Parquet files of strangers: listing and fetching, among other files and as the source itself."""

import pickle
import random
import struct
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data  # noqa: F401 - registers the extension type that unpickles
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

from jobs.dataset import containers, fetching
from jobs.dataset.source import Source
from nsnet.errors import ImageError, NsnetError
from tests.fuzz import Payload
from tests.fuzz.mutations import EXTREMES, extreme_integer, flip_bits, mutated, run_of_one_byte
from tests.fuzz.thrift import varint, varints
from tests.support.tables import image_file, parquet_bytes

MAX_ROWS: Final = 100_000
"""Rows that are taken of a list, which may have any number."""
MAX_BYTES: Final = 2**22
NAMES: Final = ("uri", "bytes", "image", "label", "generator", "split", "etag", "content_hash", "size_bytes")


def pickled(rows: int) -> pa.Array:
    return pa.ExtensionArray.from_storage(
        ArrowPythonObjectType(), pa.array([pickle.dumps(Payload())] * rows, pa.large_binary())
    )


@cache
def corpus() -> list[bytes]:
    """Whole files of many kinds."""
    image = image_file(1, width=24, height=24)
    uris = [f"{i}.png" for i in range(30)]
    fields = [pa.field("bytes", pa.binary()), pa.field("path", pa.string())]
    stored = pa.array([{"bytes": image, "path": "a.png"}] * 3 + [None], pa.struct(fields))
    names = '{"info": {"features": {"label": {"names": ["fake", "real"], "_type": "ClassLabel"}}}}'
    when = pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * 3, pa.timestamp("ns", "UTC"))
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"uri": uris, "label": [0, 1] * 15, "generator": ["x"] * 30, "split": ["train"] * 30, "etag": [""] * 30}, {}),
        ({"uri": pa.array(uris).dictionary_encode(), "size_bytes": range(30)}, {"compression": "zstd"}),
        ({"bytes": [image] * 5, "label": [0, 1, 0, 1, None], "uri": ["a"] * 5}, {"row_group_size": 2}),
        ({"image": stored, "label": [0, 1, 0, 1]}, {"metadata": {"huggingface": names}}),
        ({"image": pa.array([[image]] * 2), "bytes": [image, image]}, {"data_page_version": "2.0"}),
        ({"uri": ["a"] * 50_000, "label": ["real"] * 50_000}, {"compression": "gzip"}),
        ({"bytes": pa.array([bytes(2**20)] * 40), "when": list(range(40))}, {"use_dictionary": False}),
        ({"bytes": pa.array([bytes(2**18)] * 64)}, {"compression": "zstd"}),
        ({"uri": uris, "odd": pickled(30)}, {}), ({"uri": pickled(3), "bytes": [image] * 3}, {}),
        ({"bytes": pickled(2)}, {}), ({"image": pa.StructArray.from_arrays([pickled(2)], ["bytes"])}, {}),
        ({"uri": ["a", "b", "c"], "when": when, "label": pa.array([1, 0, 1], pa.decimal128(9, 2))}, {}),
        ({"uri": uris, "m": pa.array([[("k", 1)]] * 30, pa.map_(pa.string(), pa.int8()))}, {"version": "1.0"}),
        ({"bytes": pa.array([b"abcd"] * 9, pa.binary(4)), "label": pa.array([0.5] * 9, pa.float16())}, {}),
        ({"uri": uris}, {"column_encoding": "DELTA_BYTE_ARRAY", "use_dictionary": False}),
        ({"uri": uris, "size_bytes": range(30)}, {"write_page_index": True, "write_page_checksum": True}),
    ]  # fmt: skip
    return [parquet_bytes(columns, **options) for columns, options in tables]


def write(seed: int, folder: Path) -> None:
    """A folder with a good image and the Parquet file of a case."""
    rng = random.Random(f"tables {seed}")
    (folder / "good.png").write_bytes(image_file(2))
    (folder / "x.parquet").write_bytes(damaged(rng, rng.choice(corpus()), rng.choice(corpus())))


def damaged(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A Parquet file with other numbers or bytes in its metadata, in the headers of its pages, or anywhere."""
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    pages, footer = data[:at], data[at:-8]
    kind = rng.randrange(10)
    if kind < 3:
        footer = _other_numbers(rng, footer, [0])
    elif kind < 5:
        pages = _other_numbers(rng, pages, _pages(data))
    elif kind < 7:
        pages = b"PAR1" + rng.choice((flip_bits, extreme_integer, run_of_one_byte))(rng, pages[4:], other)
    elif kind < 8:
        footer = rng.choice((flip_bits, run_of_one_byte))(rng, footer, other)
    elif kind < 9:
        pages = other[: len(other) - 8 - int.from_bytes(other[-8:-4], "little")]
    data = pages + footer + struct.pack("<I", len(footer)) + b"PAR1"
    return mutated(rng, data, other) if kind == 9 else data


def _other_numbers(rng: random.Random, data: bytes, objects: list[int]) -> bytes:
    """One to four numbers of the objects at these positions are others."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        try:
            at, end = rng.choice(varints(data, rng.choice(objects)))
        except IndexError:  # a length is another by now
            return data
        value = rng.choice((*EXTREMES, -1, rng.randrange(40), rng.randrange(9999), len(data)))
        data = data[:at] + varint(value) + data[end:]
    return data


def _pages(data: bytes) -> list[int]:
    """Positions of the first pages of all columns."""
    with pa.BufferReader(data) as source:
        found = pq.read_metadata(source)
    columns = [found.row_group(g).column(c) for g in range(found.num_row_groups) for c in range(found.num_columns)]
    return [at for one in columns for at in (one.data_page_offset, one.dictionary_page_offset) if at]


def run(folder: Path) -> str:
    """As a source among others, and as the source itself."""
    return f"{_among_others(folder)}, {_as_list(folder)}"


def _among_others(folder: Path) -> str:
    source = Source(str(folder))
    rows = list(source.rows())
    assert len(rows) <= 1 + (folder / "x.parquet").stat().st_size // 32, f"{len(rows)} rows"
    assert [fetching.fetch(row, MAX_BYTES).data for row in rows if row["container"] is None] == [image_file(2)]
    stored = [row for row in rows if row["container"] is not None]
    if source.left_out.unread:
        assert all("x.parquet" in name for name in source.left_out.named)
        return "left out"
    for row in stored[:4] + stored[-2:]:
        try:
            assert len(fetching.fetch(row, MAX_BYTES).data) <= MAX_BYTES + 1
        except ImageError:
            return "failed rows"
    return "fetched"


def _as_list(folder: Path) -> str:
    try:
        count = len(list(islice(Source(str(folder / "x.parquet")).rows(), MAX_ROWS)))
        return "listed" if count < MAX_ROWS else "endless list"
    except NsnetError:
        return "refused"


def close() -> None:
    """End the processes."""
    fetching.close()
    containers._zygote.close()
