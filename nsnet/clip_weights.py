"""Finds the weights of CLIP towers by name, and identifies them. Imports no torch."""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from nsnet import digest, hub, imports
from nsnet.configuration import TIMM, ClipConfig
from nsnet.errors import ConfigError, WeightsError

PINNED_REVISIONS: Final = {"timm/vit_large_patch14_clip_224.openai": "18d0535469bb561bf468d76c1d73aa35156c922b"}
"""Hub repository -> commit. Other repositories are used at `main`; the digest of their weights is recorded."""

WEIGHTS_FILE: Final = "open_clip_model.safetensors"
CONFIG_FILE: Final = "open_clip_config.json"
CLIP_WEIGHTS: Final = "--clip-weights"
TEXT_WEIGHTS: Final = "--text-weights"
"""Options that name local weights, for errors."""
TIMM_WEIGHTS_FILE: Final = "model.safetensors"
TOKENIZER_FILE: Final = "tokenizer_config.json"
"""The file of a tokenizer that every one has."""


def known_models() -> list[str]:
    """Names of all architectures that open_clip can build."""
    open_clip = imports.open_clip()
    return list(open_clip.list_models())


def activation_fits(model: str, tag: str) -> bool:
    """Whether weights were trained with the activation of an architecture (quick_gelu or not); else features differ."""
    open_clip = imports.open_clip()
    trained_with = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu")
    return bool(trained_with) == bool((open_clip.get_model_config(model) or {}).get("quick_gelu"))


def timm_settings(config: ClipConfig) -> Any:
    """timm's settings of a tower and its weights (`PretrainedCfg`). Raises `ConfigError` for an unknown name or tag."""
    timm = imports.timm()
    name = config.model.removeprefix(TIMM)
    if not timm.is_model(name) or "." in name:
        raise ConfigError(f"timm has no model {name!r}: choose one of timm.list_models()")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{name}.*", pretrained=True)]
    if config.pretrained is not None and config.pretrained not in tags:
        raise ConfigError(
            f"timm has no weights {config.pretrained!r} for {name}; its tags: {', '.join(tags) or 'none'}"
        )
    settings = timm.get_pretrained_cfg(f"{name}.{config.pretrained}" if config.pretrained else name)
    if settings is None:
        raise ConfigError(f"timm does not say what images {name} takes: choose a model that has published weights")
    return settings


def find_weights(config: ClipConfig, weights: Path | None = None, *, option: str = CLIP_WEIGHTS) -> Path | None:
    """Return the file or folder of the weights: the given one, or from the hub or its cache; None: seeded random.

    `option`: the option that names local weights. Raises `WeightsError` with the command that downloads missing weights
    or a missing tokenizer. Loads nothing.
    """
    if weights is not None:
        _check_given(config, weights, option)
    if weights is None or not weights.is_dir():
        find_tokenizer(config, option)
    if weights is not None or config.pretrained is None:
        return weights
    repository, file = _published(config, option)
    return _fetch(repository, file, option=f"{option} with the file")


def _check_given(config: ClipConfig, weights: Path, option: str) -> None:
    """Raise `WeightsError` if a given path is not weights of this kind of model."""
    if not weights.exists():
        raise WeightsError(f"{option} {weights} does not exist")
    if weights.is_dir() and not (weights / CONFIG_FILE).is_file():
        if not config.has_text:
            raise WeightsError(f"{option} {weights} is a folder without {CONFIG_FILE}: give its {TIMM_WEIGHTS_FILE}")
        its_format = "it has transformers' format; " if (weights / "config.json").is_file() else ""
        raise WeightsError(
            f"{option} {weights} is a folder without {CONFIG_FILE} (open_clip's format); {its_format}give a "
            f"folder or file in open_clip's format, such as the {WEIGHTS_FILE} of the same model on the hub"
        )


def find_tokenizer(config: ClipConfig, option: str = CLIP_WEIGHTS) -> Path | None:
    """Return the hub's folder of a model's tokenizer; None: open_clip has it, as that of OpenAI's models.

    Raises `WeightsError` if it is neither in the local cache nor can be downloaded: files of weights hold none.
    """
    if not config.has_text or config.architecture is not None:
        return None
    described = imports.open_clip().get_model_config(config.model) or {}
    if repository := described.get("text_cfg", {}).get("hf_tokenizer_name"):
        return _fetch(
            repository, TOKENIZER_FILE, wanted="",
            option=f"{option} with a folder in open_clip's format, which holds the tokenizer",
        ).parent  # fmt: skip
    return None


def _published(config: ClipConfig, option: str) -> tuple[str, str]:
    """Hub repository and file of the weights of a model. Raises `ConfigError` or `WeightsError` if there are none."""
    if not config.has_text:
        settings = timm_settings(config)
        if not settings.hf_hub_id:
            raise WeightsError(f"the weights of {config.model} are not on the hub; download them and pass {option}")
        return settings.hf_hub_id, settings.hf_hub_filename or TIMM_WEIGHTS_FILE
    assert config.pretrained is not None
    open_clip = imports.open_clip()
    source = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    if not source:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.model)) or "none"
        raise ConfigError(f"open_clip has no weights {config.pretrained!r} for {config.model}; its tags: {tags}")
    if not activation_fits(config.model, config.pretrained):
        raise ConfigError(
            f"the weights {config.pretrained!r} and the architecture {config.model} differ in their activation "
            f"(quick_gelu), which would change the features; choose the model with or without '-quickgelu'"
        )
    repository, _, filename = str(source.get("hf_hub") or "").rpartition("/")  # "owner/name/" or "owner/name/file"
    if not repository:
        raise WeightsError(
            f"the weights {config.pretrained!r} of {config.model} are not on the hub; download them and pass {option}"
        )
    return repository, filename or WEIGHTS_FILE


def _fetch(repository: str, file: str, *, option: str, wanted: str | None = None) -> Path:
    """Path of a file of a hub repository, from the local cache or the hub; see `hub.fetch`."""
    revision = PINNED_REVISIONS.get(repository)

    def download(local_files_only: bool) -> Path:
        import huggingface_hub  # slow to import; needed only for weights by name

        return Path(
            huggingface_hub.hf_hub_download(repository, file, revision=revision, local_files_only=local_files_only)
        )

    return hub.fetch(
        download, repository, revision, probe=file, wanted=file if wanted is None else wanted, option=option
    )


def text_tower_id(config: ClipConfig, weights: Path | None) -> str:
    """Identity of a frozen text tower, 16 hexadecimal digits: equal ids give a caption equal features.

    `weights`: the result of `find_weights`. Loads nothing; takes about 1 s per GB.
    """
    files = tower_files(weights) if weights is not None else []
    identity = [config.model, config.architecture, files or config.seed]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def tower_files(weights: Path) -> list[list[str]]:
    """Name and SHA-256 of each file that the features of a tower depend on: one file, or those of a folder."""
    if not weights.is_dir():
        return [[weights.name, digest.known_digest(weights)]]
    return digest.identity(
        weights, [path.name for path in weights.iterdir() if path.name != digest.ORIGIN and path.is_file()]
    )
