"""A source to manifest rows: a folder or `s3://` prefix, a Parquet manifest, image Parquet, WebDataset tars.

Labels come from folders (`layouts`) or from `label` and `generator` columns. What a listing leaves out is counted by
reason, never silent.
"""

import bisect
import fnmatch
import hashlib
import itertools
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs import faults, storage
from jobs.console import say
from jobs.faults import Fault
from jobs.layouts import SPLIT_FOLDERS, Labels, labels_from_path
from jobs.left_out import LeftOut
from jobs.parquet import BATCH_ROWS
from jobs.parquet_file import ParquetFile
from jobs.schema import MANIFEST
from jobs.storage import Fetched
from nsnet.errors import ImageTooLargeError, SourceError, UsageError

LABEL_NAMES: Final = {"0": 0, "real": 0, "1": 1, "fake": 1}

SIDECARS: Final = frozenset(
    ".7z .arrow .bz2 .cfg .ckpt .css .csv .feather .gz .h5 .htm .html .ini .ipynb .js .json .jsonl .lock .log .md .npy "
    ".npz .parquet .pickle .pkl .pt .pth .py .rar .rst .safetensors .sh .sha256 .sqlite .tar .tgz .toml .tsv .txt .xml "
    ".xz .yaml .yml .zip .zst"
    .split()
)  # fmt: skip
"""Endings of what lies beside the pictures of data sets. Any other name, known or not, is tried by its content."""

TEXTS: Final = frozenset({"uri", "etag", "label", "generator", "split"})
"""Columns of a manifest, or beside stored pictures, that may be texts; what repeats there stays stored once."""
INSIDE: Final = frozenset({"container", "position"})
"""Columns of a manifest whose pictures lie in a tar or in Parquet, as those that a split is stored as."""
HASH: Final = "content_hash"
"""Column of a manifest with the SHA-256 that a file must have; a stored picture comes with its own bytes."""
TEXT_BYTES: Final = 8192
"""Longest of them: a small file may hold a long one a million times."""
GROUP_BYTES: Final = 2 * 2**30
"""Most bytes of the pictures in a row group, which is read as a whole."""
LEAST_ROW_BYTES: Final = 32
"""Fewest bytes of a file for each picture in it: a small file may hold a billion rows of nothing."""
NAME_BYTES: Final = 1024
"""Longest name of a tar's member, S3's limit for keys: one header may name all members that follow."""

CONTAINERS: Final = (".tar", ".parquet")
"""Endings of files that hold pictures."""


def image_id(uri: str, etag: str) -> str:
    """Identity of a version of an object: 32 hexadecimal digits of SHA-256 over URI and version."""
    return hashlib.sha256(f"{uri}\0{etag}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


class Source:
    """A stream of manifest rows, and what was left out of it.

    `include`, `exclude`: globs over the path below the source (over the whole URI in a manifest), where `*` also
    matches `/`: a picture is taken if it matches one of `include` (none: all) and none of `exclude`. What lies beside
    pictures by its ending (`SIDECARS`) is tried where `include` names that ending, such as `*.txt`.
    """

    def __init__(self, uri: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self.uri = storage.absolute(uri)
        self._include, self._exclude = _globs(include), _globs(exclude)
        self._sidecars = SIDECARS - {PurePosixPath(pattern).suffix.lower() for pattern in include}
        self._warned_of_split = False
        self.left_out = LeftOut()
        """Reason -> number of objects that are no pictures, and what could not be read."""

    def check(self) -> None:
        """Raise `SourceError` or `StorageError` unless there is such a source; lists nothing."""
        storage.reachable(self.uri)
        if self._is_file():
            if not storage.exists(self.uri):
                raise SourceError(f"there is no source {self.uri}")
        elif not storage.is_folder(self.uri):
            hint = "; a source is a folder, for a single picture see nsnet predict" if storage.exists(self.uri) else ""
            raise SourceError(f"there is no folder or prefix {self.uri}{hint}")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Manifest rows (`schema.MANIFEST`) with the `folder` that their labels come from (`layouts.Labels`), if any.

        Raises what `check` raises.
        """
        self.check()
        if not self._is_file():
            rows = self._folder(self.uri)
        elif self.uri.lower().endswith(".tar"):
            rows = self._tar(storage.describe(self.uri))
        else:
            rows = self._parquet(self.uri)
        return filter(self._wanted, rows) if self._include or self._exclude else rows

    def _wanted(self, row: dict[str, Any]) -> bool:
        path = row["uri"]
        if path.startswith((f"{self.uri}/", f"{self.uri}#")):
            path = path[len(self.uri) + 1 :]
        if self._exclude and self._exclude.fullmatch(path):
            self.left_out["excluded"] += 1
            return False
        if self._include and not self._include.fullmatch(path):
            self.left_out["not included"] += 1
            return False
        return True

    def _is_file(self) -> bool:
        # Spark's and Ray's `x.parquet` is a folder
        return self.uri.lower().endswith((".parquet", ".tar")) and not storage.is_folder(self.uri)

    def _folder(self, uri: str) -> Iterator[dict[str, Any]]:
        prefix = uri.rstrip("/") + "/"
        for entry in storage.list_files(uri, self.left_out):
            relative = entry.uri.removeprefix(prefix)
            name = PurePosixPath(relative).name
            ending = PurePosixPath(name).suffix.lower()
            if name.startswith("."):
                self.left_out["hidden file"] += 1
            elif entry.uri.endswith("/") or (entry.size_bytes == 0 and not ending):
                self.left_out["empty marker object"] += 1
            elif _unicode(entry.uri) != entry.uri:
                self.left_out["name that is no UTF-8"] += 1
            elif ending in CONTAINERS:
                if self._exclude and self._exclude.fullmatch(relative):
                    self.left_out["excluded"] += 1
                else:
                    yield from self._inside(entry, ending)
            elif ending in self._sidecars:
                self.left_out[f"{ending} is no picture"] += 1
            else:
                yield _row(
                    entry.uri, entry.etag, entry.size_bytes, listed=True, modified_at=entry.modified_at,
                    **labels_from_path(relative, uri)._asdict(),
                )  # fmt: skip

    def _inside(self, entry: storage.Entry, ending: str) -> Iterator[dict[str, Any]]:
        """Pictures of a container that lies among others: one that cannot be read must not stop the rest.

        In a folder that is named like a container, as Spark and Ray write them, each part must be one.
        """
        strict = self.uri.lower().endswith(CONTAINERS)
        try:
            yield from self._tar(entry, strict) if ending == ".tar" else self._parquet(entry.uri, strict)
        except SourceError as error:
            if strict:
                raise
            self.left_out.add_unread(f"{ending} that cannot be read", str(error))
            say(f"warning: left out: {error}")

    def _tar(self, entry: storage.Entry, strict: bool = True) -> Iterator[dict[str, Any]]:
        """Members of an uncompressed WebDataset tar; `x.cls` beside `x.jpg` may hold the label.

        Not `strict`: a label that is neither real nor fake counts as none.
        """
        system, path = storage.filesystem(entry.uri)
        labels: dict[str, int | None] = {}
        members: list[tuple[str, int, int]] = []
        with (
            _reading(entry.uri, ", uncompressed tar"),
            system.open(path, "rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.size < 0 or len(member.name) > NAME_BYTES:
                    raise tarfile.ReadError(f"a member has {member.size:,} bytes and a name of {len(member.name):,}")
                ending = PurePosixPath(member.name).suffix.lower()
                if member.isdir():
                    continue
                if not member.isfile():
                    self.left_out["link or special file in a tar"] += 1
                elif PurePosixPath(member.name).name.startswith("."):
                    self.left_out["hidden file"] += 1
                elif ending == ".cls" and member.size < 64:
                    content = tar.extractfile(member)
                    text = content.read().decode().strip() if content else None
                    labels[_stem(member.name)] = _label(text, f"{entry.uri}#{member.name}", strict)
                elif ending in self._sidecars or ending == ".cls":
                    self.left_out[f"{ending} is no picture"] += 1
                else:
                    members.append((_unicode(member.name), member.offset_data, member.size))
            # tarfile takes a damaged or missing header for the end; a whole tar ends with a block of zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it is damaged or cut off at byte {tar.offset:,}")
        for name, offset, size in members:
            told = labels_from_path(name)
            if (stem := _stem(name)) in labels:
                told = told._replace(label=labels[stem], folder=None)
            yield _row(
                f"{entry.uri}#{name}", entry.etag, size, listed=True, modified_at=entry.modified_at,
                container=entry.uri, position=offset, **told._asdict(),
            )  # fmt: skip

    def _parquet(self, uri: str, strict: bool = True) -> Iterator[dict[str, Any]]:
        """A manifest (`uri` column) or image Parquet (`bytes`); `label`, `generator`, `split`, `etag` are optional, and
        `content_hash`, `size_bytes`, `container` and `position` of a manifest.

        Not `strict`: a label that is neither real nor fake counts as none, and no URI is believed, neither of a list
        nor of stored pictures: whoever may put a file into a bucket could have anything read that this job may read.
        """
        with _reading(uri, " Parquet file"):
            file = ParquetFile(storage.open_file(uri), uri, TEXTS | {HASH, "container"})
        columns = set(file.schema.names)
        if not columns & {"uri", "bytes"}:
            raise SourceError(f"{uri} has neither a `uri` nor a `bytes` column, only {', '.join(sorted(columns))}")
        stored = "bytes" in columns
        if not stored and not strict:
            raise SourceError(f"{uri} is a manifest: they are followed only where they are the source themselves")
        if stored and (rows := file.rows) * LEAST_ROW_BYTES > file.size_bytes:
            raise SourceError(f"{uri} says that its {file.size_bytes:,} bytes hold {rows:,} pictures: that cannot be")
        own = storage.describe(uri) if stored else None
        wanted = sorted(columns & (TEXTS if stored else TEXTS | INSIDE | {"size_bytes", HASH}))
        file.check_plain(wanted)
        position = 0
        for some in _table_rows(uri, file, wanted):
            for values in some:
                name = values.get("uri")
                labels: dict[str, Any] = {
                    "label": _label(values.get("label"), f"{uri}: row {position}", strict),
                    "generator": _text(values.get("generator")),
                    "split": self._split(values.get("split")),
                }
                if own is not None:
                    # a file among others may not speak for pictures that are not in it
                    row_uri = f"{uri}#{position}" if name is None or not strict else str(name)
                    yield _row(
                        row_uri, f"{own.etag}-{position}", None, listed=True, modified_at=own.modified_at,
                        container=uri, position=position, **labels,
                    )  # fmt: skip
                else:
                    where = f"{uri}: row {position}"
                    etag, size = _text(values.get("etag")) or "", _size(values.get("size_bytes"), where)
                    expected = _hash(values.get(HASH), where)
                    inside = _inside_of(values, size, uri, where)
                    # inside a container the URI is a name, which a data set may have chosen
                    row_uri = str(name) if inside and name is not None else _place(name, uri, where)
                    yield _row(row_uri, etag, size, expected_hash=expected, **inside, **labels)
                position += 1

    def _split(self, value: Any) -> str | None:
        """The split that a column says, or nothing; of another word it is said once that it counts as nothing."""
        text = "" if value is None or value != value else str(value).strip().lower()  # pandas writes NaN for nothing
        if text and text not in SPLIT_FOLDERS and not self._warned_of_split:
            self._warned_of_split = True
            say(f"warning: {self.uri}: split {text[:40]!r} is none of {', '.join(SPLIT_FOLDERS)}, and counts as none")
        return SPLIT_FOLDERS.get(text)


@contextmanager
def _reading(uri: str, what: str) -> Iterator[None]:
    """Turns what a damaged container raises into a `SourceError`; errors of its store stay what they are."""
    try:
        yield
    except (ValueError, OverflowError, EOFError, RecursionError, tarfile.TarError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and faults.kind(error) in (Fault.TRANSIENT, Fault.CREDENTIALS):
            raise
        raise SourceError(f"{uri} is no whole{what}: {faults.reason(error)}") from error


def _table_rows(uri: str, file: ParquetFile, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Some columns of a Parquet file that may be damaged, as rows."""
    with _reading(uri, " Parquet file"):
        for batch in file.batches(columns, batch_rows=BATCH_ROWS):
            _check_texts(uri, batch)
            yield batch.to_pylist() if columns else [{} for _ in range(batch.num_rows)]


def _is_text(kind: pa.DataType) -> bool:
    which = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_such(kind) for is_such in which)


def _check_texts(uri: str, batch: pa.RecordBatch) -> None:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        texts = column.dictionary if pa.types.is_dictionary(column.type) else column
        if _is_text(texts.type):
            longest = pc.max(pc.binary_length(texts)).as_py() or 0
            if longest > TEXT_BYTES:
                raise SourceError(
                    f"{uri}: a text of column `{name}` has {longest:,} bytes, the limit is {TEXT_BYTES:,}"
                )


def fetch(row: dict[str, Any], max_bytes: int) -> Fetched:
    """The bytes of a manifest row's picture; at most one byte more than allowed, so that the caller sees the excess.

    Raises a `FetchError`, as where a picture was replaced since it was listed, or an `ImageTooLargeError`.
    """
    container, position, size = row["container"], row["position"], row["size_bytes"]
    etag = row["etag"] if row["listed"] else None
    if container is None:
        # how much is asked for also says how long it may take; a manifest's sizes may be wrong
        known = size if row["listed"] and size is not None else max_bytes
        return storage.fetch(row["uri"], 0, min(known, max_bytes) + 1, etag)
    if container.lower().endswith(".tar"):
        return storage.fetch(container, position, min(size, max_bytes + 1), etag)
    return storage.with_retries(
        lambda: (_from_parquet(container, position, row["etag"])[: max_bytes + 1], 0), container
    )


_READING_PARQUET: Final = threading.Lock()
"""One thread reads a row group, the others wait for it."""


def _from_parquet(container: str, position: int, etag: str) -> bytes:
    version = etag.rpartition("-")[0]
    with _READING_PARQUET:
        ends = _group_ends(container, version)
        group = bisect.bisect_right(ends, position)
        pictures = _group_bytes(container, version, group)
    if pictures is None:
        raise ImageTooLargeError(
            f"its row group of {container} holds more than {GROUP_BYTES:,} bytes: write smaller ones"
        )
    return bytes(pictures[position - (ends[group - 1] if group else 0)] or b"")


@lru_cache(maxsize=16)
def _group_ends(container: str, version: str) -> list[int]:
    """Row numbers at which the row groups of a version of a Parquet file end."""
    return list(itertools.accumulate(_open_parquet(container, version).group_rows()))


@lru_cache(maxsize=1)
def _group_bytes(container: str, version: str, group: int) -> list[bytes] | None:
    """The pictures of a row group, or None if they are too large together.

    Parquet is read by whole groups; neighbours of a picture are asked for next. One by one, since what repeats is
    stored once: a small file may hold a large picture a million times.
    """
    pictures: list[bytes] = []
    size = 0
    for batch in _open_parquet(container, version).batches(["bytes"], batch_rows=1, groups=[group]):
        pictures += batch.column(0).to_pylist()
        size += batch.nbytes
        if size > GROUP_BYTES:
            return None
    return pictures


def _open_parquet(container: str, version: str) -> ParquetFile:
    if storage.describe(container).etag != version:
        raise faults.ChangedError(f"{container} was replaced since it was listed")
    return ParquetFile(storage.open_file(container), container)


_EMPTY_ROW: Final = dict.fromkeys((*MANIFEST.names, *Labels._fields))


def _row(uri: str, etag: str, size_bytes: int | None, *, listed: bool = False, **values: Any) -> dict[str, Any]:
    row = {"image_id": image_id(uri, etag), "uri": uri, "etag": etag, "size_bytes": size_bytes, "listed": listed}
    return {**_EMPTY_ROW, **row, **values}


def _place(name: Any, manifest: str, where: str) -> str:
    """The URI of a row of a manifest."""
    if name is None:
        raise SourceError(f"{where} has no uri")
    try:
        uri = storage.absolute(str(name))
    except UsageError as error:
        raise SourceError(f"{where}: {error}") from error
    if storage.is_local(uri) and not storage.is_local(manifest):
        raise SourceError(f"{where} names {uri} on this machine's disk: a manifest in a bucket may name buckets only")
    return uri


def _inside_of(values: dict[str, Any], size: int | None, manifest: str, where: str) -> dict[str, Any]:
    """The file that holds the picture of a manifest's row, and where in it, or nothing."""
    if (container := values.get("container")) is None or "position" not in values:
        return {}  # other tables have such columns, too
    position = _size(values["position"], where, "position")
    container = _place(container, manifest, where)
    ending = PurePosixPath(container).suffix.lower()
    if ending not in CONTAINERS or position is None or (size is None and ending == ".tar"):
        raise SourceError(
            f"{where}: a picture in {container[:200]!r} needs a container that ends in {' or '.join(CONTAINERS)}, a "
            "position, and in a tar its size_bytes"
        )
    return {"container": container, "position": position}


def _size(value: Any, where: str, name: str = "size_bytes") -> int | None:
    """A number of bytes, or nothing."""
    if value is None or value == "" or value != value:  # pandas writes NaN for nothing
        return None
    try:
        size = int(value)
    except (ValueError, OverflowError, TypeError):
        size = -1
    if not 0 <= size < 2**63:
        raise SourceError(f"{where}: {name} {value!r} is no number of bytes")
    return size


def _hash(value: Any, where: str) -> str | None:
    """64 hexadecimal digits, small, or nothing."""
    if value is None or value == "" or value != value:  # pandas writes NaN for nothing
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", str(value)):
        raise SourceError(f"{where}: {HASH} {str(value)[:80]!r} is no SHA-256 of 64 hexadecimal digits")
    return str(value).lower()


def _label(value: Any, where: str, strict: bool) -> int | None:
    """0, 1, real, fake (also as text) or nothing; anything else is no guess, but an error or (not `strict`) nothing."""
    if value is None or value == "" or value != value:  # pandas writes NaN for nothing
        return None
    label = LABEL_NAMES.get(f"{value:g}" if isinstance(value, float | bool) else str(value).strip().lower())
    if label is None and strict:
        raise SourceError(f"{where}: label {value!r} is neither 0/real nor 1/fake")
    return label


def _globs(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """One expression for paths that match any of the patterns."""
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns)) if patterns else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _unicode(name: str) -> str:
    """A name with bytes that are no UTF-8 written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _stem(name: str) -> str:
    """The WebDataset key: the name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"
