"""Captions images with BLIP (arXiv 2201.12086) through transformers: unconditional, batched, greedy.

Dimensions: B images, S thumbnail side in pixels.

The captioner receives pixels only, no file names or paths.
"""

import json
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
import numpy.typing as npt
import torch

from nsnet import model_files
from nsnet.captions import TINY_SIDE_PX, find_captioner, processing, thumbnail_px
from nsnet.configuration import CaptionerConfig
from nsnet.errors import NsnetError, WeightsError
from nsnet.model_size import ModelSize

TINY_WORDS: Final = tuple(
    "a an the of on in with and near under over two three small large old new red blue green white black grey yellow "
    "tree house field sky road river lake hill wall window door table cup lamp bird dog cat horse fish boat car train "
    "street bridge tower garden flower stone cloud sun moon star light shadow face hand book clock chair box ball "
    "standing sitting lying running flying floating growing shining"
    .split()
)  # fmt: skip
"""The whole vocabulary of the tiny BLIP, whose captions have no meaning."""


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


def _normalisation(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, (1, 3, 1, 1) each."""
    path, described = processing(folder)
    try:
        mean, std = (torch.tensor(described[name]).view(1, 3, 1, 1).float() for name in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WeightsError(
            f"{path} does not give image_mean and image_std, three numbers each ({type(error).__name__})"
        ) from error
    return mean, std


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
