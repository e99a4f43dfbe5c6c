"""Locations of the actors' models, and the model identities that rows carry."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.storage import bundles
from jobs.storage.uris import Uri
from nsnet import bundle
from nsnet.errors import ConfigError

if TYPE_CHECKING:
    from nsnet.configuration import CaptionerConfig, ClipConfig, DetectorConfig, Precision


@dataclass(frozen=True, kw_only=True)
class Models:
    """Locations of the actors' models. A remote bundle is fetched to a cache on the actor's node."""

    detector: Uri | None = None
    """URI of a bundle; None: no detector is trained yet."""
    clip_weights: Uri | None = None
    """Local path that replaces the hub's CLIP weights."""
    text_weights: Uri | None = None
    """Local path that replaces the hub's weights of a separate text tower."""
    captioner: Uri | None = None
    """Local transformers folder that replaces the hub's captioner."""
    device: str = "cpu"
    precision: "Precision" = "auto"
    """Arithmetic of detector and captioner."""
    compiled: bool = False
    """Compile the image towers of detector and captioner."""
    threads: int = 1
    """Threads per actor on the CPU."""
    run_id: str | None = None
    """Run that is written into the rows."""
    detector_id: str | None = None
    """Identity that the bundle must have when an actor loads it."""
    captioner_id: str = ""
    """Identity of the captioner."""
    reuse: bool = True
    """Compute repeated bytes once."""

    def key(self, row: dict[str, Any]) -> str:
        """Rows with the same key have the same results. The key includes a known caption, since copies may differ."""
        content = row["content_hash"] if self.reuse else row["image_id"]
        return f"{content} {row.get('transform') or ''} {row.get('caption') or ''}"

    def bundle_folder(self) -> Path:
        """The bundle as a local folder."""
        assert self.detector is not None
        return bundles.fetch_bundle(self.detector, bundle.DESCRIPTION)

    def captioner_folder(self, config: "CaptionerConfig") -> Path | None:
        """The captioner's folder: the given one, else the bundle's, else the hub's; None: the tiny captioner."""
        from nsnet.captions import find_captioner

        bundled = bundle.captioner_of(self.bundle_folder()) if self.detector is not None else None
        return find_captioner(config, Path(self.captioner) if self.captioner else bundled)

    def clip_path(self) -> Path | None:
        """Path of the given CLIP weights."""
        return Path(self.clip_weights) if self.clip_weights else None

    def text_path(self) -> Path | None:
        """Path of the given weights of a separate text tower."""
        return Path(self.text_weights) if self.text_weights else None

    def text_tower(self, config: "DetectorConfig") -> "tuple[ClipConfig, Path | None]":
        """The model whose text tower encodes captions, and its weights (`find_weights`).

        Raises `ConfigError` if the image tower has none, `WeightsError` if weights are missing. Loads nothing.
        """
        from nsnet.clip_weights import TEXT_WEIGHTS, find_weights

        tower = config.text_tower
        if tower is None:
            raise ConfigError(
                f"{config.clip.model} has no text tower for captions: choose a recipe such as {config.clip.model}+MODEL"
            )
        if tower is config.text:
            return tower, find_weights(tower, self.text_path(), option=TEXT_WEIGHTS)
        return tower, find_weights(tower, self.clip_path())

    def use_threads(self) -> None:
        """Limit this process's compute threads, since actors share their node's cores."""
        import torch

        if self.device == "cpu":
            torch.set_num_threads(self.threads)


def caption_id(captioner_id: str, content_hash: str, transform: str | None = None) -> str:
    """Identity of a caption: the captioner's, and 16 hexadecimal digits of the SHA-256 of the captioned content."""
    input_hash = hashlib.sha256(f"{content_hash}/{transform}".encode()).hexdigest() if transform else content_hash
    return f"{captioner_id}-{input_hash[:16]}"
