"""Defines everything that makes a detector and its training, except weights. Imports no torch, so that a command which
only reads configurations does not wait for it.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self, get_args

from nsnet import bundle, model_settings
from nsnet.config import added, from_dict
from nsnet.errors import BundleError, ConfigError
from nsnet.patches import PatchConfig
from nsnet.transforms import AugmentationConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""Arithmetic of the models. `auto`: fp16 on a GPU, fp32 on a CPU. On a GPU, fp32 uses TF32 for matrix products.

fp16 keeps 10 bits of the mantissa and bf16 7: with random weights, 95 % and 64 % of captions are those of fp32. What
exceeds the range of fp16 shows: the image fails, with a logit that is not finite."""


def resolved(precision: Precision, device: str) -> Precision:
    """The precision on a device, `cpu` or `cuda`."""
    if precision == "auto":
        return "fp16" if device == "cuda" else "fp32"
    return precision


Normalisation = Literal["clip", "imagenet"]
"""Mean and deviation of the channels that the image tower's input is normalised by: those that CLIP was trained with
(its own), or ImageNet's, which the authors' later code and AIGIBench's UniversalFakeDetect feed to CLIP."""

MAX_TOKENS: Final = 512
"""Largest `max_new_tokens`: the number of positions of BLIP's text decoder."""


TIMM: Final = "timm/"
"""Prefix of the names of timm's models, which are image towers without a text tower."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Selects a CLIP model, or an image tower of timm, and its weights."""

    model: str = "ViT-L-14-quickgelu"
    """open_clip's name of the architecture, or `timm/NAME`. OpenAI weights need a `-quickgelu` one, else their features
    differ."""
    pretrained: str | None = "openai"
    """open_clip's or timm's tag of the weights; None: seeded random weights."""
    architecture: dict[str, Any] | None = None
    """open_clip model configuration (`embed_dim`, `vision_cfg`, `text_cfg`) instead of the one of that name."""
    seed: int = 0
    """Seed of random weights."""

    def __post_init__(self) -> None:
        # open_clip and timm would load from "hf-hub:…" and "local-dir:…"
        for name, value in (("model", self.model.removeprefix(TIMM)), ("pretrained", self.pretrained or "none")):
            if not re.fullmatch(r"[\w.-]+", value):
                raise ConfigError(f"{name} must be a name that open_clip knows, got {getattr(self, name)[:100]!r}")
        if self.architecture is not None and not self.has_text:
            raise ConfigError(f"architecture: {self.model} is defined by its name; give None")
        if self.architecture is not None and (
            reason := model_settings.complaint(self.architecture, model_settings.ARCHITECTURE)
        ):
            raise ConfigError(f"architecture: {reason[:400]}; settings that download or select code are not allowed")

    @property
    def has_text(self) -> bool:
        """Whether the model has a text tower."""
        return not self.model.startswith(TIMM)


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig:
    """Selects a captioner and its generation settings."""

    model: str | None = "Salesforce/blip-image-captioning-base"
    """Hub repository of a BLIP model in transformers' format; None: a tiny BLIP with seeded random weights."""
    revision: str | None = None
    """Commit of the repository; None: the pinned one."""
    max_new_tokens: int = 40
    """Longest caption, in tokens: at most `MAX_TOKENS`."""
    seed: int = 0
    """Seed of the tiny BLIP's weights."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= MAX_TOKENS:
            raise ConfigError(f"max_new_tokens must be between 1 and {MAX_TOKENS}, got {self.max_new_tokens}")
        if not abs(self.seed) < 2**63:
            raise ConfigError(f"the seed of a captioner must fit into 64 bits, got {self.seed}")
        for name, pattern in (("model", r"\w[\w.-]*(/\w[\w.-]*)?"), ("revision", r"\w[\w.-]*")):
            if (value := getattr(self, name)) is not None and not re.fullmatch(pattern, value):
                raise ConfigError(f"captioner: {name} must be a name on the hub, got {value[:100]!r}")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Settings of the image tower's adapters."""

    rank: int = 6
    """Rank R; 0: no adapters."""
    alpha: float = 6.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapter, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"need rank ≥ 0, alpha > 0 and 0 ≤ dropout < 1, got {self.rank}, {self.alpha}, {self.dropout}"
            )


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Selects what is removed from the image feature."""

    kind: Literal["per_sample", "mapped_and_raw", "rank_k", "global", "none"] = "per_sample"
    """`per_sample`: the mapped caption (eq. 16); `mapped_and_raw`: that and the caption feature itself; `rank_k`: the
    mapped caption and its nearest captions of a bank, also mapped; `global`: a basis of many captions (eq. 15);
    `none`: nothing."""
    rank: int = 0
    """`global`: R of the basis, 0 before it is computed; `rank_k`: number of directions; else 0."""
    bank: int = 0
    """N captions of `rank_k`'s bank, 0 before it is made."""

    def __post_init__(self) -> None:
        if self.kind not in ("per_sample", "mapped_and_raw", "rank_k", "global", "none"):
            raise ConfigError(
                f"unknown projection {self.kind!r}: choose per_sample, mapped_and_raw, rank_k, global or none"
            )
        least = {"rank_k": 2, "global": 0}.get(self.kind)
        unwanted = (least is None and self.rank) or (self.kind != "rank_k" and self.bank)
        if self.rank < (least or 0) or self.bank < 0 or unwanted:
            raise ConfigError(
                f"a global projection needs rank ≥ 1, rank_k needs rank ≥ 2 and a bank, other kinds allow neither; got "
                f"{self.kind}, rank {self.rank}, bank {self.bank}"
            )
        if 0 < self.bank < self.rank:  # the bank may contain the image's own caption
            raise ConfigError(
                f"{self.rank} directions of rank_k need a bank of at least {self.rank} captions, got "
                f"{self.bank}: choose fewer directions, or caption more images"
            )

    @property
    def needs_captions(self) -> bool:
        """Whether scoring an image needs its caption."""
        return self.kind in ("per_sample", "mapped_and_raw", "rank_k")

    @property
    def fitted(self) -> bool:
        """Whether the basis or bank, if one is needed, has been computed from captions."""
        return {"global": self.rank, "rank_k": self.bank}.get(self.kind, 1) > 0


@dataclass(frozen=True, kw_only=True)
class BasisRule:
    """The rule for the number of semantic directions of the captions' spectrum: exactly one of the three."""

    rank: int | None = None
    """This number of directions."""
    tau: float | None = None
    """All directions with a singular value above tau times the largest (the paper: 1e-6)."""
    energy: float | None = None
    """The fewest directions that hold this share of Σ σ²."""

    def __post_init__(self) -> None:
        given = [value for value in (self.rank, self.tau, self.energy) if value is not None]
        if len(given) != 1 or not given[0] > 0 or (self.rank is None and given[0] > 1):
            raise ConfigError(
                f"choose exactly one of rank ≥ 1, 0 < tau ≤ 1 and 0 < energy ≤ 1, got {self.rank}, {self.tau}, "
                f"{self.energy}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a rule such as `rank=64`, `tau=1e-6` or `energy=0.9`. Raises `ConfigError`."""
        name, _, value = text.partition("=")
        try:
            number: Any = int(value) if name == "rank" else float(value)
            return cls(**{name: number})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{text!r} is not a rule: give rank=64, tau=1e-6 or energy=0.9, for example") from error

    def __str__(self) -> str:
        return next(f"{name}={value}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class MapperConfig:
    """Size and dropout of the semantic mapper."""

    hidden_dim: int = 1024
    """Width h of the hidden layer; 0: no mapper, the caption feature itself is removed."""
    dropout: float = 0.1
    """Dropout after the hidden activation, in [0, 1). The paper uses none, its published code 0.1."""
    detached: bool = added(False)
    """Only the alignment trains the mapper: no gradient of the detection losses reaches it through the projection. They
    may otherwise teach it to write what helps them into ũ, such as the caption."""

    def __post_init__(self) -> None:
        if self.hidden_dim < 0 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"need hidden_dim ≥ 0 and 0 ≤ dropout < 1, got {self.hidden_dim} and {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Kind and sizes of the projection head."""

    kind: Literal["mlp", "linear"] = "mlp"
    """`mlp`: the paper's. `linear`: the logit directly from ũ, UniversalFakeDetect's probe (arXiv 2302.10174)."""
    hidden_dim: int = 768
    """Width of the hidden layer."""
    feature_dim: int = 512
    """Dimension d_f of the unit-length feature f."""

    def __post_init__(self) -> None:
        if self.kind not in ("mlp", "linear"):
            raise ConfigError(f"the head's kind must be 'mlp' or 'linear', got {self.kind!r}")
        if self.hidden_dim < 1 or self.feature_dim < 1:
            raise ConfigError(f"head sizes must be positive, got {self.hidden_dim} and {self.feature_dim}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objective."""

    temperature: float = 0.07
    """τ of the contrastive loss."""
    contrastive_weight: float = 1.0
    """γ of the contrastive loss; 1 in the paper."""
    bce_weight: float = 0.2
    """α of the binary cross-entropy."""
    alignment_weight: float = 0.3
    """β of the alignment."""
    alignment_reduction: Literal["mean", "sum"] = "mean"
    """Over D: the published numbers used `mean`; `sum` is exactly eq. 20 and D times larger."""
    decorrelation_weight: float = added(0.0)
    """δ of `losses.decorrelation`, a penalty on what ũ says of the caption; without captions it has no effect."""

    def __post_init__(self) -> None:
        weights = (self.contrastive_weight, self.bce_weight, self.alignment_weight, self.decorrelation_weight)
        if not (self.temperature > 0 and all(weight >= 0 for weight in weights) and max(weights[:2]) > 0):
            raise ConfigError(
                f"need temperature > 0 and weights ≥ 0, one of the contrastive and the bce weight > 0, got temperature "
                f"{self.temperature}, contrastive_weight {self.contrastive_weight}, bce_weight {self.bce_weight}, "
                f"alignment_weight {self.alignment_weight}, decorrelation_weight {self.decorrelation_weight}"
            )
        if self.alignment_reduction not in ("mean", "sum"):
            raise ConfigError(f"alignment_reduction must be 'mean' or 'sum', got {self.alignment_reduction!r}")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Everything that defines a detector, except its weights."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    patches: PatchConfig = field(default_factory=PatchConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    mapper: MapperConfig = field(default_factory=MapperConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train_backbone: bool = False
    """Train the whole image tower, not only its adapters; used if the tower starts from random weights."""
    normalisation: Normalisation = added("clip")
    """Normalisation of the image tower's input."""
    text: ClipConfig | None = added(None)
    """The model whose text tower encodes captions, for an image tower without one; None: `clip` itself."""

    def __post_init__(self) -> None:
        if self.normalisation not in get_args(Normalisation):
            raise ConfigError(f"normalisation must be 'clip' or 'imagenet', got {self.normalisation!r}")
        mapped = self.projection.needs_captions and self.mapper.hidden_dim > 0
        if mapped and self.mapper.detached and not self.loss.alignment_weight:
            raise ConfigError(
                "a detached mapper learns from the alignment only, and alignment_weight is 0: give it a weight > 0, or "
                "set mapper.detached=false"
            )
        self._check_text()

    def _check_text(self) -> None:
        """Raise `ConfigError` unless the projection fits the text tower."""
        if self.text is not None and (self.clip.has_text or not self.text.has_text):
            raise ConfigError(
                f"a separate text tower must be an open_clip model beside an image tower timm/NAME, got "
                f"{self.text.model} beside {self.clip.model}"
            )
        kind = self.projection.kind
        if kind != "none" and self.text_tower is None:
            raise ConfigError(
                f"{self.clip.model} has no text tower, which the projection {kind} needs: choose the projection none, "
                "or add a separate text tower"
            )
        if self.text is not None and (
            kind in ("global", "mapped_and_raw") or (self.projection.needs_captions and self.mapper.hidden_dim == 0)
        ):
            raise ConfigError(
                f"captions of {self.text.model} lie in another space than images of {self.clip.model}, so that only "
                f"mapped captions can be removed; got the projection {kind} and a mapper of width "
                f"{self.mapper.hidden_dim}: choose per_sample, rank_k or none, with mapper.hidden_dim ≥ 1"
            )

    @property
    def text_tower(self) -> ClipConfig | None:
        """The model whose text tower encodes captions; None: there is none."""
        return self.text or (self.clip if self.clip.has_text else None)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of training."""

    epochs: int = 2
    """Passes over the training images."""
    batch_size: int = 64
    """Images per optimisation step, over all processes; they are each other's positives and negatives."""
    head_lr: float = 2e-4
    """Highest learning rate of mapper and head."""
    backbone_lr: float = 1e-4
    """Highest learning rate of the adapters, and of the image tower if it is trained."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only; with 0 it is Adam."""
    warmup: float = 0.05
    """Share of the steps in which the rates increase to their highest; 0: none."""
    schedule: Literal["cosine", "constant"] = added("cosine")
    """Rates after the warm-up: a cosine to 0, or the highest."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 on a GPU, fp32 on a CPU. fp16 would need a scaled loss."""
    micro_batch: int = 0
    """Maximum images of a process in one forward pass; 0: all of its rows. Fewer images need less memory and one more
    forward pass; losses and gradients stay those of the whole batch (gradient caching, arXiv 2101.06983)."""
    activation_checkpointing: bool = False
    """Recompute the image tower's activations in the backward pass instead of storing them."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random transforms of training images before patch selection, drawn again in every epoch."""
    captions: Literal["own", "constant", "shuffled"] = "own"
    """Source of an image's caption in training and validation; the others are controls of an ablation."""
    validation_share: float = 0.15
    """Share of a dataset without splits that is used for validation, in (0, 1)."""
    test_share: float = 0.15
    """Share of such a dataset that is used for the test, in [0, 1)."""
    patience: int = 0
    """Epochs without a better validation AP after which training stops; 0: no early stop."""
    checkpoint_steps: int = 200
    """Steps between checkpoints within an epoch; 0: only at its end."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigError(f"need epochs ≥ 1 and batch_size ≥ 2, got {self.epochs} and {self.batch_size}")
        if not (self.head_lr > 0 and self.backbone_lr > 0 and self.weight_decay >= 0 and self.clip_norm > 0):
            raise ConfigError("learning rates and clip_norm must be positive, weight_decay at least 0")
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError(f"need 0 ≤ warmup < 1, got {self.warmup}")
        if not 0.0 < self.validation_share < 1.0 or not 0.0 <= self.test_share < 1.0 - self.validation_share:
            raise ConfigError(
                "need validation_share > 0, test_share ≥ 0 and a sum below 1, got "
                f"{self.validation_share:g} and {self.test_share:g}"
            )
        if min(self.micro_batch, self.patience, self.checkpoint_steps) < 0:
            raise ConfigError(
                f"need micro_batch, patience and checkpoint_steps ≥ 0, got {self.micro_batch}, {self.patience}, "
                f"{self.checkpoint_steps}"
            )
        if self.captions not in ("own", "constant", "shuffled"):
            raise ConfigError(f"captions must be own, constant or shuffled, got {self.captions!r}")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule must be cosine or constant, got {self.schedule!r}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"precision must be auto, fp32 or bf16, got {self.precision!r}")


def config_of(description: bundle.Description) -> DetectorConfig:
    """Return the configuration of a bundle. Raises `BundleError` if it is of another version."""
    try:
        return from_dict(DetectorConfig, description.config)
    except ConfigError as error:
        raise BundleError(f"the bundle of detector {description.detector_id} is of another version: {error}") from error
