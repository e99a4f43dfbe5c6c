"""Captions images with BLIP (arXiv 2201.12086) through transformers: unconditional, batched, greedy.

Dimensions: B images, S thumbnail side in pixels.

The captioner receives pixels only, no file names or paths.
"""

import hashlib
import json
import pickle
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
import numpy.typing as npt
import torch

from nsnet import hub, model_files
from nsnet.digest import file_digest
from nsnet.errors import ConfigError, NsnetError, WeightsError
from nsnet.model_size import ModelSize

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
MAX_TOKENS: Final = 512
"""Largest `max_new_tokens`: the number of positions of BLIP's text decoder."""


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


class Captioner:
    """A BLIP captioner on one device; build it with `load`."""

    def __init__(self, folder: Path, config: CaptionerConfig, device: str = "cpu") -> None:
        """Load from a transformers folder. Raises `WeightsError` if it does not hold a complete BLIP."""
        from transformers import AutoTokenizer, BlipForConditionalGeneration  # seconds to import
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar per model load would hide the job's progress
        self.config = config
        self.device = torch.device(device)
        self.thumbnail_px = thumbnail_px(folder)
        mean, std = _normalisation(folder)
        try:
            with model_files.opened(folder, "captioner") as checked, ModelSize([checked]):
                loaded = BlipForConditionalGeneration.from_pretrained(
                    checked, local_files_only=True, output_loading_info=True, weights_only=True
                )
                model, report = cast(tuple[Any, dict[str, Any]], loaded)
                self.tokenizer = AutoTokenizer.from_pretrained(checked, local_files_only=True, trust_remote_code=False)
        except NsnetError:
            raise
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"cannot load BLIP from {folder}: its weights are damaged or hold other objects than tensors, which "
                "are refused for safety"
            ) from error
        except Exception as error:  # for a damaged file transformers raises many kinds of exceptions
            raise WeightsError(
                f"cannot load BLIP from {folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
        positions = model.config.text_config.max_position_embeddings
        if config.max_new_tokens > positions:
            raise WeightsError(
                f"the captioner in {folder} has positions for {positions} tokens, fewer than max_new_tokens "
                f"({config.max_new_tokens}): lower max_new_tokens, or use another captioner"
            )
        if report["missing_keys"]:
            raise WeightsError(f"{folder} lacks {len(report['missing_keys'])} weights of a BLIP captioner")
        self.model = model.to(self.device).eval()
        self.mean = mean.to(self.device)
        self.std = std.to(self.device)

    @classmethod
    def load(cls, config: CaptionerConfig, folder: Path | None = None, device: str = "cpu") -> Self:
        """Load the configured captioner; a `folder` is used instead of the hub."""
        source = find_captioner(config, folder)
        if source is not None:
            return cls(source, config, device)
        with tempfile.TemporaryDirectory() as scratch:
            save_tiny_captioner(Path(scratch), config.seed)
            return cls(Path(scratch), config, device)

    @torch.inference_mode()
    def caption(self, thumbnails: npt.NDArray[np.uint8]) -> list[str | None]:
        """Caption thumbnails (B, S, S, 3) uint8, S = `thumbnail_px`; None where the caption is empty."""
        if thumbnails.ndim != 4 or thumbnails.shape[1:] != (self.thumbnail_px, self.thumbnail_px, 3):
            raise ValueError(
                f"thumbnails must be (B, {self.thumbnail_px}, {self.thumbnail_px}, 3), got {thumbnails.shape}"
            )
        pixels = torch.tensor(thumbnails).to(self.device).permute(0, 3, 1, 2).float() / 255.0
        tokens = self.model.generate(
            (pixels - self.mean) / self.std, max_new_tokens=self.config.max_new_tokens, do_sample=False, num_beams=1
        )
        texts = cast(Sequence[str], self.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return [" ".join(text.split()) or None for text in texts]

    def save(self, folder: Path) -> None:
        """Write the captioner as a transformers folder."""
        self.model.save_pretrained(folder)
        for name in ("config.json", "generation_config.json"):  # equal files from every version of transformers
            described = json.loads((folder / name).read_text())
            kept = {key: value for key, value in described.items() if key != "transformers_version"}
            (folder / name).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
        self.tokenizer.save_pretrained(folder)
        size = {"height": self.thumbnail_px, "width": self.thumbnail_px}
        _write_preprocessing(folder, size, self.mean.flatten().tolist(), self.std.flatten().tolist())


def thumbnail_px(folder: Path | None) -> int:
    """Side S of the thumbnails that the captioner in `folder` takes; None: the tiny BLIP. Reads no weights."""
    if folder is None:
        return TINY_SIDE_PX
    try:
        described = model_files.read_json(folder, "captioner", "config.json")
        if described["model_type"] != "blip":
            raise ValueError("another model")
        side = described["vision_config"].get("image_size")
        return int(_processing(folder)[1]["size"]["height"] if side is None else side)
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder}/config.json does not describe a BLIP model ({type(error).__name__})") from error


def captioner_id(config: CaptionerConfig, folder: Path | None) -> str:
    """Identity of a captioner, 16 hexadecimal digits: equal ids give an image equal captions. Loads no weights.

    `folder`: its transformers folder; None for the tiny BLIP. Takes about 1 s per GB.
    """
    if folder is None:
        source: Any = ["tiny", config.seed]
    else:
        endings = (".json", ".txt", ".safetensors", ".bin")
        files = [path for path in sorted(folder.iterdir()) if path.suffix in endings and path.is_file()]
        source = [[path.name, file_digest(path)] for path in files]
    return hashlib.sha256(json.dumps([source, config.max_new_tokens]).encode()).hexdigest()[:16]


def _normalisation(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, (1, 3, 1, 1) each."""
    path, described = _processing(folder)
    try:
        mean, std = (torch.tensor(described[name]).view(1, 3, 1, 1).float() for name in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WeightsError(
            f"{path} does not give image_mean and image_std, three numbers each ({type(error).__name__})"
        ) from error
    return mean, std


def _processing(folder: Path) -> tuple[Path, dict[str, Any]]:
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
TINY_WORDS: Final = tuple(
    "a an the of on in with and near under over two three small large old new red blue green white black grey yellow "
    "tree house field sky road river lake hill wall window door table cup lamp bird dog cat horse fish boat car train "
    "street bridge tower garden flower stone cloud sun moon star light shadow face hand book clock chair box ball "
    "standing sitting lying running flying floating growing shining"
    .split()
)  # fmt: skip
"""The whole vocabulary of the tiny BLIP, whose captions have no meaning."""


def save_tiny_captioner(folder: Path, seed: int) -> None:
    """Write a tiny BLIP (about 0.2 million seeded random weights) as a transformers folder.

    It replaces the real one where no weights are available: same architecture and files, captions without meaning.
    """
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = [*special, *TINY_WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True, bos_token="[DEC]")
    width = {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 32, "num_attention_heads": 4}
    # Weights spread far more than by transformers' default: the scores of two words then differ by far more than
    # rounding. Otherwise a caption could depend on its batch.
    text: dict[str, Any] = {
        **width, "encoder_hidden_size": 64, "vocab_size": len(vocabulary), "num_hidden_layers": 2,
        "max_position_embeddings": 32, "initializer_range": 0.3, "bos_token_id": 5, "pad_token_id": 0,
        "sep_token_id": 3, "eos_token_id": 3,
    }  # fmt: skip
    vision: dict[str, Any] = {
        **width, "num_hidden_layers": 2, "image_size": TINY_SIDE_PX, "patch_size": 16, "initializer_range": 0.15,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
        # special tokens, such as the end of text, are never chosen: no caption is empty
        bias = dict(model.named_parameters())["text_decoder.cls.predictions.bias"]
        with torch.no_grad():
            bias[: len(special)] = -1e4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": TINY_SIDE_PX, "width": TINY_SIDE_PX}
    _write_preprocessing(folder, size, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def _write_preprocessing(folder: Path, size: dict[str, int], mean: list[float], std: list[float]) -> None:
    described = {
        "image_processor_type": "BlipImageProcessor", "do_resize": True, "size": size, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(described, indent=2) + "\n")
