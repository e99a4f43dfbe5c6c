"""Locations of the actors' models, and the model identities that rows carry."""

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from jobs.console import output
from jobs.storage import bundles, mirror
from jobs.storage.uris import Uri
from nsnet import bundle, published
from nsnet.captions import find_captioner
from nsnet.clip_weights import CLIP_WEIGHTS, TEXT_WEIGHTS, find_weights
from nsnet.configuration import CaptionerConfig, ClipConfig, DetectorConfig, Precision, config_of
from nsnet.errors import ConfigError
from nsnet.published import PublishedModel


class TowerPaths(TypedDict):
    """Arguments of `Detector.build` and `Detector.load`."""

    clip_weights: Path | None
    text_weights: Path | None


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
    weights: Uri | None = None
    """Mirror of weights that replaces the hub. As a place, it is part of no identity."""
    detector_sha256: str | None = None
    """Hash that the bundle's description must have."""
    device: str = "cpu"
    precision: Precision = "auto"
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
        with output.waiting(f"the bundle {self.detector}"):
            return bundles.fetch_bundle(self.detector, bundle.DESCRIPTION, self.detector_sha256)

    def description(self) -> bundle.Description:
        """The description of the bundle, after all its files were verified, also against the pin."""
        return bundle.read(self.bundle_folder(), self.detector_sha256)

    def captioner_folder(self, config: CaptionerConfig) -> Path | None:
        """The captioner's folder: the given one, the bundle's, the mirror's or the hub's; None: the tiny captioner."""
        folder = Path(self.captioner) if self.captioner else self._bundled(bundle.CAPTIONER)
        if folder is not None and not self.captioner and self.detector_sha256 is not None:
            self.description()  # raises an error if the captioner in the bundle was replaced
        return find_captioner(config, folder or self._mirrored(published.captioner(config)))

    def tower_paths(self, config: DetectorConfig | None = None) -> TowerPaths:
        """Weights for `Detector.build` and `Detector.load`: the given paths, else the mirror's; None: the bundle's own,
        or the hub's.

        config: None for that of the bundle.
        """
        clip = Path(self.clip_weights) if self.clip_weights else None
        text = Path(self.text_weights) if self.text_weights else None
        if self.weights is not None:
            config = config or config_of(self.description())
            clip = clip or self._tower(bundle.CLIP, config.clip)
            if config.text is not None and config.projection.needs_captions:
                text = text or self._tower(bundle.TEXT, config.text)
        return TowerPaths(clip_weights=clip, text_weights=text)

    def clip_path(self, config: DetectorConfig) -> Path | None:
        """Path of the image tower's weights: as in `tower_paths`."""
        return Path(self.clip_weights) if self.clip_weights else self._tower(bundle.CLIP, config.clip)

    def text_tower(self, config: DetectorConfig) -> tuple[ClipConfig, Path | None]:
        """The model whose text tower encodes captions, and its weights (`find_weights`).

        Raises `ConfigError` if the image tower has none, `WeightsError` if weights are missing. Loads nothing.
        """
        tower = config.text_tower
        if tower is None:
            raise ConfigError(
                f"{config.clip.model} has no text tower for captions: choose a recipe such as {config.clip.model}+MODEL"
            )
        if tower is config.text:
            path = Path(self.text_weights) if self.text_weights else self._tower(bundle.TEXT, tower)
            return tower, find_weights(tower, path, option=TEXT_WEIGHTS)
        return tower, find_weights(tower, self.clip_path(config))

    def check_towers(self, config: DetectorConfig) -> None:
        """Raise `WeightsError` if weights to which the bundle refers are missing. Fetches nothing from a mirror."""
        needed = [(bundle.CLIP, config.clip, self.clip_weights, CLIP_WEIGHTS)]
        if config.text is not None and config.projection.needs_captions:
            needed.append((bundle.TEXT, config.text, self.text_weights, TEXT_WEIGHTS))
        for kind, tower, given, option in needed:
            model = published.tower(tower)
            if self._bundled(kind) is not None:
                continue
            if self.weights is not None and model is not None and given is None:
                mirror.require(self.weights, model, self._remedy(model))
            else:
                find_weights(tower, Path(given) if given else None, option=option)

    def _tower(self, kind: str, config: ClipConfig) -> Path | None:
        """The mirror's weights of a tower, unless the bundle holds them (in its folder `kind`)."""
        return None if self._bundled(kind) is not None else self._mirrored(published.tower(config))

    def _bundled(self, kind: str) -> Path | None:
        """The folder of a model in the bundle; None if the bundle has none."""
        if self.detector is None:
            return None
        folder = self.bundle_folder() / kind
        return folder if folder.is_dir() else None

    def _mirrored(self, model: PublishedModel | None) -> Path | None:
        """A model from the mirror; None without a mirror, or for random weights."""
        if self.weights is None or model is None:
            return None
        with output.waiting(f"{model} from {self.weights}, which one process of each node fetches"):
            return mirror.fetch(self.weights, model, self._remedy(model))

    def _remedy(self, model: PublishedModel) -> str:
        """What to do if the mirror lacks a model."""
        assert self.weights is not None
        command = ["nsnet", "weights", "mirror", "--to", self.weights]
        if self.detector is None and model.recipe is None:
            return (
                "give its folder with --captioner, or, where there is internet and with a bundle that uses it, run "
                f"{shlex.join([*command, '--detector', 'URI'])}"
            )
        needed = ["--detector", self.detector] if self.detector else ["--recipe", str(model.recipe)]
        return f"where there is internet, run {shlex.join([*command, *needed])}"

    def use_threads(self) -> None:
        """Limit this process's compute threads, since actors share their node's cores."""
        import torch

        if self.device == "cpu":
            torch.set_num_threads(self.threads)


def caption_id(captioner_id: str, content_hash: str, transform: str | None = None) -> str:
    """Identity of a caption: the captioner's, and 16 hexadecimal digits of the SHA-256 of the captioned content."""
    input_hash = hashlib.sha256(f"{content_hash}/{transform}".encode()).hexdigest() if transform else content_hash
    return f"{captioner_id}-{input_hash[:16]}"
