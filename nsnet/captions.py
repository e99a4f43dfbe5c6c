"""Finds captioners, identifies them and reads what their preprocessing needs. Imports no torch."""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from nsnet import digest, hub, model_files
from nsnet.configuration import CaptionerConfig
from nsnet.errors import WeightsError

PINNED_REVISIONS: Final = {"Salesforce/blip-image-captioning-base": "82a37760796d32b1411fe092ab5d4e227313294b"}
"""Hub repository -> commit."""

NEEDED_FILES: Final = (
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    ("tokenizer.json", "vocab.txt"),
)
"""Files that a captioner's folder must hold, each with its alternatives. Without a vocabulary transformers would
silently build a default tokenizer."""


def find_captioner(config: CaptionerConfig, folder: Path | None = None) -> Path | None:
    """Return the transformers folder to load: the given one, or the hub's; None for the tiny BLIP. Loads nothing.

    Downloads only pinned repositories, because a bundle from a stranger can name any repository; others must already be
    in the cache. Raises `WeightsError` with the command that downloads the missing files.
    """
    if folder is not None:
        if missing := _missing_files(folder):
            raise WeightsError(
                f"--captioner {folder} is not a transformers BLIP folder: {', '.join(missing)} missing; give a folder "
                "that holds them"
            )
        return folder
    if config.model is None:
        return None
    model, revision = config.model, config.revision or PINNED_REVISIONS.get(config.model)

    def download(local_files_only: bool) -> Path:
        import huggingface_hub  # slow to import; needed only for weights by name

        # at the pinned commit the weights are a .bin: transformers opens it with weights_only=True
        patterns = ["*.json", "vocab.txt", "*.safetensors", "pytorch_model.bin"]
        snapshot = Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=patterns, local_files_only=local_files_only
            )
        )
        if missing := _missing_files(snapshot):
            raise FileNotFoundError(f"{', '.join(missing)} missing")
        return snapshot

    return hub.fetch(
        download, model, revision, probe="config.json", wanted="", option="--captioner with a transformers folder",
        known=model in PINNED_REVISIONS and revision == PINNED_REVISIONS[model],
    )  # fmt: skip


def _missing_files(folder: Path) -> list[str]:
    return [" or ".join(names) for names in NEEDED_FILES if not any((folder / name).is_file() for name in names)]


def thumbnail_px(folder: Path | None) -> int:
    """Side S of the thumbnails that the captioner in `folder` takes; None: the tiny BLIP. Reads no weights."""
    if folder is None:
        return TINY_SIDE_PX
    try:
        described = model_files.read_json(folder, "captioner", "config.json")
        if described["model_type"] != "blip":
            raise ValueError("another model")
        side = described["vision_config"].get("image_size")
        return int(processing(folder)[1]["size"]["height"] if side is None else side)
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder}/config.json does not describe a BLIP model ({type(error).__name__})") from error


def captioner_id(config: CaptionerConfig, folder: Path | None) -> str:
    """Identity of a captioner, 16 hexadecimal digits: equal ids give an image equal captions. Loads no weights.

    `folder`: its transformers folder; None for the tiny BLIP. Takes about 1 s per GB.
    """
    if folder is None:
        source: Any = ["tiny", config.seed]
    else:
        source = identity_files(folder)
    return hashlib.sha256(json.dumps([source, config.max_new_tokens]).encode()).hexdigest()[:16]


def identity_files(folder: Path) -> list[list[str]]:
    """Name and SHA-256 of each file that the captions of a transformers folder depend on."""
    endings = (".json", ".txt", ".safetensors", ".bin")
    return digest.identity(
        folder,
        [
            path.name
            for path in folder.iterdir()
            if path.suffix in endings and path.name != digest.ORIGIN and path.is_file()
        ],
    )


def processing(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file and settings of the captioner's image processor; transformers 5 uses another file than 4."""
    try:
        if (folder / "processor_config.json").exists():
            processor = model_files.read_json(folder, "captioner", "processor_config.json")
            if processor.get("image_processor"):
                return folder / "processor_config.json", processor["image_processor"]
        path = folder / "preprocessor_config.json"
        return path, model_files.read_json(folder, "captioner", path.name)
    except OSError as error:
        raise WeightsError(f"{error.filename} cannot be read: {error.strerror}") from error


TINY_SIDE_PX: Final = 64
