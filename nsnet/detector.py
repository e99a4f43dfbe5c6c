"""Defines the detector, which composes captioner, CLIP, mapper, projection, head and calibration.

Dimensions: B images, M mosaic side, D embedding.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
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
from nsnet.captioner import Captioner
from nsnet.clip import Clip, load_clip
from nsnet.clip_weights import CLIP_WEIGHTS, TEXT_WEIGHTS, find_weights
from nsnet.config import from_dict, to_dict
from nsnet.configuration import ClipConfig, DetectorConfig, Precision, config_of, resolved
from nsnet.errors import (
    BundleError,
    CaptionError,
    ConfigError,
    ImageError,
    NsnetError,
    WeightsError,
)
from nsnet.images import DecodeLimits
from nsnet.inputs import Input, checked, try_prepare
from nsnet.lora import add_lora, fuse_attention, has_lora, merge_lora, save_lora
from nsnet.model_size import ModelSize
from nsnet.network import Features, Network, residual_energy
from nsnet.patches import SCORING_SEED
from nsnet.precision import autocast, dtype_of, speed_up, to_device, use_matrix_units
from nsnet.preparation import PreparationConfig, Prepared, assemble_mosaics
from nsnet.text_features import TextFeatures


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result for one image. A failed image has `status` failed and the error, but no verdict."""

    status: Literal["scored", "failed"]
    verdict: Label | None = None
    prob_fake: float | None = None
    """Calibrated P(fake), in [0, 1]."""
    logit: float | None = None
    threshold: float | None = None
    """Smallest `prob_fake` with the verdict fake."""
    caption: str | None = None
    """The caption, whose semantics the projection removed."""
    residual_energy: float | None = None
    """‖ũ‖/‖u‖, the share of the image feature that remains after the projection."""
    prob_spread: float | None = None
    """Largest minus smallest P(fake) of the views; None for one view."""
    views_agree: bool | None = None
    """Whether all views lie on the same side of the threshold."""
    width: int | None = None
    height: int | None = None
    format: str | None = None
    c2pa_state: str | None = None
    """What the file says about its origin: see `nsnet.provenance.Provenance`. It does not change the verdict."""
    c2pa_generator: str | None = None
    digital_source_type: str | None = None
    metadata_generator: str | None = None
    error_stage: str | None = None
    error_class: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Results for a batch; arrays (B,) fp64."""

    logit: npt.NDArray[np.float64]
    prob_fake: npt.NDArray[np.float64]
    verdict: list[Label]
    residual_energy: npt.NDArray[np.float64]
    prob_spread: npt.NDArray[np.float64] | None = None
    views_agree: npt.NDArray[np.bool_] | None = None
    """As in `Verdict`; None for one view."""


class Detector:
    """A detector on one device. `load` reads a trained one; `build` makes one to train."""

    def __init__(
        self,
        config: DetectorConfig,
        clip: Clip,
        network: Network,
        *,
        captioner: Captioner | None = None,
        calibration: Calibration | None = None,
        description: bundle.Description | None = None,
        text: Clip | None = None,
    ) -> None:
        """`text`: the model of `DetectorConfig.text`, if captions are needed."""
        self.config = config
        self.clip = clip
        self.text = text
        self.network = network
        self.captioner = captioner
        self.calibration = calibration or Calibration()
        self.description = description
        self.device = torch.device("cpu")
        self.precision: Precision = "fp32"
        """Arithmetic of the towers."""
        self.text_features = TextFeatures(self.text_clip)

    @property
    def text_clip(self) -> Clip:
        """The model whose text tower encodes captions."""
        return self.text or self.clip

    @property
    def detector_id(self) -> str | None:
        """Identity of the bundle that this detector was loaded from; None for a built detector."""
        return self.description.detector_id if self.description else None

    @classmethod
    def build(
        cls,
        config: DetectorConfig,
        clip_weights: Path | None = None,
        *,
        text_weights: Path | None = None,
        seed: int = 0,
    ) -> Self:
        """Build a detector to train: adapters at zero, seeded random mapper and head, no captioner.

        `text_weights`: local path of the weights of a separate text tower. Raises `WeightsError` or `ConfigError` if
        weights, architecture and configuration do not fit each other.
        """
        clip = load_clip(config.clip, find_weights(config.clip, clip_weights))
        _check_mosaic(config, clip)
        text = None
        if config.text is not None and config.projection.needs_captions:
            text = load_clip(config.text, find_weights(config.text, text_weights, option=TEXT_WEIGHTS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            visual = add_lora(clip.visual, config.lora) if config.lora.rank else clip.visual
            network = _network(config, visual, clip, text)
        if config.train_backbone:
            network.visual.requires_grad_(True)
        return cls(config, clip, network, text=text)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        precision: Precision = "auto",
        compiled: bool = False,
        clip_weights: Path | None = None,
        text_weights: Path | None = None,
        captioner: Path | Literal[False] | None = None,
        sha256: str | None = None,
    ) -> Self:
        """Load a bundle for inference: adapters merged, everything frozen.

        `precision`: arithmetic of the towers and of the captioner. `compiled`: compile the image towers, which takes a
        minute, or seconds if this machine has compiled them before. `clip_weights`, `text_weights`, `captioner`: local
        paths instead of the hub; `captioner=False` loads none (no `predict`). If the detector needs no captions, no
        captioner and no separate text tower is loaded. `sha256`: as in `bundle.read`. Raises `BundleError` (missing,
        damaged, other version, not the pinned one) or `WeightsError` (base weights missing or different).
        """
        folder = Path(path)
        description = bundle.read(folder, sha256)
        config = config_of(description)
        try:
            calibration = from_dict(Calibration, description.calibration)
        except ConfigError as error:
            raise BundleError(f"the bundle {folder} is of another version: {error}") from error
        weights = _weights_of(folder, bundle.CLIP, config.clip, clip_weights, CLIP_WEIGHTS)
        clip, text = load_clip(config.clip, weights), None
        clip_digest, _, text_digest = description.clip_digest.partition(bundle.DIGESTS)
        _check_digest(clip, clip_digest, description.detector_id, CLIP_WEIGHTS)
        if config.text is not None and config.projection.needs_captions:
            text = load_clip(config.text, _weights_of(folder, bundle.TEXT, config.text, text_weights, TEXT_WEIGHTS))
            _check_digest(text, text_digest, description.detector_id, TEXT_WEIGHTS)
            text.visual = nn.Identity()  # nothing uses this image tower
        try:
            _check_mosaic(config, clip)
            size = ModelSize([weights, folder / bundle.LORA, folder / bundle.NETWORK])
            with torch.random.fork_rng(devices=[]), size:  # modules draw random weights; the caller's generator is kept
                if (folder / bundle.LORA).is_dir():
                    merged = merge_lora(clip.visual, folder / bundle.LORA)
                    if (merged.rank, merged.alpha) != (config.lora.rank, config.lora.alpha):
                        raise BundleError("the settings of its adapters are not those of detector.json")
                network = _network(config, clip.visual, clip, text)
            mismatch = network.load_state_dict(load_file(folder / bundle.NETWORK), strict=False)
        except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError, NsnetError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"the bundle {folder} does not fit its configuration: {reason}") from error
        names = [name for name in mismatch.missing_keys if not name.startswith("visual.")] + mismatch.unexpected_keys
        if names:
            raise BundleError(f"the bundle {folder} does not fit its configuration: {', '.join(names)}")
        loaded_captioner = None
        if captioner is not False and config.projection.needs_captions:
            loaded_captioner = Captioner.load(
                config.captioner, captioner or bundle.captioner_of(folder), device, precision=precision,
                compile_vision=compiled,
            )  # fmt: skip
        loaded = cls(
            config, clip, network, captioner=loaded_captioner, calibration=calibration, description=description,
            text=text,
        )  # fmt: skip
        loaded.network.requires_grad_(False).eval()
        loaded.to(device)._for_inference(precision)
        if compiled:
            loaded.network.visual.compile(dynamic=False)
        return loaded

    def to(self, device: str) -> Self:
        """Move the towers and heads to a device."""
        self.device = torch.device(device)
        for clip in self._clips:
            clip.model.to(self.device)
        self.network.to(self.device)
        self.text_features = TextFeatures(self.text_clip)
        return self

    def _for_inference(self, precision: Precision) -> Self:
        """Choose the arithmetic of the towers, which are frozen."""
        self.precision = resolved(precision, self.device.type)
        use_matrix_units(self.device)
        for clip in self._clips:
            clip.precision = self.precision
            speed_up(clip.model, self.precision, self.device)
        return self

    @property
    def _clips(self) -> list[Clip]:
        """The models of this detector: one, or two if captions have a separate text tower."""
        return [self.clip, *([self.text] if self.text is not None else [])]

    def save(
        self,
        path: str | Path,
        *,
        captioner: Path | None = None,
        training: dict[str, Any] | None = None,
    ) -> bundle.Description:
        """Write a bundle to a folder that is empty or does not exist. `captioner`: transformers folder to include.

        A pretrained, frozen CLIP is recorded by name and digest; a CLIP with random or trained weights is included.
        """
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BundleError(f"{folder} exists and is not empty; choose another folder for the detector")
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
            if self.text is not None:
                digest += bundle.DIGESTS + self.text.digest()
                if self.text.config.pretrained is None:
                    self.text.save(partial / bundle.TEXT)
            if captioner is not None:  # loaded and saved: pickled weights become safetensors
                Captioner(captioner, self.config.captioner).save(partial / bundle.CAPTIONER)
            description = bundle.seal(
                partial,
                config=to_dict(self.config),
                calibration=to_dict(self.calibration),
                training=training or {},
                clip_digest=digest,
            )
            for path in (partial, *partial.rglob("*")):  # safetensors and tempfile allow access to the owner only
                path.chmod(0o755 if path.is_dir() else 0o644)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        return description

    @contextmanager
    def _base_towers(self) -> Iterator[Clip]:
        """Yield CLIP in open_clip's own modules, with the base weights of the image tower and without adapters."""
        adapted = self.network.visual
        if not has_lora(adapted):
            yield self.clip
            return
        split = self.clip.visual
        self.clip.visual = cast(nn.Module, deepcopy(adapted).unload())
        fuse_attention(self.clip.visual)
        try:
            yield self.clip
        finally:
            self.clip.visual = split

    def preparation(self, limits: DecodeLimits | None = None, anchors: str = "", views: int = 1) -> PreparationConfig:
        """Return the settings by which images are prepared for this detector. See `PreparationConfig`."""
        self._check_captioner()
        return PreparationConfig(
            thumbnail_px=self.captioner.thumbnail_px if self.captioner is not None else 0,
            patches=(self.config.patches,),
            views=views,
            limits=limits or DecodeLimits(),
            provenance=True,
            anchors=anchors,
        )

    def _check_captioner(self) -> None:
        if self.captioner is None and self.config.projection.needs_captions:
            raise ConfigError("this detector was loaded without its captioner")

    @torch.inference_mode()
    def features(self, mosaics: npt.NDArray[np.uint8], captions: Sequence[str] | None) -> Features:
        """Compute the network's output for mosaics (B, M, M, 3) uint8; arguments as for `score`."""
        self.network.eval()  # a built detector is in training mode
        text_features = None
        if self.config.projection.needs_captions:
            if captions is None:
                raise ConfigError("this detector needs a caption for each image")
            text_features = self.text_features.of(captions)
        with autocast(dtype_of(self.precision, self.device), self.device):
            image = self.network.encode_image(to_device(mosaics, self.device))
        return self.network.judge(image.float() if self.precision != "fp32" else image, text_features)

    @torch.inference_mode()
    def score(self, mosaics: npt.NDArray[np.uint8], captions: Sequence[str] | None) -> Scores:
        """Score mosaics (B, M, M, 3) uint8 with their captions, without dropout, the towers in this precision.

        `captions` may be None if the detector needs none.
        """
        out = self.features(mosaics, captions)
        # one transfer for both, because each waits for the GPU
        logit, energy = torch.stack([out.logit.double(), residual_energy(out).double()]).cpu().numpy()
        prob_fake = self.calibration.probability(logit)
        return Scores(
            logit=logit,
            prob_fake=prob_fake,
            verdict=[self.calibration.verdict(float(p)) for p in prob_fake],
            residual_energy=energy,
        )

    def score_views(self, views: Sequence[npt.NDArray[np.uint8]], captions: Sequence[str] | None) -> Scores:
        """Score the views of B images, (B, M, M, 3) uint8 each: the results of the first, and how far the others agree.

        `captions`: as in `score`.
        """
        scores = [self.score(mosaics, captions) for mosaics in views]
        if len(scores) == 1:
            return scores[0]
        prob_fake = np.stack([score.prob_fake for score in scores])
        is_fake = prob_fake >= self.calibration.threshold
        agree = (is_fake == is_fake[0]).all(axis=0)
        return replace(
            scores[0],
            verdict=[
                self.calibration.verdict(float(p), bool(agreed)) for p, agreed in zip(prob_fake[0], agree, strict=True)
            ],
            prob_spread=np.ptp(prob_fake, axis=0),
            views_agree=agree,
        )

    def predict(
        self,
        images: Iterable[Input],
        *,
        batch_size: int = 8,
        limits: DecodeLimits | None = None,
        anchors: str = "",
        views: int = 1,
    ) -> list[Verdict]:
        """Return the verdicts of images, in their order; a bad image gets a failed verdict.

        images: paths, bytes of files, Pillow images, uint8 arrays (RGB (H, W, 3) or grey (H, W)), binary files. Raises
        `TypeError` or `ValueError` for anything else, before any image is read. anchors: trust list of content
        credentials, certificates in PEM. views: mosaics to judge per image, see `PreparationConfig`.

        Decodes in this process: for files from strangers use `nsnet predict`, which isolates crashing decoders.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        given = checked(images)
        config = self.preparation(limits, anchors, views)
        verdicts: list[Verdict] = []
        for start in range(0, len(given), batch_size):
            batch = given[start : start + batch_size]
            verdicts += self.predict_prepared([try_prepare(image, config) for image in batch], config)
        return verdicts

    def predict_prepared(self, images: Sequence[Prepared | ImageError], config: PreparationConfig) -> list[Verdict]:
        """Return the verdicts of prepared images, scored as one batch; an error becomes a failed verdict.

        `config`: the `preparation` that they were prepared with.
        """
        self._check_captioner()
        verdicts = [failed_verdict(image) if isinstance(image, ImageError) else None for image in images]
        good = [(i, image) for i, image in enumerate(images) if isinstance(image, Prepared)]
        captions: list[str | None] = [None] * len(good)
        if good and self.captioner is not None:
            captions = self.captioner.caption(np.stack([image.thumbnail for _, image in good]))
            for (i, _), caption in zip(good, captions, strict=True):
                if caption is None:
                    verdicts[i] = failed_verdict(CaptionError("the captioner returned an empty caption"))
            good = [(i, image) for i, image in good if verdicts[i] is None]
            captions = [caption for caption in captions if caption is not None]
        if good:
            mosaics = zip(*(assemble_mosaics(image.patches, config, SCORING_SEED) for _, image in good), strict=True)
            views = [np.stack(of_view) for of_view in mosaics]
            scores = self.score_views(views, cast(list[str], captions) if self.captioner is not None else None)
            for row, (i, image) in enumerate(good):
                verdicts[i] = Verdict(
                    status="scored",
                    verdict=scores.verdict[row],
                    prob_fake=float(scores.prob_fake[row]),
                    logit=float(scores.logit[row]),
                    threshold=self.calibration.threshold,
                    caption=captions[row],
                    residual_energy=float(scores.residual_energy[row]),
                    prob_spread=None if scores.prob_spread is None else float(scores.prob_spread[row]),
                    views_agree=None if scores.views_agree is None else bool(scores.views_agree[row]),
                    width=image.width,
                    height=image.height,
                    format=image.format,
                    **({} if image.provenance is None else asdict(image.provenance)),
                )
        return cast(list[Verdict], verdicts)

    def set_calibration(self, calibration: Calibration) -> Self:
        """Replace the calibration; returns this detector."""
        self.calibration = calibration
        return self


def failed_verdict(error: ImageError) -> Verdict:
    """Return the verdict of an image that failed."""
    return Verdict(status="failed", error_stage=error.stage, error_class=type(error).__name__, error_message=str(error))


def _network(config: DetectorConfig, visual: nn.Module, clip: Clip, text: Clip | None) -> Network:
    return Network(
        visual, clip, config.projection, config.mapper, config.head, config.normalisation,
        text_dim=text.embed_dim if text is not None else None,
    )  # fmt: skip


def _weights_of(folder: Path, kind: str, config: ClipConfig, given: Path | None, option: str) -> Path:
    """Path of a model's weights: in the bundle, or as `find_weights` finds them. Raises `BundleError`."""
    bundled = folder / kind
    weights = bundled if bundled.is_dir() else find_weights(config, given, option=option)
    if weights is None:
        raise BundleError(f"the bundle {folder} lacks {kind}/ and does not name weights of {config.model} instead")
    return weights


def _check_digest(clip: Clip, recorded: str, detector_id: str, option: str) -> None:
    digest = clip.digest()
    if digest != recorded:
        raise WeightsError(
            f"the weights of {clip.config.model} are not those that detector {detector_id} was trained on (digest "
            f"{digest[:16]}, recorded {recorded[:16]}); pass the right {option}"
        )


def _check_mosaic(config: DetectorConfig, clip: Clip) -> None:
    if clip.image_px != config.patches.mosaic_px:
        raise ConfigError(
            f"mosaic_px is {config.patches.mosaic_px}, but {config.clip.model} takes {clip.image_px} px: set "
            f"mosaic_px to {clip.image_px}"
        )
