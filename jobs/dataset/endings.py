"""What a file's name says before its content is looked at."""

from typing import Final

SIDECARS: Final = frozenset(
    ".7z .arrow .bz2 .cfg .ckpt .css .csv .feather .gz .h5 .htm .html .ini .ipynb .js .json .jsonl .lock .log .md .npy "
    ".npz .parquet .pickle .pkl .pt .pth .py .rar .rst .safetensors .sh .sha256 .sqlite .tar .tgz .toml .tsv .txt .xml "
    ".xz .yaml .yml .zip .zst"
    .split()
)  # fmt: skip
"""Endings of what lies beside the images of data sets. Any other name, known or not, is tried by its content."""
IMAGE_ENDINGS: Final = frozenset(
    ".apng .avif .avifs .bmp .cur .dds .dib .gif .heic .heics .heif .heifs .hif .icns .ico .image .img .j2c .j2k "
    ".jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pcx .pgm .png .pnm .ppm .psd .qoi .rgb .rgba .sgi .tif .tiff "
    ".webp"
    .split()
)  # fmt: skip
"""Endings of images: what lies beside one in a tar under the same key, and has another, is about it."""
HIDDEN: Final = frozenset({
    "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir", "@Recycle", "Thumbs.db",
    "_temporary", "_delta_log", "_spark_metadata",
})  # fmt: skip
"""What systems and programs leave behind: bins, thumbnails, unfinished files. Others of that kind begin with a dot."""

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
"""Endings of files that people take for sources, and what they are."""


def is_hidden(path: str) -> bool:
    """Whether a path below a source is hidden, or lies in a hidden folder."""
    return any(part.startswith(".") and part not in (".", "..") or part in HIDDEN for part in path.split("/"))


def what_it_is(name: str) -> str | None:
    """What a file is that people take for a source; None: not one of these."""
    small = name.lower()
    return next((said for ending, said in NOT_A_SOURCE.items() if small.endswith(ending)), None)
