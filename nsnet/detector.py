"""The detector: composes captioner, CLIP, mapper, projection, head and calibration.

Dimensions: B images, M mosaic side, D embedding.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nsnet import bundle
from nsnet.calibration import Calibration, Label
from nsnet.captions import Captioner, CaptionerConfig
from nsnet.clip import (
    Clip,
    ClipConfig,
    LoraSettings,
    add_lora,
    find_weights,
    has_lora,
    load_clip,
    load_lora,
    lora_settings,
    merge_lora,
    save_lora,
)
from nsnet.config import from_dict, to_dict
from nsnet.errors import (
    BundleError,
    CaptionError,
    ConfigError,
    ImageError,
    NsnetError,
    WeightsError,
)
from nsnet.head import HeadConfig
from nsnet.images import DecodeLimits
from nsnet.inputs import Input, checked, try_prepare
from nsnet.losses import LossConfig
from nsnet.mapper import MapperConfig
from nsnet.model_size import ModelSize
from nsnet.network import Network, ProjectionConfig, residual_energy
from nsnet.patches import SCORING_SEED, PatchConfig, assemble_mosaic
from nsnet.preparation import PreparationConfig, Prepared


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Everything that defines a detector but its weights."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    patches: PatchConfig = field(default_factory=PatchConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    mapper: MapperConfig = field(default_factory=MapperConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train_backbone: bool = False
    """Train the whole image tower, not only its adapters: for towers that start from random weights."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is said of one image. An image that failed has `status` failed, the error, and no verdict."""

    status: Literal["scored", "failed"]
    verdict: Label | None = None
    prob_fake: float | None = None
    """Calibrated P(fake), in [0, 1]."""
    logit: float | None = None
    threshold: float | None = None
    """`prob_fake` from which the verdict is fake."""
    caption: str | None = None
    """What the captioner saw: the semantics that were removed."""
    residual_energy: float | None = None
    """‖ũ‖/‖u‖, the share of the image feature that the projection left."""
    width: int | None = None
    height: int | None = None
    format: str | None = None
    error_stage: str | None = None
    error_class: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the network says of a batch; arrays (B,) fp64."""

    logit: npt.NDArray[np.float64]
    prob_fake: npt.NDArray[np.float64]
    verdict: list[Label]
    residual_energy: npt.NDArray[np.float64]


class Detector:
    """A detector on one device. `load` one that was trained, or `build` one to train."""

    def __init__(
        self,
        config: DetectorConfig,
        clip: Clip,
        network: Network,
        *,
        captioner: Captioner | None = None,
        calibration: Calibration | None = None,
        description: bundle.Description | None = None,
    ) -> None:
        self.config = config
        self.clip = clip
        self.network = network
        self.captioner = captioner
        self.calibration = calibration or Calibration()
        self.description = description
        self.device = torch.device("cpu")

    @property
    def detector_id(self) -> str | None:
        """Identity of the bundle that this detector was loaded from; None for one that was built."""
        return self.description.detector_id if self.description else None

    @classmethod
    def build(cls, config: DetectorConfig, clip_weights: Path | None = None, *, seed: int = 0) -> Self:
        """A detector to train: adapters at zero, mapper and head at random by the seed, no captioner.

        Raises `WeightsError` or `ConfigError` when weights, architecture and configuration do not fit.
        """
        clip = load_clip(config.clip, find_weights(config.clip, clip_weights))
        _check_mosaic(config, clip)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            visual = add_lora(clip.visual, config.lora) if config.lora.rank else clip.visual
            network = Network(visual, clip, config.projection, config.mapper, config.head)
        if config.train_backbone:
            network.visual.requires_grad_(True)
        return cls(config, clip, network)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        clip_weights: Path | None = None,
        captioner: Path | Literal[False] | None = None,
    ) -> Self:
        """Load a bundle for inference: adapters merged, everything frozen.

        `clip_weights`, `captioner`: local paths that replace the hub's; `captioner=False` leaves it out (no `predict`).
        A detector that judges without captions has no captioner.
        Raises `BundleError` (missing, damaged, other version) or `WeightsError` (base weights missing or others).
        """
        folder = Path(path)
        description = bundle.read(folder)
        config = config_of(description)
        try:
            calibration = from_dict(Calibration, description.calibration)
        except ConfigError as error:
            raise BundleError(f"the bundle {folder} is of another version: {error}") from error
        own = folder / bundle.CLIP
        weights = own if own.is_dir() else find_weights(config.clip, clip_weights)
        if weights is None:
            raise BundleError(f"the bundle {folder} lacks {bundle.CLIP}/, and names no weights of CLIP in its place")
        clip = load_clip(config.clip, weights)
        if clip.digest() != description.clip_digest:
            raise WeightsError(
                f"the CLIP weights are not those that detector {description.detector_id} was trained on "
                f"(digest {clip.digest()[:16]}, recorded {description.clip_digest[:16]}); pass the right --clip-weights"
            )
        try:
            _check_mosaic(config, clip)
            size = ModelSize([weights, folder / bundle.LORA, folder / bundle.NETWORK])
            with torch.random.fork_rng(devices=[]), size:  # modules start at random; the caller's numbers are not ours
                if (folder / bundle.LORA).is_dir():
                    adapted = load_lora(clip.visual, folder / bundle.LORA)
                    if lora_settings(adapted) != (config.lora.rank, config.lora.alpha):
                        raise BundleError("the settings of its adapters are not those of detector.json")
                    clip.visual = merge_lora(adapted)
                network = Network(clip.visual, clip, config.projection, config.mapper, config.head)
            missing = network.load_state_dict(load_file(folder / bundle.NETWORK), strict=False)
        except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError, NsnetError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"the bundle {folder} does not fit its configuration: {reason}") from error
        strange = [name for name in missing.missing_keys if not name.startswith("visual.")] + missing.unexpected_keys
        if strange:
            raise BundleError(f"the bundle {folder} does not fit its configuration: {', '.join(strange)}")
        speaker = None
        if captioner is not False and config.projection.needs_captions:
            speaker = Captioner.load(config.captioner, captioner or bundle.captioner_of(folder), device)
        loaded = cls(config, clip, network, captioner=speaker, calibration=calibration, description=description)
        loaded.network.requires_grad_(False).eval()
        return loaded.to(device)

    def to(self, device: str) -> Self:
        """Move the towers and heads to a device."""
        self.device = torch.device(device)
        self.clip.model.to(self.device)
        self.network.to(self.device)
        return self

    def save(
        self,
        path: str | Path,
        *,
        captioner: Path | None = None,
        training: dict[str, Any] | None = None,
    ) -> bundle.Description:
        """Write a bundle; the folder must not exist yet. `captioner`: transformers folder to put inside.

        A pretrained, frozen CLIP is referred to by name and digest; a CLIP of random or trained weights is put inside.
        """
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BundleError(f"{folder} exists and is not empty; choose another place for the detector")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            partial = Path(scratch) / "bundle"
            partial.mkdir()
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.heads_state().items()},
                partial / bundle.NETWORK,
            )
            adapted = self.network.visual
            if has_lora(adapted):
                save_lora(adapted, partial / bundle.LORA)
            with self._base_towers() as clip:
                digest = clip.digest()
                if self.config.train_backbone or self.config.clip.pretrained is None:
                    clip.save(partial / bundle.CLIP)
            if captioner is not None:  # loaded and written again: what is public as a pickle becomes safetensors
                Captioner(captioner, self.config.captioner).save(partial / bundle.CAPTIONER)
            description = bundle.seal(
                partial,
                config=to_dict(self.config),
                calibration=to_dict(self.calibration),
                training=training or {},
                clip_digest=digest,
            )
            for path in (partial, *partial.rglob("*")):  # safetensors and tempfile write for the owner alone
                path.chmod(0o755 if path.is_dir() else 0o644)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        return description

    @contextmanager
    def _base_towers(self) -> Iterator[Clip]:
        """CLIP in open_clip's own modules, with the base weights of the image tower (adapters left out)."""
        adapted = self.network.visual
        if not has_lora(adapted):
            yield self.clip
            return
        from copy import deepcopy

        from nsnet.clip import fuse_attention

        split = self.clip.visual
        self.clip.visual = cast(nn.Module, deepcopy(adapted).unload())
        fuse_attention(self.clip.visual)
        try:
            yield self.clip
        finally:
            self.clip.visual = split

    def preparation(self, limits: DecodeLimits | None = None) -> PreparationConfig:
        """How images are prepared for this detector."""
        self._check_captioner()
        return PreparationConfig(
            thumbnail_px=self.captioner.thumbnail_px if self.captioner is not None else 0,
            patches=self.config.patches,
            limits=limits or DecodeLimits(),
        )

    def _check_captioner(self) -> None:
        if self.captioner is None and self.config.projection.needs_captions:
            raise ConfigError("this detector was loaded without its captioner")

    @torch.inference_mode()
    def score(self, mosaics: npt.NDArray[np.uint8], captions: Sequence[str] | None) -> Scores:
        """Score mosaics (B, M, M, 3) uint8 with their captions, in fp32, without dropout.

        None is for a detector that judges without captions.
        """
        self.network.eval()  # a detector that was built comes ready for training
        text_features = None
        if self.config.projection.needs_captions:
            if captions is None:
                raise ConfigError("this detector cannot judge an image without its caption")
            text_features = self.clip.encode_text(captions).to(self.device)
        out = self.network(torch.tensor(mosaics).to(self.device), text_features)  # a copy: batches may be read-only
        logit = out.logit.double().cpu().numpy()
        prob_fake = self.calibration.probability(logit)
        return Scores(
            logit=logit,
            prob_fake=prob_fake,
            verdict=[self.calibration.verdict(float(p)) for p in prob_fake],
            residual_energy=residual_energy(out).double().cpu().numpy(),
        )

    def predict(
        self,
        images: Iterable[Input],
        *,
        batch_size: int = 8,
        limits: DecodeLimits | None = None,
    ) -> list[Verdict]:
        """Verdicts of images, in their order; a bad one is a failed row.

        images: paths, bytes of files, Pillow images, uint8 arrays (RGB (H, W, 3) or grey (H, W)), binary files. Raises
        `TypeError` or `ValueError` for anything else, before any image is read.

        Decodes in this process: for files from strangers use `nsnet predict`, which guards against decoders that crash.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        given = checked(images)
        config = self.preparation(limits)
        verdicts: list[Verdict] = []
        for start in range(0, len(given), batch_size):
            verdicts += self.predict_prepared(
                [try_prepare(image, config) for image in given[start : start + batch_size]]
            )
        return verdicts

    def predict_prepared(self, images: Sequence[Prepared | ImageError]) -> list[Verdict]:
        """Verdicts of prepared images, as one batch; errors become failed verdicts in their place."""
        self._check_captioner()
        verdicts = [failed_verdict(image) if isinstance(image, ImageError) else None for image in images]
        good = [(i, image) for i, image in enumerate(images) if isinstance(image, Prepared)]
        captions: list[str | None] = [None] * len(good)
        if good and self.captioner is not None:
            captions = self.captioner.caption(np.stack([image.thumbnail for _, image in good]))
            for (i, _), caption in zip(good, captions, strict=True):
                if caption is None:
                    verdicts[i] = failed_verdict(CaptionError("the captioner gave no word"))
            good = [(i, image) for i, image in good if verdicts[i] is None]
            captions = [caption for caption in captions if caption is not None]
        if good:
            slot_seed = self.config.patches.slot_seed(SCORING_SEED)
            mosaics = np.stack([assemble_mosaic(image.patches, slot_seed) for _, image in good])
            scores = self.score(mosaics, cast(list[str], captions) if self.captioner is not None else None)
            for row, (i, image) in enumerate(good):
                verdicts[i] = Verdict(
                    status="scored",
                    verdict=scores.verdict[row],
                    prob_fake=float(scores.prob_fake[row]),
                    logit=float(scores.logit[row]),
                    threshold=self.calibration.threshold,
                    caption=captions[row],
                    residual_energy=float(scores.residual_energy[row]),
                    width=image.width,
                    height=image.height,
                    format=image.format,
                )
        return cast(list[Verdict], verdicts)

    def with_calibration(self, calibration: Calibration) -> Self:
        """Set the calibration; returns the same detector."""
        self.calibration = calibration
        return self


def failed_verdict(error: ImageError) -> Verdict:
    """The verdict of an image that failed."""
    return Verdict(status="failed", error_stage=error.stage, error_class=type(error).__name__, error_message=str(error))


def _check_mosaic(config: DetectorConfig, clip: Clip) -> None:
    if clip.image_px != config.patches.mosaic_px:
        raise ConfigError(
            f"the mosaic has {config.patches.mosaic_px} px, {config.clip.model} takes {clip.image_px} px: set "
            f"mosaic_px to {clip.image_px}"
        )


def config_of(description: bundle.Description) -> DetectorConfig:
    """The configuration of a bundle that was read. Raises `BundleError` where it is of another version."""
    try:
        return from_dict(DetectorConfig, description.config)
    except ConfigError as error:
        raise BundleError(f"the bundle of detector {description.detector_id} is of another version: {error}") from error
