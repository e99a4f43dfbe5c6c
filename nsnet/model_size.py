"""A bound on the model that a configuration describes: it may say any size, and is believed before weights are read."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from nsnet.errors import WeightsError

FACTOR: Final = 8
"""A model may take so many times the bytes of its weights, which may be of half precision; blocks are built twice."""
FREE_BYTES: Final = 2**26
"""Beside that: buffers are in no file."""
TENSOR_BYTES: Final = 2**12
"""What any tensor counts at least, with the module around it: a model of many layers takes time, too."""
CONSTRUCTORS: Final = (
    torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.rand, torch.randn, torch.arange, torch.linspace,
)  # fmt: skip
"""What modules make their tensors with, beside copies of others."""


class ModelSize(TorchFunctionMode):
    """While it is entered, new tensors of this thread may take what these weights justify. Raises `WeightsError`.

    weights: files, or folders of them. Tensors on the device `meta` count, too.
    """

    def __init__(self, weights: Iterable[Path]) -> None:
        super().__init__()
        files = [file for path in weights for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
        self._most = FREE_BYTES + FACTOR * sum(file.stat().st_size for file in files)
        self._left = self._most

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONSTRUCTORS:
            same = {name: value for name, value in kwargs.items() if name not in ("generator", "out")}
            described = func(*args, **{**same, "device": "meta"})
            self._left -= max(TENSOR_BYTES, described.numel() * described.itemsize)
            if self._left < 0:
                raise WeightsError(
                    f"the configuration describes a model of more than {self._most:,} bytes, which its files of "
                    "weights cannot fill: take the configuration and the weights of one model"
                )
        return func(*args, **kwargs)
