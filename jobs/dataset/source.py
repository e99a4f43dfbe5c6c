"""List a source as manifest rows: a folder or `s3://` prefix, a Parquet manifest, image Parquet, WebDataset tars.

Objects left out are counted by reason. `tars`, `tables` and `manifest` handle containers and lists; `path_labels`,
`benchmarks` and `labels` determine labels.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from jobs.console.output import say
from jobs.dataset import tars
from jobs.dataset.endings import SIDECARS, is_hidden, what_it_is
from jobs.dataset.manifest import CONTAINERS, readable, row
from jobs.dataset.path_labels import Labels, labels_from_path
from jobs.dataset.tables import NoImagesError, Table
from jobs.storage import listing, probes
from jobs.storage.left_out import LeftOut
from jobs.storage.uris import Uri
from nsnet.errors import SourceError

NO_LABELS = Labels(None, None, None, None)


class Source:
    """A stream of manifest rows, with counts of what was left out.

    `include`, `exclude`: globs over the path below the source (in a manifest, over the whole URI), where `*` also
    matches `/`: an image is selected if it matches one of `include` (none given: all) and none of `exclude`. A file
    with an ending of `endings.SIDECARS` is tried as an image only if `include` names that ending, such as `*.txt`.
    `columns`: key of `tables.KEYS` -> name of the Parquet column, if it is not the key.
    """

    def __init__(
        self,
        uri: Uri,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.uri = uri
        self._columns = columns or {}
        self._include, self._exclude = _globs(include), _globs(exclude)
        self._sidecars = SIDECARS - {PurePosixPath(pattern).suffix.lower() for pattern in include}
        self.classes: set[str] = set()
        """Series of containers (`manifest.series`) whose numbers are classes, not labels."""
        self.left_out = LeftOut()
        """Reason -> number of objects that are not images or could not be read."""

    def check(self) -> None:
        """Raise `SourceError` or `StorageError` unless the source exists; lists nothing."""
        probes.reachable(self.uri)
        if self._is_file():
            if not listing.exists(self.uri):
                raise SourceError(f"there is no source {self.uri}")
        elif not listing.is_folder(self.uri):
            if not listing.exists(self.uri):
                raise SourceError(f"there is no folder or prefix {self.uri}")
            kind = what_it_is(self.uri)
            hint = f"it is {kind}" if kind else "a source is a folder; for a single image use nsnet predict"
            raise SourceError(f"{self.uri} is a file that is not a source: {hint}")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Manifest rows (`schema.MANIFEST`) with the `folder` of their labels (`path_labels.Labels`), if any.

        Raises what `check` raises.
        """
        self.check()
        if not self._is_file():
            rows = self._folder(self.uri)
        elif self.uri.lower().endswith(".tar"):
            rows = tars.rows(listing.describe(self.uri), self._sidecars, self.left_out, self.classes)
        else:
            rows = Table(listing.describe(self.uri), self._columns, NO_LABELS, self.classes).rows(strict=True)
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
        # Spark and Ray write `x.parquet` as a folder
        return self.uri.lower().endswith((".parquet", ".tar")) and not listing.is_folder(self.uri)

    def _folder(self, uri: str) -> Iterator[dict[str, Any]]:
        prefix = uri.rstrip("/") + "/"
        for entry in listing.list_files(uri, self.left_out):
            relative = entry.uri.removeprefix(prefix)
            name = PurePosixPath(relative).name
            ending = PurePosixPath(name).suffix.lower()
            if is_hidden(relative):
                self.left_out["hidden file"] += 1
            elif entry.uri.endswith("/") or (entry.size_bytes == 0 and not ending):
                self.left_out["empty marker object"] += 1
            elif readable(entry.uri) != entry.uri:
                self.left_out["name that is no UTF-8"] += 1
            elif ending in CONTAINERS:
                if self._exclude and self._exclude.fullmatch(relative):
                    self.left_out["excluded"] += 1
                else:
                    yield from self._inside(entry, relative)
            elif ending in self._sidecars:
                self.left_out[f"{ending} is no picture"] += 1  # a key of records: its words stay
            else:
                yield row(
                    entry.uri, entry.etag, entry.size_bytes, listed=True, modified_at=entry.modified_at,
                    **labels_from_path(relative, uri)._asdict(),
                )  # fmt: skip

    def _inside(self, entry: listing.Entry, relative: str) -> Iterator[dict[str, Any]]:
        """Images of one container in a folder; an unreadable container is left out with a warning.

        In a folder that is named like a container, as Spark and Ray write them, it is an error.
        """
        strict = self.uri.lower().endswith(CONTAINERS)
        ending = PurePosixPath(relative).suffix.lower()
        try:
            if ending == ".tar":
                folder = relative.rpartition("/")[0]
                yield from tars.rows(entry, self._sidecars, self.left_out, self.classes, folder)
            else:
                yield from Table(entry, self._columns, labels_from_path(relative, self.uri), self.classes).rows(strict)
        except NoImagesError as error:
            if strict:
                raise
            self.left_out[f"{ending} without pictures"] += 1
            say(f"left out: {error}")
        except SourceError as error:
            if strict:
                raise
            self.left_out.add_unread(f"{ending} that cannot be read", str(error))
            say(f"warning: left out: {error}")


def _globs(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """Compile the patterns to one expression that matches any of them; None: no patterns."""
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns)) if patterns else None
