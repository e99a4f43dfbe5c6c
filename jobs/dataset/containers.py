"""Read untrusted tars and Parquet files through a guarded child (`container_service`), one child for each file.

The child requests pieces of the file and answers with names and values. Even a compromised child can only request
pieces of its file and send answers, which are checked.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from jobs.isolation.guard import Child, ChildTimeoutError, Clock, Zygote, exit_reason
from jobs.storage import errors
from jobs.storage.errors import Fault
from jobs.storage.parquet_file import ColumnTypeError
from nsnet.errors import NsnetError, SourceError

SERVICE: Final = "jobs.dataset.container_service"
SECONDS: Final = 60.0
"""CPU time limit of the child between two messages."""
BYTES_PER_SECOND: Final = 2**20
ROWS_PER_SECOND: Final = 10_000
"""CPU time limit of a request: `SECONDS`, plus one second for each `BYTES_PER_SECOND` of the file and each
`ROWS_PER_SECOND` of its rows."""
MEMORY_BYTES: Final = 512 * 2**20
MEMORY_PER_BYTE: Final = 8
MAX_MEMORY_BYTES: Final = 4 * 2**30
"""Address space of the child: `MEMORY_BYTES`, plus `MEMORY_PER_BYTE` per byte of a Parquet file, up to this maximum."""
MAX_MEMBERS: Final = 5_000_000
"""Maximum members of a tar."""
MAX_COLUMNS: Final = 100_000
"""Maximum columns of a Parquet file."""
MAX_NAMES_BYTES: Final = 2**29
"""Maximum total length of a tar's member names, which this process holds in memory."""
READ_FACTOR: Final = 4
"""A request may read the whole file this many times."""
MAX_DISTINCT: Final = 1000
"""Maximum distinct labels that are kept."""
MAX_RATIO: Final = 256
"""Maximum ratio of a table's texts to its file's size: repeated texts are stored once."""
MIN_TEXTS_BYTES: Final = 2**28
"""Bytes of texts in a table that are allowed whatever the file's size."""

WHAT: Final = {"tar": ", uncompressed tar", "parquet": " Parquet file"}
"""Kind of container -> end of the error message "… is not a complete"."""

_zygote = Zygote(SERVICE)


class ContainerError(SourceError):
    """A container cannot be read completely."""

    rows: range | None = None
    """Rows of a Parquet file that are lost; None: unknown."""


class ReaderEndedError(ContainerError):
    """The child that reads a container ended or timed out, possibly because of the machine."""

    by_machine = False
    """Whether the child was killed by SIGKILL, as the kernel does when memory is short."""


class ContainerTooLargeError(ContainerError):
    """Reading a container exceeds a memory or size limit."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A member of a tar."""

    name: str
    """Name in the tar; bytes that are not UTF-8 are surrogates."""
    offset: int
    """Offset of its data in the tar."""
    size_bytes: int
    kind: str
    """file, folder, sparse, or other (links and devices)."""
    label: str | None
    """Content of a small `.cls` file."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """Columns and metadata of a Parquet file."""

    columns: dict[str, str]
    """Name -> type, for columns with unique names."""
    images: dict[str, tuple[str, ...]]
    """Name -> that name and, of a struct, its fields of bytes and of paths, for columns that can hold images."""
    doubled: list[str]
    """Names shared by several columns."""
    rows: int
    features: bytes
    """`huggingface` metadata."""


class Container:
    """An open container; use it in a `with` statement.

    `read(offset, length)` returns bytes of the file. Methods raise `ContainerError` and what `read` raises.
    """

    def __init__(
        self, name: str, kind: str, size_bytes: int, read: Callable[[int, int], bytes], zygote: Zygote = _zygote
    ) -> None:
        self._name, self._kind, self._size_bytes, self._read, self._zygote = name, kind, size_bytes, read, zygote
        self._child: Child | None = None

    def __enter__(self) -> Self:
        more = MEMORY_PER_BYTE * self._size_bytes if self._kind == "parquet" else 0
        memory = min(MAX_MEMORY_BYTES, MEMORY_BYTES + more)
        self._child = self._zygote.fork({"kind": self._kind, "size_bytes": self._size_bytes}, memory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> int:
        """End the child; returns its exit code."""
        child, self._child = self._child, None
        return child.end() if child is not None else 0

    def members(self) -> tuple[list[Member], int]:
        """All members of a tar in order, and the number of trailing bytes that are not a tar."""
        members: list[Member] = []
        names = behind = 0
        for answer in self._ask({"members": True}):
            with self._checking_answer():
                rows = self._checked(answer["members"], (str, int, int, str, str | None))
                behind = int(answer.get("behind", 0))
            for name, offset, size, kind, label in rows:
                if kind == "file" and not 0 <= offset <= offset + size <= self._size_bytes:
                    raise self._invalid_answer()
                members.append(Member(name=name, offset=offset, size_bytes=size, kind=kind, label=label))
                names += len(name)
            if len(members) > MAX_MEMBERS or names > MAX_NAMES_BYTES:
                raise self._error(
                    f"it has more than {MAX_MEMBERS:,} members, or names of more than {MAX_NAMES_BYTES:,} bytes"
                )
        return members, behind

    def describe(self, repeated: Sequence[str] = ()) -> Described:
        """Columns and rows of a Parquet file; call it before other methods. `repeated`: as in `ParquetFile`."""
        columns: list[list[Any]] = []
        for answer in self._ask({"describe": list(repeated)}):
            with self._checking_answer():
                columns += self._checked(answer["columns"], (str, str, list | None))
            if len(columns) > MAX_COLUMNS:
                raise self._error(f"it has more than {MAX_COLUMNS:,} columns")
        with self._checking_answer():
            rows, features = int(answer["rows"]), str(answer["features"]).encode()
        unique = {name for name, count in Counter(name for name, _, _ in columns).items() if count == 1}
        return Described(
            columns={name: kind for name, kind, _ in columns if name in unique},
            images={
                name: (name, *map(str, field)) for name, _, field in columns if name in unique and field is not None
            },
            doubled=sorted({name for name, _, _ in columns} - unique),
            rows=rows,
            features=features,
        )

    def distinct(self, column: str) -> list[Any] | None:
        """Distinct values of a column; None: more than `MAX_DISTINCT`."""
        with self._checking_answer():
            (answer,) = self._ask({"distinct": column, "most": MAX_DISTINCT})
            values = answer["distinct"]
            rows = None if values is None else self._checked([[one] for one in values], (Plain,))
        return None if rows is None else [value for (value,) in rows]

    def rows(self, columns: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        """All `count` rows of the file, for columns of plain types. The total size of texts is limited."""
        limit = max(MIN_TEXTS_BYTES, MAX_RATIO * self._size_bytes)
        row_count = texts = 0
        for answer in self._ask({"rows": list(columns)}, count):
            if not columns:
                yield from ({} for _ in range(count))
                return
            with self._checking_answer():
                value_rows = self._checked(answer["values"], (Plain,) * len(columns))
            row_count += len(value_rows)
            if row_count > count:
                raise self._error(f"it declares {count:,} rows, but has more")
            for values in value_rows:
                texts += sum(len(value) for value in values if isinstance(value, str))
                yield dict(zip(columns, values, strict=True))
            if texts > limit:
                raise self._error(f"its {self._size_bytes:,} bytes hold more than {limit:,} bytes of texts")
        if row_count != count:
            raise self._error(f"it declares {count:,} rows, but has {row_count:,}")

    def group(self, row: int) -> range:
        """The rows of the row group that contains a row."""
        with self._checking_answer():
            (answer,) = self._ask({"group": row})
            first, end = (int(number) for number in answer["group"])
        if not first <= row < end:
            raise self._invalid_answer()
        return range(first, end)

    def images(self, column: Sequence[str], first: int, last: int, most: int) -> Iterator[bytes | str | None]:
        """Stored images of rows `first` to `last`, each at most `most` bytes; None: the row has no image.

        A text is the path of an image outside of the file, which a stranger chose.

        `column`: as in `Described.images`. Ascending requests continue a stream; others restart it.
        """
        request = {"images": list(column), "from": first, "to": last, "most": most}
        for position, answer in enumerate(self._ask(request), start=first):
            with self._checking_answer():
                size = None if answer["size_bytes"] is None else int(answer["size_bytes"])
                path = None if size is not None or answer["path"] is None else str(answer["path"])
                is_next = answer["position"] == position
            if not is_next or not (size is None or 0 <= size <= most):
                raise self._invalid_answer()
            yield path if size is None else self._payload(size)

    def _payload(self, size: int) -> bytes:
        return bytes(self._guarded(lambda child: child.read(size, Clock(child.pid, SECONDS))))

    def _ask(self, request: dict[str, Any], rows: int = 0) -> Iterator[dict[str, Any]]:
        """Send a request and yield the answers; serves the child's reads in between. `rows`: rows that it processes."""
        bytes_left = READ_FACTOR * self._size_bytes + 2**26
        seconds = SECONDS + self._size_bytes / BYTES_PER_SECOND + rows / ROWS_PER_SECOND
        request_clock = self._guarded(lambda child: Clock(child.pid, seconds))
        self._send(request)
        while True:
            answer = self._guarded(lambda child: child.receive(Clock(child.pid, SECONDS)))
            if request_clock.computed > seconds:
                raise self._error(f"reading it took longer than {seconds:.0f} s of CPU time")
            if "read" in answer:
                with self._checking_answer():
                    offset, length = (int(number) for number in answer["read"])
                bytes_left -= max(0, length)
                if offset < 0 or length <= 0 or bytes_left < 0:
                    raise self._error(f"its reader requests more than {READ_FACTOR} times its size")
                data = self._piece(offset, length)
                self._send({"size_bytes": len(data)}, data)
                continue
            if "error" in answer:
                raise self._error_of(_text(answer.get("class")), _text(answer["error"]))
            yield answer
            if answer.get("end"):
                return

    def _piece(self, offset: int, length: int) -> bytes:
        """Read bytes of the file. Errors of an outage pass through; others become a `ContainerError`."""
        try:
            return self._read(offset, length)
        except NsnetError:
            raise
        except Exception as error:  # botocore, aiohttp and OS errors have no common base; `errors.kind` classifies them
            if errors.kind(error) in (Fault.TRANSIENT, Fault.CREDENTIALS):
                raise
            raise self._error(f"it cannot be read: {errors.reason(error)}") from error

    def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self._guarded(lambda child: child.send(Clock(child.pid, SECONDS), header, payload))

    def _guarded(self, talk: Callable[[Child], Any]) -> Any:
        """Call `talk` with the child; its failures become a `ContainerError`."""
        if self._child is None:
            raise self._error("its reader has ended")
        try:
            return talk(self._child)
        except (EOFError, BrokenPipeError) as error:
            code = self.close()
            ended = ReaderEndedError(f"{self._name}: its reader ended with {exit_reason(code)}")
            ended.by_machine = code == -signal.SIGKILL
            raise ended from error
        except ChildTimeoutError as error:
            raise ReaderEndedError(f"{self._name}: reading it took longer than {error}") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._invalid_answer() from error

    @contextmanager
    def _checking_answer(self) -> Iterator[None]:
        """Raise `ContainerError` for an invalid answer: a compromised child must cost this container only."""
        try:
            yield
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise self._invalid_answer() from error

    def _checked(self, rows: Any, kinds: tuple[Any, ...]) -> list[list[Any]]:
        """Check that `rows` hold values of these types. Texts may hold surrogates for bytes that are not UTF-8."""
        if not isinstance(rows, list):
            raise self._invalid_answer()
        for row in rows:
            if not isinstance(row, list) or len(row) != len(kinds) or not all(map(isinstance, row, kinds)):
                raise self._invalid_answer()
            for value in row:
                if isinstance(value, str) and not value.isascii():
                    value.encode("utf-8", "surrogateescape")
        return rows

    def _invalid_answer(self) -> ContainerError:
        return self._error("its reader sent an invalid answer")

    def _error(self, why: str) -> ContainerError:
        return ContainerError(f"{self._name}: {why}")

    def _error_of(self, kind: str, message: str) -> ContainerError:
        """The error for an error that the child reports."""
        if kind == "MemoryError":
            return ContainerTooLargeError(f"{self._name}: reading it exceeds the memory limit")
        if kind == "TooLargeError":
            return ContainerTooLargeError(f"{self._name}: {message}")
        if kind == ColumnTypeError.__name__:
            return self._error(message.removeprefix(": "))
        return ContainerError(f"{self._name} is not a complete{WHAT[self._kind]}: {kind}: {message}")


Plain = str | int | float | bool | None


def _text(value: Any) -> str:
    """A text of the child, shortened and without lone surrogates, which tables cannot store."""
    return str(value)[:400].encode("utf-8", "replace").decode()
