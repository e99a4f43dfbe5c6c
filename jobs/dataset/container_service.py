"""The guarded child that reads a tar or Parquet file, whose bytes it requests from its parent.

    settings  {"kind": "tar" or "parquet", "size_bytes"}
    request   {"members"} | {"describe"} | {"distinct", "most"} | {"rows"} | {"group"}
              | {"images", "from", "to", "most"}
    answers   any number, the last one with "end" or "error"; in between {"read": [offset, bytes]}, which the parent
              answers with {"size_bytes"} and these bytes

Only this code parses untrusted containers: it cannot open files, and its memory is bounded.
"""

import bisect
import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO, Final

from jobs.dataset.labels import HUGGINGFACE, MAX_FEATURES_BYTES
from jobs.isolation import frames

MIN_READ_BYTES: Final = 64 * 2**10
MAX_READ_BYTES: Final = 4 * 2**20
"""Minimum and maximum bytes per request to the parent; requests grow while reading is sequential."""
MAX_TAR_HEADER_BYTES: Final = 2**20
"""Largest header of a tar, such as a long name or PAX records."""
MAX_NAME_BYTES: Final = 1024
"""Longest name of a tar's member or path of an image, S3's limit for keys: one header may name all members that
follow."""
MAX_CLS_BYTES: Final = 64
"""Largest `.cls` member that is read as a label."""
MAX_TEXT_BYTES: Final = 8192
"""Longest text in a table: a small file may repeat a long text a million times."""
ANSWER_BYTES: Final = 2**15
"""Approximate characters per answer; in JSON a character may take six bytes."""
BATCH_ROWS: Final = 8192
MAX_RATIO: Final = 256
"""Maximum ratio of a row group's images to the file's size: repeated values are stored once."""
MIN_IMAGES_BYTES: Final = 2**28
"""Bytes of images in a row group that are allowed whatever the file's size."""


class TooLargeError(Exception):
    """A container expands to more than its size justifies."""


class ContainerFile(io.RawIOBase):
    """The container as a file object; its bytes come from the parent."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO, size_bytes: int) -> None:
        super().__init__()
        self._requests, self._answers, self.size_bytes = requests, answers, size_bytes
        self.max_read_bytes = size_bytes
        """Limit of a single read."""
        self._at = self._start = 0
        self._block = b""
        self._read_bytes = MIN_READ_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Read at most the bytes that exist, whatever a header claims. Raises `ValueError` over `max_read_bytes`."""
        bytes_left = max(0, self.size_bytes - self._at)
        wanted = bytes_left if size is None or size < 0 else size
        if wanted > self.max_read_bytes and wanted > MIN_READ_BYTES:
            raise ValueError(f"it has a header of {wanted:,} bytes; the limit is {self.max_read_bytes:,}")
        wanted, parts = min(wanted, bytes_left), []
        while wanted:
            part = self._available(wanted)
            parts.append(part)
            self._at += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _available(self, wanted: int) -> bytes:
        """Bytes at the current position, between one and `wanted`."""
        inside = self._at - self._start
        if not 0 <= inside < len(self._block):
            is_sequential = 0 <= inside <= 2 * len(self._block)
            self._read_bytes = min(MAX_READ_BYTES, 2 * self._read_bytes) if is_sequential else MIN_READ_BYTES
            self._start, inside = self._at, 0
            self._block = self._fetch(min(max(self._read_bytes, wanted), MAX_READ_BYTES, self.size_bytes - self._at))
        return self._block[inside : inside + wanted]

    def _fetch(self, length: int) -> bytes:
        frames.send(self._answers, {"read": [self._at, length]})
        header = frames.receive(self._requests)
        assert header is not None
        block = self._requests.read(header["size_bytes"])
        if not block:
            raise EOFError(f"its {self.size_bytes:,} bytes end at byte {self._at:,}")
        return block


def preload() -> None:
    """Import everything needed later, because a child can open no file."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet as pq

    from jobs.storage.parquet_file import ParquetFile

    pa.set_memory_pool(pa.system_memory_pool())  # other pools reserve more address space than a child has
    buffer = io.BytesIO()
    table = pa.table({"text": ["a"], "number": [1], "bytes": [b"a"], "struct": [{"bytes": b"a"}]})
    pq.write_table(table, buffer)
    with pa.BufferReader(buffer.getvalue()) as source:  # loads what pyarrow loads at first use
        list(ParquetFile(source, "").batches(table.column_names, batch_rows=1))
    assert pyarrow.compute is not None


def serve(requests: BinaryIO, answers: BinaryIO, settings: dict[str, Any]) -> None:
    """Answer requests until the end of the input."""
    file = ContainerFile(requests, answers, settings["size_bytes"])
    container = Tar(file) if settings["kind"] == "tar" else Table(file)
    while (request := frames.receive(requests)) is not None:
        try:
            for header, payload in container.answer(request):
                frames.send(answers, header, payload)
        except MemoryError:
            frames.send(answers, {"error": "", "class": "MemoryError"})
        except Exception as error:  # a damaged container makes tarfile and pyarrow raise almost anything
            frames.send(answers, {"error": " ".join(str(error).split())[:300], "class": type(error).__name__})


Answers = Iterator[tuple[dict[str, Any], bytes]]


class Tar:
    """An uncompressed tar, or several concatenated tars."""

    def __init__(self, file: ContainerFile) -> None:
        self._file = file
        file.max_read_bytes = MAX_TAR_HEADER_BYTES

    def answer(self, request: dict[str, Any]) -> Answers:
        """The members as [name, data offset, bytes, kind, label or null]; the last answer has the trailing bytes."""
        members: list[list[Any]] = []
        size = 0
        behind = 0
        for item in self._members():
            if isinstance(item, int):
                behind = item
                continue
            members.append(item)
            size += len(item[0]) + 64
            if size > ANSWER_BYTES:
                yield {"members": members}, b""
                members, size = [], 0
        yield {"members": members, "behind": behind, "end": True}, b""

    def _members(self) -> Iterator[list[Any] | int]:
        """Members of the tars; then, if other data follow, the number of trailing bytes that are not a tar."""
        start: int | None = 0
        while start is not None:
            self._file.seek(start)
            try:
                tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115 - its file is still in use
            except (tarfile.TarError, ValueError):
                if start == 0:
                    raise
                yield self._file.size_bytes - start
                return
            count = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members
                count += 1
                yield self._described(tar, member)
            if start > 0 and count == 0:  # the data after a tar's end need not be a tar
                yield self._file.size_bytes - start
                return
            end = tar.offset
            self._file.seek(end)
            # tarfile treats a damaged or missing header as the end; a complete tar ends with a block of zeros
            if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it is damaged or truncated at byte {end:,}")
            start = self._next_block()

    def _described(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> list[Any]:
        if member.size < 0 or len(member.name) > MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a member has {member.size:,} bytes and a name of {len(member.name):,}")
        kind = "other"
        if member.isdir():
            kind = "folder"
        elif member.issparse():
            kind = "sparse"
        elif member.isfile():
            kind = "file"
        label = None
        if kind == "file" and member.name.lower().endswith(".cls") and member.size <= MAX_CLS_BYTES:
            content = tar.extractfile(member)
            label = content.read().decode("utf-8", "replace").strip() if content else None
        return [member.name, member.offset_data, member.size, kind, label]

    def _next_block(self) -> int | None:
        """Offset of the next block that is not all zeros; None: there is none."""
        while block := self._file.read(MIN_READ_BYTES):
            stripped = len(block) - len(block.lstrip(b"\0"))
            if stripped < len(block):
                at = self._file.tell() - len(block) + stripped
                return at - at % tarfile.BLOCKSIZE
        return None


class Table:
    """A Parquet file."""

    def __init__(self, file: ContainerFile) -> None:
        self._file = file
        self._opened: Any = None
        self._starts: list[int] = []
        """First row of each row group, then the total number of rows."""
        self._images: Iterator[tuple[int, bytes | str | None]] | None = None
        self._next = 0
        """Next row of the stream of images."""

    def answer(self, request: dict[str, Any]) -> Answers:
        """Answer a request (see the module's docstring)."""
        if "describe" in request:
            yield from self._describe(request["describe"])
        elif "distinct" in request:
            yield from self._distinct(request["distinct"], request["most"])
        elif "rows" in request:
            yield from self._rows(request["rows"])
        elif "group" in request:
            group = self._group(request["group"])
            yield {"group": self._starts[group : group + 2], "end": True}, b""
        else:
            yield from self._stored(request["images"], request["from"], request["to"], request["most"])

    def _describe(self, repeated: Sequence[str]) -> Answers:
        """Names and types of columns, the number of rows, and the features of `datasets`."""
        import pyarrow as pa

        from jobs.storage.parquet_file import ParquetFile

        self._opened = ParquetFile(pa.PythonFile(self._file, mode="r"), "", repeated)
        self._starts = [0, *itertools.accumulate(self._opened.group_rows())]
        features = self._opened.key_value.get(HUGGINGFACE, b"").decode("utf-8", "replace")
        columns: list[list[Any]] = []
        size = 0
        for field in self._opened.schema:
            kind = _value_type(field.type)
            columns.append([field.name, str(kind)[:200], _images_in(kind)])
            size += len(field.name) + 64
            if size > ANSWER_BYTES:
                yield {"columns": columns}, b""
                columns, size = [], 0
        summary = {"rows": self._opened.rows, "features": features[: MAX_FEATURES_BYTES + 1]}
        yield {"columns": columns, **summary, "end": True}, b""

    def _distinct(self, column: str, most: int) -> Answers:
        """Distinct values of a column, or null if there are more than `most`."""
        distinct: set[Any] = set()
        for batch in self._batches([column]):
            distinct.update(_plain(value) for value in batch.column(0).unique().to_pylist())
            if len(distinct) > most:
                yield {"distinct": None, "end": True}, b""
                return
        yield {"distinct": list(distinct), "end": True}, b""

    def _rows(self, columns: Sequence[str]) -> Answers:
        """Columns as lists of values, row by row."""
        if not columns:
            yield {"values": [], "count": self._opened.rows, "end": True}, b""
            return
        for batch in self._batches(columns):
            lists = [[_plain(value) for value in column.to_pylist()] for column in batch.columns]
            rows: list[list[Any]] = []
            size = 0
            for values in zip(*lists, strict=True):
                rows.append(list(values))
                size += 16 + sum(len(value) if isinstance(value, str) else 16 for value in values)
                if size > ANSWER_BYTES:
                    yield {"values": rows}, b""
                    rows, size = [], 0
            yield {"values": rows}, b""
        yield {"values": [], "end": True}, b""

    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Batches of plain types. Raises `ValueError` for a text longer than `MAX_TEXT_BYTES`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        self._opened.check_plain(columns)
        for batch in self._opened.batches(columns, batch_rows=BATCH_ROWS):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                texts = column.dictionary if pa.types.is_dictionary(column.type) else column
                if _is_text(texts.type):
                    longest = pc.max(pc.binary_length(texts)).as_py() or 0
                    if longest > MAX_TEXT_BYTES:
                        raise ValueError(
                            f"a text of column `{name}` has {longest:,} bytes, the limit is {MAX_TEXT_BYTES:,}"
                        )
            yield batch

    def _stored(self, column: Sequence[str], first: int, last: int, most: int) -> Answers:
        """The images of rows `first` to `last`, each at most `most` bytes, read as a stream within a row group."""
        group = self._group(first)
        if self._images is None or not self._starts[group] <= self._next <= first:
            self._images = self._stream(column, group)
        for position, content in self._images:
            self._next = position + 1
            if position < first:
                continue
            header: dict[str, Any] = {"position": position, "size_bytes": None}
            if isinstance(content, bytes):
                content = content[:most]
                header["size_bytes"] = len(content)
            else:
                header["path"], content = content, b""
            yield header | ({"end": True} if position == last else {}), content
            if position == last:
                return
        raise EOFError(f"it has no row {last:,}")

    def _group(self, row: int) -> int:
        """Index of the row group that contains a row."""
        group = bisect.bisect_right(self._starts, row) - 1
        if not 0 <= group < len(self._starts) - 1:
            raise EOFError(f"it has no row {row:,}")
        return group

    def _stream(self, column: Sequence[str], group: int) -> Iterator[tuple[int, bytes | str | None]]:
        """Row numbers and images from the start of a row group; a text is the path of an image outside of the file."""
        import pyarrow as pa

        name, *inner = column
        position = self._starts[group]
        limit = max(MIN_IMAGES_BYTES, MAX_RATIO * self._file.size_bytes)
        for number in range(group, len(self._starts) - 1):
            read_bytes = 0
            for batch in self._opened.batches([name], batch_rows=1, groups=[number]):
                values = batch.column(0)
                (content,) = (values.field(inner[0]) if inner else values).to_pylist()
                if content is None and len(inner) > 1:
                    (path,) = values.field(inner[1]).cast(pa.large_binary()).to_pylist()
                    content = None if path is None else path[: MAX_NAME_BYTES + 1].decode("utf-8", "replace")
                read_bytes += len(content or b"")
                if read_bytes > limit:
                    raise TooLargeError(f"its {self._file.size_bytes:,} bytes hold images of more than {limit:,} bytes")
                yield position, content
                position += 1


def _value_type(kind: Any) -> Any:
    return getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind


def _images_in(kind: Any) -> list[str] | None:
    """Where images are in a column of this type: the column itself ([]), a struct's field of bytes and, if it has one,
    of paths, as `datasets` has it; None: nowhere."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return None
        at = kind.get_field_index("path")
        paths = ["path"] if at >= 0 and kind.field(at).type in (pa.string(), pa.large_string()) else []
        inner = kind.field("bytes").type
        has_only_paths = paths and pa.types.is_null(inner)  # a writer that was given no schema
        return ["bytes", *paths] if has_only_paths or _images_in(inner) == [] else None
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return [] if any(is_such(kind) for is_such in binary) else None


def _is_text(kind: Any) -> bool:
    return any(word in str(kind) for word in ("string", "binary"))


def _plain(value: Any) -> Any:
    """A value for JSON: bytes as text, decimals as numbers."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value
