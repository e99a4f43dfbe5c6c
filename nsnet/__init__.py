"""Advanced NS-Net: tells AI-generated images from real ones. One process, one device; no Ray, no storage.

`nsnet.images` and `nsnet.patches` import no torch, so that CPU workers start at once: the names below load on first
use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsnet.detector import Detector as Detector
    from nsnet.detector import Verdict as Verdict

__all__ = ["Detector", "Verdict"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from nsnet import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'nsnet' has no attribute {name!r}")
