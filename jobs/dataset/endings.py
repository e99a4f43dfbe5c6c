"""Classify files by name, before their content is read."""

from typing import Final

SIDECARS: Final = frozenset(
    ".7z .arrow .bz2 .cfg .ckpt .css .csv .feather .gz .h5 .htm .html .ini .ipynb .js .json .jsonl .lock .log .md .npy "
    ".npz .parquet .pickle .pkl .pt .pth .py .rar .rst .safetensors .sh .sha256 .sqlite .tar .tgz .toml .tsv .txt .xml "
    ".xz .yaml .yml .zip .zst"
    .split()
)  # fmt: skip
"""Endings of files that are not images. A file with any other name, known or not, is tried as an image."""
IMAGE_ENDINGS: Final = frozenset(
    ".apng .avif .avifs .bmp .cur .dds .dib .gif .heic .heics .heif .heifs .hif .icns .ico .image .img .j2c .j2k "
    ".jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pcx .pgm .png .pnm .ppm .psd .qoi .rgb .rgba .sgi .tif .tiff "
    ".webp"
    .split()
)  # fmt: skip
"""Endings of images. In a tar, a member with the key of an image and another ending describes that image."""
HIDDEN: Final = frozenset({
    "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir", "@Recycle", "Thumbs.db",
    "_temporary", "_delta_log", "_spark_metadata",
})  # fmt: skip
"""Names that systems and programs create: recycle bins, thumbnails, unfinished files. Others begin with a dot."""

COMPRESSED: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
NOT_A_SOURCE: Final = {
    **dict.fromkeys(COMPRESSED, "a compressed tar: unpack it, as its members cannot be read one by one"),
    ".csv": "a CSV file: write the list as Parquet, with a `uri` column",
    ".tsv": "a TSV file: write the list as Parquet, with a `uri` column",
    ".jsonl": "a file of JSON lines: write the list as Parquet, with a `uri` column",
    ".json": "a JSON file: write the list as Parquet, with a `uri` column",
    ".arrow": "an Arrow file: write it as Parquet",
    ".feather": "an Arrow file: write it as Parquet",
    ".zip": "a zip archive: unpack it",
    ".rar": "a RAR archive: unpack it",
    ".7z": "a 7z archive: unpack it",
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), "a compressed file: unpack it"),
    ".ndjson": "a file of JSON lines: write the list as Parquet, with a `uri` column",
    ".xlsx": "a spreadsheet: write the list as Parquet, with a `uri` column",
    ".txt": "a text file: write the list as Parquet, with a `uri` column",
}  # fmt: skip
"""Ending -> description and advice, for files that users mistake for sources."""


def is_hidden(path: str) -> bool:
    """Whether a path below a source is hidden or in a hidden folder."""
    return any(part.startswith(".") and part not in (".", "..") or part in HIDDEN for part in path.split("/"))


def what_it_is(name: str) -> str | None:
    """Description of a file that is not a source (`NOT_A_SOURCE`); None: any other file."""
    lower = name.lower()
    return next((description for ending, description in NOT_A_SOURCE.items() if lower.endswith(ending)), None)
