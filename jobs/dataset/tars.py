"""Convert the members of a WebDataset tar to manifest rows."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Final

from jobs.console.output import say
from jobs.dataset.containers import Container, Member
from jobs.dataset.endings import IMAGE_ENDINGS, is_hidden
from jobs.dataset.labels import meanings, number, without_label
from jobs.dataset.manifest import readable, row, series
from jobs.dataset.path_labels import labels_from_path
from jobs.storage import reading
from jobs.storage.left_out import LeftOut
from jobs.storage.listing import Entry

SIDECARS: Final = frozenset(
    ".__url__ .caption .cbor .cls .cls2 .height .id .index .inx .jsn .label .mp .msg .msgpack .pb .pickle .prompt .pyd "
    ".ten .tb .text .transcript .url .width"
    .split()
)  # fmt: skip
"""Endings of texts, numbers and Python objects in webdataset's decoders."""


def rows(
    entry: Entry, sidecars: frozenset[str], left_out: LeftOut, classes: set[str], folder: str = ""
) -> Iterator[dict[str, Any]]:
    """Manifest rows of an uncompressed tar's images. Raises `ContainerError` if it is damaged or truncated.

    `sidecars`: endings of files that are not images. `classes`: receives the series of tars whose `.cls` members are
    not labels. `folder`: the tar's folder below the source, put before its members' paths. `x.cls` beside `x.jpg`
    holds the label. Of members with the same name the last counts, as when unpacking.
    """
    with Container(entry.uri, "tar", entry.size_bytes, reading.reader(entry.uri)) as tar:
        members, behind = tar.members()
    if behind:
        left_out["data behind the end of a tar"] += 1
        say(f"warning: {entry.uri}: {behind:,} bytes after its end are not a tar and are not read")
    files = _files(members, left_out)
    labels = _Labels(entry.uri, [member for member in files if member.label is not None])
    if labels.are_classes:
        classes.add(series(entry.uri))
    with_image = {_stem(member.name) for member in files if _ending(member.name) in IMAGE_ENDINGS}
    with_image |= {_key(stem) for stem in with_image}
    for member in files:
        ending, stem = _ending(member.name), _stem(member.name)
        if member.label is not None:
            continue
        if ending in sidecars | SIDECARS:
            left_out[f"{ending} is no picture"] += 1
        elif ending not in IMAGE_ENDINGS and (stem in with_image or _key(stem) in with_image):
            left_out["beside a picture of the same key in a tar"] += 1
        else:
            path_labels = labels_from_path(f"{folder}/{readable(member.name)}")
            is_known, label, is_number = labels.of(stem)
            if is_known:
                path_labels = path_labels._replace(label=label, folder=None)
            yield row(
                f"{entry.uri}#{readable(member.name)}", entry.etag, member.size_bytes, listed=True,
                modified_at=entry.modified_at, container=entry.uri, position=member.offset, **path_labels._asdict(),
                series=series(entry.uri) if is_number else None,
            )  # fmt: skip


def _files(members: list[Member], left_out: LeftOut) -> list[Member]:
    """Visible files, each name once; other members are counted in `left_out`."""
    files: dict[str, Member] = {}
    for member in members:
        if member.kind == "folder":
            continue
        if is_hidden(member.name):
            left_out["hidden file"] += 1
        elif member.kind == "sparse":
            left_out["sparse file in a tar"] += 1
        elif member.kind != "file":
            left_out["link or special file in a tar"] += 1
        else:
            if files.pop(member.name, None) is not None:
                left_out["replaced by a later member of the same name in a tar"] += 1
            files[member.name] = member
    return list(files.values())


class _Labels:
    """Labels of a tar's keys, by a name's whole stem, else by its part before the first dot."""

    def __init__(self, uri: str, members: list[Member]) -> None:
        values = meanings(member.label for member in members)
        self.are_classes = values is None
        if values is None:
            say(f"warning: {uri}: its .cls members hold other numbers than 0 and 1: classes, not labels")
            members, values = [], {}
        elif strange := without_label((member.label for member in members), values):
            say(f"warning: {uri}: its .cls members hold {strange}: neither real nor fake, so not labels")
        self._by_stem = {
            _stem(member.name): (values.get(member.label), number(member.label) is not None) for member in members
        }
        self._by_key: dict[str, set[tuple[int | None, bool]]] = defaultdict(set)
        for stem, stem_label in self._by_stem.items():
            self._by_key[_key(stem)].add(stem_label)

    def of(self, stem: str) -> tuple[bool, int | None, bool]:
        """Whether an image has a `.cls` member, the label in it, and whether that is a number."""
        candidates = {self._by_stem[stem]} if stem in self._by_stem else self._by_key.get(_key(stem), set())
        distinct = {label for label, _ in candidates}
        label = distinct.pop() if len(distinct) == 1 else None  # contradictory labels give none
        return bool(candidates), label, any(is_number for _, is_number in candidates)


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    """The name without its last ending."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.rpartition('.')[0] or last}"


def _key(stem: str) -> str:
    """The WebDataset key: the name up to the first dot of its last part."""
    folder, _, last = stem.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"
