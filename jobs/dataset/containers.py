"""Tars and Parquet files of strangers, read by a guarded child (`container_service`), one child for each file.

The child asks for pieces of the file and answers with names and values; whatever the file does to it, this process
pays nothing but these pieces.
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
"""Longest computing of the child between two messages."""
BYTES_PER_SECOND: Final = 2**20
ROWS_PER_SECOND: Final = 10_000
"""A request may compute for `SECONDS`, and a second more for so many bytes of the file and so many rows of it."""
MEMORY_BYTES: Final = 512 * 2**20
MEMORY_PER_BYTE: Final = 8
MAX_MEMORY_BYTES: Final = 4 * 2**30
"""Address space of the child: so much, and more for each byte of a Parquet file, up to the most."""
MAX_MEMBERS: Final = 5_000_000
"""Members of a tar."""
MAX_COLUMNS: Final = 100_000
"""Columns of a Parquet file."""
MAX_NAMES_BYTES: Final = 2**29
"""Of all names of a tar's members together, which this process holds."""
READ_FACTOR: Final = 4
"""A request may read the whole file so many times."""
MAX_DISTINCT: Final = 1000
"""Most distinct labels that are kept."""
MAX_RATIO: Final = 256
"""Texts of a table may be so many times as large as its file: repeated ones are stored once."""
MIN_TEXTS_BYTES: Final = 2**28
"""Texts of a table that are read whatever the size of its file."""

WHAT: Final = {"tar": ", uncompressed tar", "parquet": " Parquet file"}
"""Kind of a container -> what it should be."""

_zygote = Zygote(SERVICE)


class ContainerError(SourceError):
    """A container that cannot be read, or not to its end."""

    rows: range | None = None
    """Rows of a Parquet file that this costs; None: it is not known which."""


class ReaderEndedError(ContainerError):
    """The child that reads it ended, or took too long, which may be the machine's fault."""

    by_machine = False
    """It was killed (SIGKILL), as the machine does where memory is short."""


class ContainerTooLargeError(ContainerError):
    """Reading it takes more memory than it may."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A member of a tar."""

    name: str
    """As in the tar, bytes that are no UTF-8 as surrogates."""
    offset: int
    """Of its data."""
    size_bytes: int
    kind: str
    """file, folder, sparse, or other: links and devices."""
    label: str | None
    """Content of a small `.cls` file."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a Parquet file says of itself."""

    columns: dict[str, str]
    """Name -> type, of columns whose names are unique."""
    images: dict[str, tuple[str, ...]]
    """Name -> where its bytes are, of those that can hold images: the column, or a field in it."""
    doubled: list[str]
    """Names that several columns have."""
    rows: int
    features: bytes
    """`huggingface` metadata."""


class Container:
    """One container while it is read; use it in a `with` statement.

    `read(offset, length)` gives bytes of the file. Methods raise `ContainerError`, and what `read` raises.
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
        """All members of a tar in their order, and how many bytes behind its end are something else."""
        found: list[Member] = []
        names = behind = 0
        for answer in self._ask({"members": True}):
            with self._making_sense():
                some = self._checked(answer["members"], (str, int, int, str, str | None))
                behind = int(answer.get("behind", 0))
            for name, offset, size, kind, label in some:
                if kind == "file" and not 0 <= offset <= offset + size <= self._size_bytes:
                    raise self._senseless()
                found.append(Member(name=name, offset=offset, size_bytes=size, kind=kind, label=label))
                names += len(name)
            if len(found) > MAX_MEMBERS or names > MAX_NAMES_BYTES:
                raise self._error(f"it has more than {MAX_MEMBERS:,} members, or names of {MAX_NAMES_BYTES:,} bytes")
        return found, behind

    def describe(self, repeated: Sequence[str] = ()) -> Described:
        """Columns and rows of a Parquet file; must be asked first. `repeated`: as `ParquetFile` takes it."""
        columns: list[list[Any]] = []
        for answer in self._ask({"describe": list(repeated)}):
            with self._making_sense():
                columns += self._checked(answer["columns"], (str, str, list | None))
            if len(columns) > MAX_COLUMNS:
                raise self._error(f"it has more than {MAX_COLUMNS:,} columns")
        with self._making_sense():
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
        with self._making_sense():
            (answer,) = self._ask({"distinct": column, "most": MAX_DISTINCT})
            values = answer["distinct"]
            rows = None if values is None else self._checked([[one] for one in values], (Plain,))
        return None if rows is None else [value for (value,) in rows]

    def rows(self, columns: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        """Rows of some columns of plain types, `count` of them, as the file says. Texts are bounded, one and all."""
        limit = max(MIN_TEXTS_BYTES, MAX_RATIO * self._size_bytes)
        came = texts = 0
        for answer in self._ask({"rows": list(columns)}, count):
            if not columns:
                yield from ({} for _ in range(count))
                return
            with self._making_sense():
                some = self._checked(answer["values"], (Plain,) * len(columns))
            came += len(some)
            if came > count:
                raise self._error(f"it says that it has {count:,} rows, and has more")
            for values in some:
                texts += sum(len(value) for value in values if isinstance(value, str))
                yield dict(zip(columns, values, strict=True))
            if texts > limit:
                raise self._error(f"its {self._size_bytes:,} bytes hold more than {limit:,} bytes of texts")
        if came != count:
            raise self._error(f"it says that it has {count:,} rows, and has {came:,}")

    def group(self, row: int) -> range:
        """The rows of the row group that a row is in."""
        with self._making_sense():
            (answer,) = self._ask({"group": row})
            first, end = (int(number) for number in answer["group"])
        if not first <= row < end:
            raise self._senseless()
        return range(first, end)

    def images(self, column: Sequence[str], first: int, last: int, most: int) -> Iterator[bytes | None]:
        """Stored images of rows `first` to `last`, each at most so many bytes; None: the row holds none.

        `column`: its name, and the field's where it is a struct. Ascending rows are read on; others begin anew.
        """
        request = {"images": list(column), "from": first, "to": last, "most": most}
        for position, answer in enumerate(self._ask(request), start=first):
            with self._making_sense():
                size = None if answer["size_bytes"] is None else int(answer["size_bytes"])
                is_next = answer["position"] == position
            if not is_next or not (size is None or 0 <= size <= most):
                raise self._senseless()
            yield None if size is None else self._payload(size)

    def _payload(self, size: int) -> bytes:
        content: bytes = self._guarded(lambda child: child.read(size, Clock(child.pid, SECONDS)))
        return content

    def _ask(self, request: dict[str, Any], rows: int = 0) -> Iterator[dict[str, Any]]:
        """The child's answers to a request, with its readings in between. `rows`: of the file, that it goes through."""
        left = READ_FACTOR * self._size_bytes + 2**26
        seconds = SECONDS + self._size_bytes / BYTES_PER_SECOND + rows / ROWS_PER_SECOND
        whole = self._guarded(lambda child: Clock(child.pid, seconds))
        self._send(request)
        while True:
            answer = self._guarded(lambda child: child.receive(Clock(child.pid, SECONDS)))
            if whole.computed > seconds:
                raise self._error(f"reading it took longer than {seconds:.0f} s of computing")
            if "read" in answer:
                with self._making_sense():
                    offset, length = (int(number) for number in answer["read"])
                left -= max(0, length)
                if offset < 0 or length <= 0 or left < 0:
                    raise self._error("it is read again and again")
                data = self._piece(offset, length)
                self._send({"size_bytes": len(data)}, data)
                continue
            if "error" in answer:
                raise self._error_of(_text(answer.get("class")), _text(answer["error"]))
            yield answer
            if answer.get("end"):
                return

    def _piece(self, offset: int, length: int) -> bytes:
        """Bytes of the file. An outage of its store is raised as it is; other errors are this file's."""
        try:
            return self._read(offset, length)
        except NsnetError:
            raise
        except Exception as error:  # botocore, aiohttp and OS errors share no base; `faults` knows them all
            if errors.kind(error) in (Fault.TRANSIENT, Fault.CREDENTIALS):
                raise
            raise self._error(f"it cannot be read: {errors.reason(error)}") from error

    def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self._guarded(lambda child: child.send(Clock(child.pid, SECONDS), header, payload))

    def _guarded(self, talk: Callable[[Child], Any]) -> Any:
        """What the child says, or the `ContainerError` of how it ended."""
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
            raise self._senseless() from error

    @contextmanager
    def _making_sense(self) -> Iterator[None]:
        """Read an answer of the child, which may have been taken over: whatever it says costs this container alone."""
        try:
            yield
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise self._senseless() from error

    def _checked(self, rows: Any, kinds: tuple[Any, ...]) -> list[list[Any]]:
        """Rows of values of these types. Texts may be names that are no UTF-8, as Python reads them from a disk."""
        if not isinstance(rows, list):
            raise self._senseless()
        for row in rows:
            if not isinstance(row, list) or len(row) != len(kinds) or not all(map(isinstance, row, kinds)):
                raise self._senseless()
            for value in row:
                if isinstance(value, str) and not value.isascii():
                    value.encode("utf-8", "surrogateescape")
        return rows

    def _senseless(self) -> ContainerError:
        return self._error("its reader's answer makes no sense")

    def _error(self, why: str) -> ContainerError:
        return ContainerError(f"{self._name}: {why}")

    def _error_of(self, kind: str, message: str) -> ContainerError:
        """The error that the child's own makes."""
        if kind == "MemoryError":
            return ContainerTooLargeError(f"{self._name}: reading it takes more memory than it may")
        if kind == "TooLargeError":
            return ContainerTooLargeError(f"{self._name}: {message}")
        if kind == ColumnTypeError.__name__:
            return self._error(message.removeprefix(": "))
        return ContainerError(f"{self._name} is no whole{WHAT[self._kind]}: {kind}: {message}")


Plain = str | int | float | bool | None


def _text(value: Any) -> str:
    """What the child says, without lone surrogates, which no table can hold."""
    return str(value)[:400].encode("utf-8", "replace").decode()
