"""Checks and reads the inputs of `Detector.predict`; an input that is not an image raises before any is read."""

import errno
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from nsnet.errors import FetchError, ImageCorruptError, ImageError, ImageTooLargeError
from nsnet.files import read_regular
from nsnet.preparation import PreparationConfig, Prepared, prepare
from nsnet.provenance import completed

Input: TypeAlias = str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | BinaryIO
"""A path, the content of a file, a Pillow image, a uint8 array (RGB (H, W, 3) or grey (H, W)), or an open binary file,
which is read from its start."""

KINDS: Final = "a path, bytes, a Pillow image, a uint8 array (H, W, 3) or (H, W), or a binary file"


def checked(images: Iterable[Input]) -> list[Input]:
    """Return the inputs as a list, without reading them.

    Raises `TypeError` or `ValueError` for a single image, or with the index and type of an input that is not an image.
    """
    is_single = isinstance(images, str | bytes | Path | Image.Image) or hasattr(images, "read")
    if isinstance(images, np.ndarray):
        is_single = images.ndim in (2, 3)
    if is_single:
        raise TypeError("predict takes a list of images; for one image: predict([image])")
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise TypeError(f"predict takes a list of images, got {type(images).__name__}")
    listed = list(images)
    for index, image in enumerate(listed):
        _check(index, image)
    return listed


def _check(index: int, image: Any) -> None:
    if isinstance(image, str | Path | bytes | Image.Image):
        return
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"image {index} is an array of {image.dtype}; predict takes uint8, 0 to 255")
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape:
            raise ValueError(f"image {index} is an array {image.shape}; predict takes (H, W, 3), RGB, or (H, W), grey")
        return
    if callable(getattr(image, "read", None)):
        try:
            content = image.read(0)
        except (OSError, ValueError) as error:  # closed, or opened for writing
            raise ValueError(f"image {index} is a file that cannot be read: {error}") from error
        if not isinstance(content, bytes):
            raise TypeError(f"image {index} is a file opened in text mode; open it with mode 'rb'")
        return
    raise TypeError(f"image {index} is of type {type(image).__name__}; predict takes {KINDS}")


def try_prepare(image: Input, config: PreparationConfig) -> Prepared | ImageError:
    """Prepare a checked image for the models; returns the error if that fails."""
    try:
        content = _content(image, config.limits.max_bytes)
        prepared = prepare(content, config)
        if isinstance(content, bytes):
            prepared = replace(prepared, provenance=completed(prepared.provenance, content, config.anchors))
        return prepared
    except ImageError as error:
        return error
    except Exception as error:  # an opened Pillow image is decoded only now; its decoder can raise anything
        return ImageCorruptError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _content(image: Input, max_bytes: int) -> bytes | Image.Image:
    if isinstance(image, bytes | Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    name = str(image) if isinstance(image, str | Path) else str(getattr(image, "name", "file"))
    try:
        if isinstance(image, str | Path):
            return read_regular(image, max_bytes)
        return _read(image, max_bytes + 1)  # one byte more than allowed: preparation then refuses it
    except (OSError, ValueError) as error:  # ValueError: a null character in the path, a closed file
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise ImageTooLargeError(f"{name}: more than the limit of {max_bytes:,} bytes") from error
        raise FetchError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def _read(file: BinaryIO, max_bytes: int) -> bytes:
    """Read a file from its start, if it is seekable, since the caller may have read some of it.

    Reads repeatedly: pipes and raw files return fewer bytes than requested.
    """
    if callable(getattr(file, "seekable", None)) and file.seekable():
        file.seek(0)
    chunks: list[bytes] = []
    while max_bytes > 0 and (chunk := file.read(max_bytes)):
        chunks.append(chunk)
        max_bytes -= len(chunk)
    return b"".join(chunks)
