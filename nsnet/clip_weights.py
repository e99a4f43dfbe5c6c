"""Finds the weights of CLIP towers by name, and identifies them. Imports no torch."""

import hashlib
import json
from pathlib import Path
from typing import Final

from nsnet import hub, imports
from nsnet.configuration import ClipConfig
from nsnet.digest import file_digest
from nsnet.errors import ConfigError, WeightsError

PINNED_REVISIONS: Final = {"timm/vit_large_patch14_clip_224.openai": "18d0535469bb561bf468d76c1d73aa35156c922b"}
"""Hub repository -> commit. Other repositories are used at `main`; the digest of their weights is recorded."""

WEIGHTS_FILE: Final = "open_clip_model.safetensors"
CONFIG_FILE: Final = "open_clip_config.json"


def known_models() -> list[str]:
    """Names of all architectures that open_clip can build."""
    open_clip = imports.open_clip()
    return list(open_clip.list_models())


def activation_fits(model: str, tag: str) -> bool:
    """Whether weights were trained with the activation of an architecture (quick_gelu or not); else features differ."""
    open_clip = imports.open_clip()
    trained_with = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu")
    return bool(trained_with) == bool((open_clip.get_model_config(model) or {}).get("quick_gelu"))


def find_weights(config: ClipConfig, weights: Path | None = None) -> Path | None:
    """Return the file or folder of the weights: the given one, or from the hub or its cache; None: seeded random.

    Raises `WeightsError` with the command that downloads missing weights. Loads nothing.
    """
    if weights is not None:
        if not weights.exists():
            raise WeightsError(f"--clip-weights {weights} does not exist")
        if weights.is_dir() and not (weights / CONFIG_FILE).is_file():
            its_format = "it has transformers' format; " if (weights / "config.json").is_file() else ""
            raise WeightsError(
                f"--clip-weights {weights} is a folder without {CONFIG_FILE} (open_clip's format); {its_format}give a "
                f"folder or file in open_clip's format, such as the {WEIGHTS_FILE} of the same model on the hub"
            )
        return weights
    if config.pretrained is None:
        return None
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
            f"the weights {config.pretrained!r} of {config.model} are not on the hub; download them and pass "
            "--clip-weights"
        )
    revision, file = PINNED_REVISIONS.get(repository), filename or WEIGHTS_FILE

    def download(local_files_only: bool) -> Path:
        import huggingface_hub  # slow to import; needed only for weights by name

        return Path(
            huggingface_hub.hf_hub_download(repository, file, revision=revision, local_files_only=local_files_only)
        )

    return hub.fetch(download, repository, revision, probe=file, wanted=file, option="--clip-weights with the file")


def text_tower_id(config: ClipConfig, weights: Path | None) -> str:
    """Identity of a frozen text tower, 16 hexadecimal digits: equal ids give a caption equal features.

    `weights`: the result of `find_weights`. Loads nothing; takes about 1 s per GB.
    """
    files = sorted(path for path in weights.iterdir() if path.is_file()) if weights and weights.is_dir() else [weights]
    digests = [[path.name, file_digest(path)] for path in files if path is not None]
    identity = [config.model, config.architecture, digests or config.seed]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
