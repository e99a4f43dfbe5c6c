"""A Parquet file that others wrote, read without believing what its writer says of Arrow.

A Parquet file may carry its writer's Arrow schema beside its own. With it, columns become extension types, and some of
these run code: importing `ray.data` registers `ray.data.arrow_pickled_object`, whose values are unpickled when they
become Python objects. Here the Arrow schema is hidden from pyarrow before the file is opened, so that all columns have
the plain types that Parquet itself knows, whatever is registered in the process. It is used for one thing only: a
column of an extension type is refused by its name, before a value is read.
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
"""Read at a time of a column: pages come as they are needed, so that memory does not grow with the row group."""
WRITERS_SCHEMA: Final = b"ARROW:schema"
HIDDEN_SCHEMA: Final = b"ARROW-schema"
EXTENSION: Final = b"ARROW:extension:name"
HIDDEN_EXTENSION: Final = b"ARROW-extension-name"
"""Equally long names under which Arrow does not look for them."""
PLAIN: Final = (
    pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal,
    pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
)  # fmt: skip


class ColumnTypeError(SourceError):
    """A column that is read has a type that is not accepted."""


class ParquetFile:
    """A Parquet file with plain types. Raises what pyarrow raises for a damaged file."""

    def __init__(
        self,
        source: pa.NativeFile,
        name: str,
        repeated: Collection[str] = (),
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """`source`: the open file, which this object reads from and does not close. `name`: what people know it by.

        `repeated`: columns of which those that hold texts or bytes are read as dictionaries, so that a value which
        repeats a million times takes memory once. `buffer_bytes`: as `BUFFER_BYTES`; 0: a column's part is read as a
        whole, which is never more than the file has, whatever the headers of its pages say.
        """
        self.name = name
        self.size_bytes = source.size()
        footer = _footer(source, self.size_bytes)
        hidden = footer.replace(WRITERS_SCHEMA, HIDDEN_SCHEMA)
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + hidden + struct.pack("<I", len(hidden)) + MAGIC))
        self._metadata = metadata
        groups = self.group_rows()
        if sum(groups) != self.rows or min(groups, default=0) < 0:  # listed would be one number, and stored another
            raise pa.ArrowInvalid(f"it says that it has {self.rows:,} rows, and that its groups have {sum(groups):,}")
        leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.path in repeated and leaf.physical_type == "BYTE_ARRAY"]
        self._file = pq.ParquetFile(
            source, metadata=metadata, buffer_size=buffer_bytes, pre_buffer=False, read_dictionary=texts
        )
        self.schema: pa.Schema = self._file.schema_arrow
        """Plain types of all columns."""
        self.key_value = {key: value for key, value in (metadata.metadata or {}).items() if key != HIDDEN_SCHEMA}
        """What writers say of the file besides, such as `huggingface`."""
        self._extensions = _extensions((metadata.metadata or {}).get(HIDDEN_SCHEMA, b""))

    @property
    def rows(self) -> int:
        """Number of rows that the file says it has."""
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
                    f"{self.name}: the column `{column}` is of type {kind}; texts, bytes, numbers and booleans are read"
                )

    def check(self, columns: Sequence[str]) -> None:
        """Raise `ColumnTypeError` if one of these columns is an extension type, or holds one."""
        for column in columns:
            if (found := self._extensions.get(column)) is not None:
                raise ColumnTypeError(
                    f"{self.name}: the column `{column}` has the extension type {found}, which is not read, since such "
                    "types can run code: write it again with a plain type"
                )

    def batches(
        self, columns: Sequence[str], *, batch_rows: int, groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Some columns as batches of at most so many rows; `groups`: of these row groups only.

        Raises `ColumnTypeError` before anything is read.
        """
        self.check(columns)
        chosen = range(self._metadata.num_row_groups) if groups is None else groups
        yield from self._file.iter_batches(
            batch_size=batch_rows, row_groups=list(chosen), columns=list(columns), use_threads=False
        )


def _footer(source: pa.NativeFile, size_bytes: int) -> bytes:
    """The file's metadata as it stands at its end."""
    if size_bytes < 12:
        raise pa.ArrowInvalid(f"{size_bytes} bytes are too few for a Parquet file")
    source.seek(size_bytes - 8)
    length, magic = struct.unpack("<I4s", source.read(8))
    if magic != MAGIC:
        raise pa.ArrowInvalid("it does not end as a Parquet file does")
    if length > min(MAX_FOOTER_BYTES, size_bytes - 12):
        raise pa.ArrowInvalid(f"its metadata are said to have {length:,} bytes; the limit is {MAX_FOOTER_BYTES:,}")
    source.seek(size_bytes - 8 - length)
    footer: bytes = source.read(length)
    return footer


def _extensions(encoded: bytes) -> dict[str, str]:
    """Column -> name of the extension type that it is, or the first that it holds."""
    try:
        decoded = base64.b64decode(encoded, validate=True)
        schema = pa.ipc.read_schema(pa.py_buffer(decoded.replace(EXTENSION, HIDDEN_EXTENSION)))
    except (binascii.Error, ValueError, OSError, EOFError):  # it is not used for anything else
        return {}
    found = ((field.name, _extension(field)) for field in schema)
    return {column: name for column, name in found if name is not None}


def _extension(field: pa.Field) -> str | None:
    name = (field.metadata or {}).get(HIDDEN_EXTENSION)
    if name is not None:
        text: str = name.decode("utf-8", "backslashreplace")
        return text[:100]
    kind = field.type
    inner = [kind.field(number) for number in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        inner = [pa.field("", kind.value_type)]
    return next((found for one in inner if (found := _extension(one)) is not None), None)
