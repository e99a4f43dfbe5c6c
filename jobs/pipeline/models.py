"""Where actors find their models, and the identities that rows get from them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.storage import bundles
from jobs.storage.uris import Uri
from nsnet import bundle

if TYPE_CHECKING:
    from nsnet.captions import CaptionerConfig


@dataclass(frozen=True, kw_only=True)
class Models:
    """Where actors find their models. A remote bundle is fetched to a cache on the node where the actor runs."""

    detector: Uri | None = None
    """URI of a bundle; None: nothing was trained yet."""
    clip_weights: Uri | None = None
    """Local path that replaces the hub's CLIP weights."""
    captioner: Uri | None = None
    """Local transformers folder that replaces the hub's captioner."""
    device: str = "cpu"
    threads: int = 1
    """Threads of an actor that computes on the CPU."""
    run_id: str | None = None
    """Run that the rows are marked with."""
    detector_id: str | None = None
    """Identity of the detector, which the bundle must still have when an actor loads it."""
    captioner_id: str = ""
    """Identity of the captioner."""
    reuse: bool = True
    """Compute repeated bytes once."""

    def key(self, row: dict[str, Any]) -> str:
        """Rows of the same key have the same results. A known caption belongs to it: that of a copy may be another."""
        content = row["content_hash"] if self.reuse else row["image_id"]
        return f"{content} {row.get('transform') or ''} {row.get('caption') or ''}"

    def bundle_folder(self) -> Path:
        """The bundle as a local folder."""
        assert self.detector is not None
        return bundles.fetch_bundle(self.detector, bundle.DESCRIPTION)

    def captioner_folder(self, config: "CaptionerConfig") -> Path | None:
        """The captioner's folder: as given, in the bundle, or the hub's; None: the tiny one."""
        from nsnet.captions import find_captioner

        own = bundle.captioner_of(self.bundle_folder()) if self.detector is not None else None
        return find_captioner(config, Path(self.captioner) if self.captioner else own)

    def clip_path(self) -> Path | None:
        """The given CLIP weights."""
        return Path(self.clip_weights) if self.clip_weights else None

    def use_threads(self) -> None:
        """Bound this process's compute threads: actors share their node's cores."""
        import torch

        if self.device == "cpu":
            torch.set_num_threads(self.threads)


def caption_id(captioner_id: str, content_hash: str, transform: str | None = None) -> str:
    """Identity of a caption: the captioner's, and 16 hexadecimal digits of the SHA-256 of what it was shown."""
    shown = hashlib.sha256(f"{content_hash}/{transform}".encode()).hexdigest() if transform else content_hash
    return f"{captioner_id}-{shown[:16]}"
