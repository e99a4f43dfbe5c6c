"""Convert a Parquet file to manifest rows: a list of images (`uri`), or stored images (`bytes`, `image`, …)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.console.output import say
from jobs.dataset.containers import Container, Described
from jobs.dataset.folders import SPLIT_FOLDERS
from jobs.dataset.labels import HUGGINGFACE, class_names, is_missing, meanings, number, text, without_label
from jobs.dataset.manifest import HASH, MANIFEST_KEYS, from_values, readable, row, series
from jobs.dataset.path_labels import Labels
from jobs.storage import reading
from jobs.storage.listing import Entry
from nsnet.errors import SourceError

LABELS: Final = ("label", "generator", "split")
GENERATORS: Final = ("generator", "model_name")
"""Columns that name the generator; the first that exists is used."""
IMAGE_COLUMNS: Final = ("bytes", "image", "jpg", "jpeg", "png", "webp", "content", "image_bytes", "image_data", "img")
"""Columns of images, as bytes or as `datasets` stores them (struct of bytes and path); the first is used."""
KEYS: Final = ("image", *MANIFEST_KEYS, *LABELS)
"""Keys of `--column KEY=NAME`."""
PLAIN: Final = (
    "null", "bool", "int", "uint", "half", "float", "double", "decimal", "string", "large_", "binary", "fixed",
)  # fmt: skip
"""Prefixes of the type names that columns of labels and names may have."""
REPEATED: Final = ("uri", "etag", "container", HASH, *LABELS, *GENERATORS)
"""Columns whose texts may repeat."""
MIN_ROW_BYTES: Final = 32
"""Minimum file size per stored image: a small file may declare a billion empty rows."""
MIN_NAMED_BYTES: Final = 1.0
"""The same where rows may name files instead, by paths that compress well."""
MIN_LISTED_BYTES: Final = 0.25
"""Minimum file size per listed image: names with a counter compress well."""


class NoImagesError(SourceError):
    """A readable Parquet file that holds no images."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a file by their role."""

    image: tuple[str, ...] | None
    """Name of the column of stored images, and of its fields of bytes and paths if it is a struct; None: no such
    column."""
    own: dict[str, str]
    """Key (`MANIFEST_KEYS`, `LABELS`) -> name of its column."""


def find_columns(uri: str, described: Described, named: Mapping[str, str]) -> Columns:
    """Find the columns of a file. `named`: the `--column` options. Case is ignored if the result is unambiguous.

    Raises `NoImagesError` if the file has neither a list nor stored images.
    """
    wanted = dict(named)
    own = {
        what: column
        for what in (*MANIFEST_KEYS, *LABELS)
        if (column := _column(uri, described, wanted.get(what, what)))
    }
    if "generator" not in own and (found := _first(uri, described, GENERATORS)):
        own["generator"] = found
    image = None
    if "image" in wanted:
        image = _image(described, _column(uri, described, wanted["image"]))
    elif "container" not in own:  # a split of stored images may also have the images' columns
        image = next((one for name in IMAGE_COLUMNS if (one := _image(described, _column(uri, described, name)))), None)
    if image is None and ("image" in wanted or "uri" not in own):
        present = ", ".join(f"{name} ({kind})" for name, kind in sorted(described.columns.items()))
        raise NoImagesError(
            f"{uri} has neither a `uri` column nor an image column ({', '.join(IMAGE_COLUMNS)}; bytes, or as "
            f"`datasets` stores them), only {present[:500]}: name it with --column image=NAME"
        )
    is_list = "uri" in own and described.columns[own["uri"]].startswith(PLAIN)
    if is_list and image is not None and "image" not in wanted and image[0] != "bytes":
        image = None  # a list with additional thumbnails
    return Columns(image=image, own=own)


def _first(uri: str, described: Described, names: tuple[str, ...]) -> str | None:
    return next((found for name in names if (found := _column(uri, described, name))), None)


def _column(uri: str, described: Described, name: str) -> str | None:
    """The column with this name, else the only one that differs from it only in case."""
    if name in described.columns:
        return name
    candidates = [one for one in described.columns if one.lower() == name.lower()]
    is_doubled = name in described.doubled
    if is_doubled or len(candidates) > 1:
        say(f"warning: {uri}: several columns are called {name!r}: none of them is used")
    return candidates[0] if len(candidates) == 1 and not is_doubled else None


def _image(described: Described, column: str | None) -> tuple[str, ...] | None:
    """The column, and its field if it is a struct; None if it holds no images."""
    return None if column is None else described.images.get(column)


def _min_row_bytes(columns: Columns) -> float:
    """Minimum file size per row."""
    if columns.image is None:
        return MIN_LISTED_BYTES
    return MIN_NAMED_BYTES if len(columns.image) > 2 else MIN_ROW_BYTES


class Table:
    """A Parquet file as a part of a source."""

    def __init__(self, entry: Entry, named: Mapping[str, str], folder: Labels, classes: set[str]) -> None:
        """`named`: the `--column` options; `folder`: labels from the file's own folders.

        `classes`: receives the series of a file whose numbers are not labels.
        """
        self.uri, self._entry, self._named, self._folder = entry.uri, entry, named, folder
        self._classes = classes
        self._numbers: str | None = None
        """The series, if labels are numbers without names."""
        self._warned_of_split = False

    def rows(self, strict: bool) -> Iterator[dict[str, Any]]:
        """Manifest rows. Raises `ContainerError` or `SourceError`.

        `strict`: the file is the source itself. Otherwise it is one of many files, and no URI in it is trusted, of a
        list or of stored images: anyone who can add a file to the bucket could make this job read anything that it may.
        """
        entry = self._entry
        with Container(self.uri, "parquet", entry.size_bytes, reading.reader(self.uri)) as container:
            described = container.describe(REPEATED)
            columns = find_columns(self.uri, described, self._named)
            stored = columns.image is not None
            if not stored and not strict:
                raise NoImagesError(f"{self.uri} is a list of images: a list is read only if it is the source itself")
            if described.rows * _min_row_bytes(columns) > entry.size_bytes:
                verb = "hold" if stored else "list"
                raise SourceError(
                    f"{self.uri} claims to {verb} {described.rows:,} images in {entry.size_bytes:,} bytes, which is "
                    "impossible: write the file again"
                )
            key_columns = self._key_columns(described, columns)
            labels = self._meanings(container, described, key_columns.get("label"))
            value_rows = container.rows(sorted({*key_columns.values()}), described.rows)
            for number, values in enumerate(value_rows):
                row_values = {what: values[name] for what, name in key_columns.items()}
                row_labels = self._labels(row_values, labels)
                if columns.image is None:
                    yield from_values(row_values, self.uri, number, **row_labels)
                    continue
                name = row_values.get("uri")
                uri = f"{self.uri}#{number}" if is_missing(name) or not strict else readable(str(name))
                yield row(
                    uri, f"{entry.etag}-{number}", None, listed=True, modified_at=entry.modified_at,
                    container=self.uri, position=number, column=columns.image[0], **row_labels,
                )  # fmt: skip

    def _key_columns(self, described: Described, columns: Columns) -> dict[str, str]:
        """Key -> column to read. Beside stored images, a column of an unsupported type is skipped with a warning."""
        if columns.image is None:
            return columns.own
        key_columns = {what: name for what, name in columns.own.items() if what in ("uri", *LABELS)}
        for what, name in list(key_columns.items()):
            if not (kind := described.columns[name]).startswith(PLAIN):
                say(f"warning: {self.uri}: its column `{name}` is of type {kind[:80]} and is not read")
                del key_columns[what]
        return key_columns

    def _meanings(self, container: Container, described: Described, column: str | None) -> Mapping[Any, int]:
        """Value of the label column -> label; other values have no label."""
        if column is None:
            return {}
        names: list[str] | None
        try:
            names = class_names({HUGGINGFACE: described.features}, column)
        except SourceError as error:
            say(f"warning: {self.uri}: {error}: numbers in `{column}` are not used as labels")
            names = []
        values = container.distinct(column)
        column_labels = None if values is None else meanings(values, names)
        if column_labels is None:
            say(
                f"warning: {self.uri}: its column `{column}` holds other values than real and fake, or 0 and 1: they "
                "are not used as labels"
            )
            self._classes.add(series(self.uri))
        elif names != [] and (strange := without_label(values or (), column_labels, names)):
            say(f"warning: {self.uri}: its labels {strange} are neither real nor fake: their images have no label")
        self._numbers = series(self.uri) if names is None else None
        return column_labels or {}

    def _labels(self, row_values: dict[str, Any], labels: Mapping[Any, int]) -> dict[str, Any]:
        """Label, generator and split of a row: from its columns, else from the file's folders."""
        own = {
            "label": labels.get(row_values.get("label")),
            "generator": text(row_values.get("generator")),
            "split": self._split(text(row_values.get("split"))),
        }
        merged = {
            name: getattr(self._folder, name) if value is None and name not in row_values else value
            for name, value in own.items()
        }
        own_labels = {"label", "generator"} & row_values.keys()  # the layout of all folders must not override them
        is_number = own["label"] is not None and number(row_values["label"]) is not None
        return merged | {
            "folder": None if own_labels else self._folder.folder,
            "series": self._numbers if is_number else None,
        }

    def _split(self, name: str | None) -> str | None:
        """The split named by a column's value; an unknown name counts as none, with one warning."""
        split = SPLIT_FOLDERS.get((name or "").strip().lower())
        if name is not None and split is None and not self._warned_of_split:
            self._warned_of_split = True
            say(f"warning: {self.uri}: split {name[:40]!r} is none of {', '.join(SPLIT_FOLDERS)}: it counts as none")
        return split
