"""Read an untrusted Parquet file without applying the Arrow schema that it carries.

A Parquet file may carry its writer's Arrow schema beside its own. That schema can turn columns into extension types,
and some of these run code: importing `ray.data` registers `ray.data.arrow_pickled_object`, whose values are unpickled
when they become Python objects. This module hides the Arrow schema from pyarrow before opening the file, so that all
columns have Parquet's own plain types, whatever types the process has registered. The Arrow schema serves one purpose:
a column of an extension type is refused, by the type's name, before a value is read.
"""

import base64
import binascii
import struct
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from nsnet.errors import SourceError

MAGIC: Final = b"PAR1"
MAX_FOOTER_BYTES: Final = 64 * 2**20
BUFFER_BYTES: Final = 2**20
"""Bytes of a column read at a time: pages are read on demand, so that memory does not grow with the row group."""
WRITERS_SCHEMA: Final = b"ARROW:schema"
HIDDEN_SCHEMA: Final = b"ARROW-schema"
EXTENSION: Final = b"ARROW:extension:name"
HIDDEN_EXTENSION: Final = b"ARROW-extension-name"
"""Replacement names of equal length, which Arrow ignores."""
PLAIN: Final = (
    pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal,
    pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
)  # fmt: skip


class ColumnTypeError(SourceError):
    """A requested column has an unsupported type."""


class ParquetFile:
    """A Parquet file with plain types. Raises what pyarrow raises for a damaged file."""

    def __init__(
        self,
        source: pa.NativeFile,
        name: str,
        repeated: Collection[str] = (),
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """`source`: the open file, which this object reads and does not close. `name`: the file's name for messages.

        `repeated`: of these columns, those of texts or bytes are read as dictionaries, so that a value that repeats a
        million times is stored once. `buffer_bytes`: as `BUFFER_BYTES`; 0: a column chunk is read as a whole, which
        never exceeds the file's size, whatever its page headers claim.
        """
        self.name = name
        self.size_bytes = source.size()
        footer = _footer(source, self.size_bytes)
        hidden = footer.replace(WRITERS_SCHEMA, HIDDEN_SCHEMA)
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + hidden + struct.pack("<I", len(hidden)) + MAGIC))
        self._metadata = metadata
        groups = self.group_rows()
        if sum(groups) != self.rows or min(groups, default=0) < 0:  # the listing and the stored rows would differ
            raise pa.ArrowInvalid(f"it declares {self.rows:,} rows, but its row groups declare {sum(groups):,}")
        leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.path in repeated and leaf.physical_type == "BYTE_ARRAY"]
        self._file = pq.ParquetFile(
            source, metadata=metadata, buffer_size=buffer_bytes, pre_buffer=False, read_dictionary=texts
        )
        self.schema: pa.Schema = self._file.schema_arrow
        """Plain types of all columns."""
        self.key_value = {key: value for key, value in (metadata.metadata or {}).items() if key != HIDDEN_SCHEMA}
        """Other metadata of writers, such as `huggingface`."""
        self._extensions = _extensions((metadata.metadata or {}).get(HIDDEN_SCHEMA, b""))

    @property
    def rows(self) -> int:
        """Number of rows that the file declares."""
        return int(self._metadata.num_rows)

    def group_rows(self) -> list[int]:
        """Number of rows of each row group."""
        return [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]

    def check_plain(self, columns: Sequence[str]) -> None:
        """Raise `ColumnTypeError` unless these columns hold texts, bytes, numbers or booleans."""
        self.check(columns)
        for column in columns:
            kind = self.schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not any(is_such(kind) for is_such in PLAIN):
                raise ColumnTypeError(
                    f"{self.name}: column `{column}` has type {kind}; use texts, bytes, numbers or booleans"
                )

    def check(self, columns: Sequence[str]) -> None:
        """Raise `ColumnTypeError` if one of these columns is an extension type, or holds one."""
        for column in columns:
            if (extension := self._extensions.get(column)) is not None:
                raise ColumnTypeError(
                    f"{self.name}: column `{column}` has the extension type {extension}, which is not read because "
                    "such types can run code: rewrite it with a plain type"
                )

    def batches(
        self, columns: Sequence[str], *, batch_rows: int, groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Read columns as batches of at most `batch_rows` rows; `groups`: only these row groups.

        Raises `ColumnTypeError` before any value is read.
        """
        self.check(columns)
        chosen = range(self._metadata.num_row_groups) if groups is None else groups
        yield from self._file.iter_batches(
            batch_size=batch_rows, row_groups=list(chosen), columns=list(columns), use_threads=False
        )


def _footer(source: pa.NativeFile, size_bytes: int) -> bytes:
    """Read the metadata at the file's end."""
    if size_bytes < 12:
        raise pa.ArrowInvalid(f"it has {size_bytes} bytes; a Parquet file has at least 12")
    source.seek(size_bytes - 8)
    length, magic = struct.unpack("<I4s", source.read(8))
    if magic != MAGIC:
        raise pa.ArrowInvalid("it does not end with Parquet's magic bytes")
    if length > (limit := min(MAX_FOOTER_BYTES, size_bytes - 12)):
        raise pa.ArrowInvalid(f"it declares {length:,} bytes of metadata; the limit is {limit:,}")
    source.seek(size_bytes - 8 - length)
    footer: bytes = source.read(length)
    return footer


def _extensions(encoded: bytes) -> dict[str, str]:
    """Column -> name of its extension type, or of the first one nested in it."""
    try:
        decoded = base64.b64decode(encoded, validate=True)
        schema = pa.ipc.read_schema(pa.py_buffer(decoded.replace(EXTENSION, HIDDEN_EXTENSION)))
    except (binascii.Error, ValueError, OSError, EOFError):  # the Arrow schema serves no other purpose
        return {}
    extensions = ((field.name, _extension(field)) for field in schema)
    return {column: name for column, name in extensions if name is not None}


def _extension(field: pa.Field) -> str | None:
    name = (field.metadata or {}).get(HIDDEN_EXTENSION)
    if name is not None:
        text: str = name.decode("utf-8", "backslashreplace")
        return text[:100]
    kind = field.type
    inner = [kind.field(number) for number in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        inner = [pa.field("", kind.value_type)]
    return next((extension for child in inner if (extension := _extension(child)) is not None), None)
