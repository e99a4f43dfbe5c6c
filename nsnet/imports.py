"""Imports of large libraries in a fraction of their time.

open_clip imports torchvision and timm, which import torch's compiler for decorators that are not used here. The
compiler takes as long to import as torch, in every process of a job. Here it is imported when it is used.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

COMPILER: Final = "torch._dynamo"
"""Package of torch's compiler; `torch.compiler.disable` and torchvision's operators import it."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """In this block, import without garbage collection, and without torch's compiler unless a library uses it."""
    collects = gc.isenabled()
    gc.disable()
    stand_ins: dict[str, ModuleType] = {}
    if COMPILER not in sys.modules:
        utils = _StandIn(f"{COMPILER}.utils", {"is_compile_supported": lambda device: False})
        stand_ins = {COMPILER: _StandIn(COMPILER, {"disable": _not_disabled, "utils": utils}), utils.__name__: utils}
        sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        if collects:
            gc.enable()


def open_clip() -> Any:
    """The module open_clip."""
    return _imported("open_clip")


def timm() -> Any:
    """The module timm."""
    return _imported("timm")


def _imported(name: str) -> ModuleType:
    if name not in sys.modules:
        with quick_imports():
            importlib.import_module(name)
    return sys.modules[name]


class _StandIn(ModuleType):
    """Stands for a module of the compiler, and imports it when anything else than these attributes is wanted."""

    __path__: list[str] = []  # as a package: its submodules are looked up in it

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for stand_in in (COMPILER, f"{COMPILER}.utils"):
            if isinstance(sys.modules.get(stand_in), _StandIn):
                del sys.modules[stand_in]
        return getattr(importlib.import_module(self.__name__), name)


def _not_disabled(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """As decorator `torch.compiler.disable`, for functions that are never compiled here."""
    return function if function is not None else _not_disabled
