"""Loops in C: estimates of entropies, and thumbnails. Without the compiled module, numpy and Pillow do the same.

The compiled module is named `nsnet_kernels` and lies outside of this package, so that a job that brings its own copy of
the packages finds the installed one.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt


def _load() -> Any:
    try:
        import nsnet_kernels
    except ImportError:
        return None
    return nsnet_kernels


compiled: Final = _load()
"""The module `nsnet_kernels`, possibly of an older installation; None if there was no compiler at installation."""


def with_whole_rows(image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The image (H, W, 3), or a copy, in which the pixels of each row lie side by side, as the kernels need them."""
    return image_hwc if image_hwc.strides[1:] == (3, 1) else np.ascontiguousarray(image_hwc)
