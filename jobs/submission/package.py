"""Pack the program's own source for a cluster whose image holds another version of it, or none."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nsnet.errors import UsageError

ROOT: Final = Path(__file__).resolve().parents[2]
"""The folder of `nsnet` and `jobs`: a source tree, or where packages are installed."""
PACKAGES: Final = ("nsnet", "jobs")
PATTERNS: Final = ("*.py", "py.typed", "*.jinja", "*.json")
"""What an installation holds of the packages (`pyproject.toml`). Everything else stays here: data, keys, caches."""
MAX_BYTES: Final = 16 * 2**20


@dataclass(frozen=True)
class Package:
    """Packed source."""

    path: Path
    files: int
    size: int
    """Bytes as packed."""


def is_source_tree() -> bool:
    """Whether this program runs from its source, not from an installed distribution."""
    return (ROOT / "pyproject.toml").is_file()


def source_files(root: Path = ROOT) -> Iterator[Path]:
    """The files of the packages, ordered; no hidden ones, and no links."""
    for package in PACKAGES:
        found = {path for pattern in PATTERNS for path in (root / package).rglob(pattern)}
        for path in sorted(found):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.is_file() and not path.is_symlink() and not hidden:
                yield path


def pack(folder: Path, root: Path = ROOT) -> Package:
    """Pack the source into a zip below a folder: the same source gives the same bytes, which Ray uploads only once.

    Raises `UsageError` if it is larger than `MAX_BYTES`.
    """
    target = folder / "nsnet-source.zip"
    count = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in source_files(root):
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix())  # dated 1980
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
            count += 1
    size = target.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(
            f"the source below {root} has {size} bytes when packed, at most {MAX_BYTES} are uploaded: "
            f"move what is no source out of {' and '.join(PACKAGES)}"
        )
    return Package(target, count, size)
