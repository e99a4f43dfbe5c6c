"""Rows of a Parquet file to manifest rows: a list of images (`uri`), or images that it stores (`bytes`, `image`, …)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.console.output import say
from jobs.dataset.containers import Container, Described
from jobs.dataset.folders import SPLIT_FOLDERS
from jobs.dataset.labels import HUGGINGFACE, class_names, is_missing, meanings, number, text, without_label
from jobs.dataset.manifest import FACTS, HASH, from_values, readable, row, series
from jobs.dataset.path_labels import Labels
from jobs.storage import reading
from jobs.storage.listing import Entry
from nsnet.errors import SourceError

LABELS: Final = ("label", "generator", "split")
GENERATORS: Final = ("generator", "model_name")
"""Columns that name the generator; the first that is there."""
IMAGES: Final = ("bytes", "image", "jpg", "jpeg", "png", "webp", "content", "image_bytes", "image_data", "img")
"""Columns that hold images, as bytes or as `datasets` stores them (struct of bytes and path); the first one counts."""
KEYS: Final = ("image", *FACTS, *LABELS)
"""What `--column` gives a name."""
PLAIN: Final = (
    "null", "bool", "int", "uint", "half", "float", "double", "decimal", "string", "large_", "binary", "fixed",
)  # fmt: skip
"""How the names of types begin that labels and names may have."""
REPEATED: Final = ("uri", "etag", "container", HASH, *LABELS, *GENERATORS)
"""Columns of texts that repeat."""
MIN_ROW_BYTES: Final = 32
"""Fewest bytes of a file for each image in it: a small file may hold a billion rows of nothing."""
MIN_LISTED_BYTES: Final = 0.25
"""Fewest bytes of a file for each image that it lists: names with a counter in them compress well."""


class NoImagesError(SourceError):
    """A Parquet file that can be read, and is no container of images."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of a file holds what; None: none does."""

    image: tuple[str, ...] | None
    """Name of the column of stored images, and of the field in it where it is a struct."""
    own: dict[str, str]
    """What is asked for (`FACTS`, `LABELS`) -> name of the column."""


def find_columns(uri: str, described: Described, named: Mapping[str, str]) -> Columns:
    """The columns of a file. `named`: what `--column` says. Names are compared without case where that is unambiguous.

    Raises `NoImagesError` where there is neither a list nor stored images.
    """
    wanted = dict(named)
    own = {what: column for what in (*FACTS, *LABELS) if (column := _column(uri, described, wanted.get(what, what)))}
    if "generator" not in own and (found := _first(uri, described, GENERATORS)):
        own["generator"] = found
    image = None
    if "image" in wanted:
        image = _image(described, _column(uri, described, wanted["image"]))
    elif "container" not in own:  # a split of stored images may carry what the images' table had
        image = next((one for name in IMAGES if (one := _image(described, _column(uri, described, name)))), None)
    if image is None and ("image" in wanted or "uri" not in own):
        there = ", ".join(f"{name} ({kind})" for name, kind in sorted(described.columns.items()))
        raise NoImagesError(
            f"{uri} has neither a `uri` column nor one of images ({', '.join(IMAGES)}; bytes, or as `datasets` stores "
            f"them), only {there[:500]}: name it with --column image=NAME"
        )
    is_list = "uri" in own and described.columns[own["uri"]].startswith(PLAIN)
    if is_list and image is not None and "image" not in wanted and image[0] != "bytes":
        image = None  # a list that has thumbnails or the like beside
    return Columns(image=image, own=own)


def _first(uri: str, described: Described, names: tuple[str, ...]) -> str | None:
    return next((found for name in names if (found := _column(uri, described, name))), None)


def _column(uri: str, described: Described, name: str) -> str | None:
    """The column of a name, else the only one that differs from it in case."""
    if name in described.columns:
        return name
    alike = [one for one in described.columns if one.lower() == name.lower()]
    twice = name in described.doubled
    if twice or len(alike) > 1:
        say(f"warning: {uri}: several columns are called {name!r}: none of them is read")
    return alike[0] if len(alike) == 1 and not twice else None


def _image(described: Described, column: str | None) -> tuple[str, ...] | None:
    """The column, and the field where it is a struct, if it holds images."""
    return None if column is None else described.images.get(column)


class Table:
    """A Parquet file as a part of a source."""

    def __init__(self, entry: Entry, named: Mapping[str, str], folder: Labels, classes: set[str]) -> None:
        """`named`: what `--column` says; `folder`: what the folders say that it lies in.

        `classes`: takes up the series of a file whose numbers are no labels.
        """
        self.uri, self._entry, self._named, self._folder = entry.uri, entry, named, folder
        self._classes = classes
        self._numbers: str | None = None
        """The series, where labels are numbers without a name."""
        self._warned_of_split = False

    def rows(self, strict: bool) -> Iterator[dict[str, Any]]:
        """Manifest rows. Raises `ContainerError` or `SourceError`.

        `strict`: the file is the source itself. Else it lies among others, and no URI in it is believed, neither of a
        list nor of stored images: whoever may put a file into a bucket could have anything read that this job may read.
        """
        entry = self._entry
        with Container(self.uri, "parquet", entry.size_bytes, reading.reader(self.uri)) as container:
            described = container.describe(REPEATED)
            columns = find_columns(self.uri, described, self._named)
            stored = columns.image is not None
            if not stored and not strict:
                raise NoImagesError(f"{self.uri} is a list of images: such are followed only where they are the source")
            if described.rows * (MIN_ROW_BYTES if stored else MIN_LISTED_BYTES) > entry.size_bytes:
                verb = "hold" if stored else "list"
                raise SourceError(
                    f"{self.uri} says that its {entry.size_bytes:,} bytes {verb} {described.rows:,} images: impossible"
                )
            asked = self._asked(described, columns)
            labels = self._meanings(container, described, asked.get("label"))
            found = container.rows(sorted({*asked.values()}), described.rows)
            for number, values in enumerate(found):
                given = {what: values[name] for what, name in asked.items()}
                said = self._labels(given, labels)
                if columns.image is None:
                    yield from_values(given, self.uri, number, **said)
                    continue
                name = given.get("uri")
                uri = f"{self.uri}#{number}" if is_missing(name) or not strict else readable(str(name))
                yield row(
                    uri, f"{entry.etag}-{number}", None, listed=True, modified_at=entry.modified_at,
                    container=self.uri, position=number, column=columns.image[0], **said,
                )  # fmt: skip

    def _asked(self, described: Described, columns: Columns) -> dict[str, str]:
        """The columns that are read. What is beside an image, and of no type that is read, does not cost the image."""
        if columns.image is None:
            return columns.own
        asked = {what: name for what, name in columns.own.items() if what in ("uri", *LABELS)}
        for what, name in list(asked.items()):
            if not (kind := described.columns[name]).startswith(PLAIN):
                say(f"warning: {self.uri}: its column `{name}` is of type {kind[:80]}, and is not read")
                del asked[what]
        return asked

    def _meanings(self, container: Container, described: Described, column: str | None) -> Mapping[Any, int]:
        """Value of the label column -> label; what it does not have is none."""
        if column is None:
            return {}
        names = class_names({HUGGINGFACE: described.features}, column)
        values = container.distinct(column)
        found = None if values is None else meanings(values, names)
        if found is None:
            say(
                f"warning: {self.uri}: its column `{column}` holds other values than real and fake, or 0 and 1: it is "
                "not taken for labels"
            )
            self._classes.add(series(self.uri))
        elif strange := without_label(values or (), found, names):
            say(f"warning: {self.uri}: its labels {strange} are neither real nor fake: their images have no label")
        self._numbers = series(self.uri) if names is None else None
        return found or {}

    def _labels(self, given: dict[str, Any], labels: Mapping[Any, int]) -> dict[str, Any]:
        """Label, generator and split of a row: its own, else what the folders of the file say."""
        own = {
            "label": labels.get(given.get("label")),
            "generator": text(given.get("generator")),
            "split": self._split(text(given.get("split"))),
        }
        said = {
            name: getattr(self._folder, name) if value is None and name not in given else value
            for name, value in own.items()
        }
        own_labels = {"label", "generator"} & given.keys()  # what folders say together must not override them
        is_number = own["label"] is not None and number(given["label"]) is not None
        return said | {
            "folder": None if own_labels else self._folder.folder,
            "series": self._numbers if is_number else None,
        }

    def _split(self, name: str | None) -> str | None:
        """The split that a column says; of another word it is said once that it counts as none."""
        found = SPLIT_FOLDERS.get((name or "").strip().lower())
        if name is not None and found is None and not self._warned_of_split:
            self._warned_of_split = True
            say(f"warning: {self.uri}: split {name[:40]!r} is none of {', '.join(SPLIT_FOLDERS)}, and counts as none")
        return found
