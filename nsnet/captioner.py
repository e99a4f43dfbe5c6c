"""Captions images with BLIP (arXiv 2201.12086): unconditional, batched, greedy.

Dimensions: B images, S thumbnail side in pixels.

The captioner receives pixels only, no file names or paths.
"""

import json
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken

from nsnet import blip_files, model_files
from nsnet.blip import Blip, Head, TextModel, VisionModel, draw_weights
from nsnet.caption_words import CaptionTokenizer, WordPieces, load_tokenizer
from nsnet.captions import TINY_SIDE_PX, find_captioner, processing, thumbnail_px
from nsnet.configuration import CaptionerConfig, Precision
from nsnet.errors import NsnetError, WeightsError
from nsnet.model_size import ModelSize
from nsnet.precision import dtype_of, to_device, use_matrix_units

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

    def __init__(
        self,
        folder: Path | None,
        config: CaptionerConfig,
        device: str = "cpu",
        *,
        precision: Precision = "auto",
        graphs: bool = True,
        compile_vision: bool = False,
    ) -> None:
        """Load from a transformers folder; None: the tiny BLIP. `graphs`, `compile_vision`: see `Blip.fuse`.

        Raises `WeightsError` if the folder does not hold a complete BLIP.
        """
        self.config = config
        self.device = torch.device(device)
        self.folder = folder
        self.tokenizer: CaptionTokenizer
        if folder is None:
            name = "the tiny captioner"
            self.thumbnail_px = TINY_SIDE_PX
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in TINY_PIXELS)
            model, self.tokenizer = tiny_model(config.seed), tiny_tokenizer()
        else:
            name = f"the captioner in {folder}"
            self.thumbnail_px = thumbnail_px(folder)
            mean, std = _normalisation(folder)
            model, self.tokenizer = _load(folder)
        positions, side = model.settings.text.max_position_embeddings, model.settings.vision.image_size
        if config.max_new_tokens > positions:
            raise WeightsError(
                f"{name} has positions for {positions} tokens, fewer than max_new_tokens "
                f"({config.max_new_tokens}): lower max_new_tokens, or use another captioner"
            )
        if self.thumbnail_px != side:
            raise WeightsError(
                f"{name} takes images of {side} px, but its image processor makes {self.thumbnail_px}: set image_size "
                "in config.json"
            )
        use_matrix_units(self.device)
        dtype = dtype_of(precision, self.device)
        self.model = model.to(self.device).fuse(dtype, graphs=graphs, compile_vision=compile_vision)
        self.mean = mean.to(self.device)
        self.std = std.to(self.device)

    @classmethod
    def load(
        cls,
        config: CaptionerConfig,
        folder: Path | None = None,
        device: str = "cpu",
        *,
        precision: Precision = "auto",
        graphs: bool = True,
        compile_vision: bool = False,
    ) -> Self:
        """Load the configured captioner; a `folder` is used instead of the hub."""
        source = find_captioner(config, folder)
        return cls(source, config, device, precision=precision, graphs=graphs, compile_vision=compile_vision)

    @torch.inference_mode()
    def caption(self, thumbnails: npt.NDArray[np.uint8]) -> list[str | None]:
        """Caption thumbnails (B, S, S, 3) uint8, S = `thumbnail_px`; None where the caption is empty."""
        if thumbnails.ndim != 4 or thumbnails.shape[1:] != (self.thumbnail_px, self.thumbnail_px, 3):
            raise ValueError(
                f"thumbnails must be (B, {self.thumbnail_px}, {self.thumbnail_px}, 3), got {thumbnails.shape}"
            )
        pixels = to_device(thumbnails, self.device).permute(0, 3, 1, 2).to(torch.float32)
        pixels.div_(255.0).sub_(self.mean).div_(self.std)
        tokens = self.model.generate(pixels, self.config.max_new_tokens)
        texts = cast(Sequence[str], self.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True))
        return [" ".join(text.split()) or None for text in texts]

    def save(self, folder: Path) -> None:
        """Write the captioner, as it was loaded, as a transformers folder; transformers itself writes it.

        Raises `WeightsError` if the folder that it was loaded from has changed and does not hold a BLIP any more.
        """
        with tempfile.TemporaryDirectory() as scratch:
            source = self.folder or Path(scratch)
            if self.folder is None:
                save_tiny_captioner(source, self.config.seed)
            with _explained(source), model_files.opened(source, "captioner") as checked, ModelSize([checked]):
                _save_again(checked, folder)
        for name in ("config.json", "generation_config.json"):  # equal files from every version of transformers
            described = json.loads((folder / name).read_text())
            kept = {key: value for key, value in described.items() if key != "transformers_version"}
            (folder / name).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
        size = {"height": self.thumbnail_px, "width": self.thumbnail_px}
        _write_preprocessing(folder, size, self.mean.flatten().tolist(), self.std.flatten().tolist())


def _load(folder: Path) -> tuple[Blip, CaptionTokenizer]:
    """Check a transformers folder and load its model and tokenizer."""
    with _explained(folder), model_files.opened(folder, "captioner") as checked, ModelSize([checked]):
        blip_files.check_generation(checked, str(folder))
        return blip_files.load(checked, str(folder)), load_tokenizer(checked)


def _save_again(checked: Path, folder: Path) -> None:
    """Load a checked folder with transformers and save it."""
    from transformers import AutoTokenizer, BlipForConditionalGeneration  # seconds to import
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar per model load would hide the job's progress
    model = BlipForConditionalGeneration.from_pretrained(checked, local_files_only=True, weights_only=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checked, local_files_only=True, trust_remote_code=False).save_pretrained(folder)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what libraries raise for a damaged file, exceptions of many kinds, into `WeightsError`."""
    try:
        yield
    except NsnetError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"cannot load BLIP from {folder}: its weights are damaged or hold other objects than tensors, which are "
            "refused for safety"
        ) from error
    except Exception as error:
        raise WeightsError(
            f"cannot load BLIP from {folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


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


TINY_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
_TINY_WIDTH: Final = {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 32, "num_attention_heads": 4}
# Weights spread far more than by transformers' default: the scores of two words then differ by far more than rounding.
# Otherwise a caption could depend on its batch.
TINY_CONFIG: Final[dict[str, dict[str, Any]]] = {
    "text_config": {
        **_TINY_WIDTH, "encoder_hidden_size": 64, "vocab_size": len(TINY_SPECIAL) + len(TINY_WORDS),
        "num_hidden_layers": 2, "max_position_embeddings": 32, "initializer_range": 0.3, "bos_token_id": 5,
        "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3,
    },
    "vision_config": {
        **_TINY_WIDTH, "num_hidden_layers": 2, "image_size": TINY_SIDE_PX, "patch_size": 16, "initializer_range": 0.15,
    },
}  # fmt: skip
"""The tiny BLIP's `config.json`."""
TINY_PIXELS: Final = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
"""Mean and standard deviation of each channel for the tiny BLIP."""
TINY_SPECIAL_BIAS: Final = -1e4
"""Bias of special tokens, such as the end of text: they are never chosen, so that no caption is empty."""


def tiny_model(seed: int) -> Blip:
    """Return the tiny BLIP of a seed: the weights of `save_tiny_captioner`, drawn without transformers."""
    settings = blip_files.settings_of(TINY_CONFIG, "the tiny captioner")
    text, vision_std = TINY_CONFIG["text_config"], TINY_CONFIG["vision_config"]["initializer_range"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = draw_weights(VisionModel(settings.vision), vision_std)
        bert = draw_weights(TextModel(settings.text, settings.vision.hidden_size), text["initializer_range"])
        head = draw_weights(Head(settings.text), text["initializer_range"])
    with torch.no_grad():
        head.predictions.bias[: len(TINY_SPECIAL)] = TINY_SPECIAL_BIAS
    return Blip(settings, vision, bert, head)


def tiny_tokenizer() -> WordPieces:
    """Return the tokenizer of the tiny BLIP."""
    vocabulary = {word: number for number, word in enumerate((*TINY_SPECIAL, *TINY_WORDS))}
    return WordPieces(vocabulary, [AddedToken(word, special=True) for word in TINY_SPECIAL])


def save_tiny_captioner(folder: Path, seed: int) -> None:
    """Write a tiny BLIP (about 0.2 million seeded random weights) as a transformers folder.

    It replaces the real one where no weights are available: same architecture and files, captions without meaning.
    """
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    (folder / "vocab.txt").write_text("\n".join((*TINY_SPECIAL, *TINY_WORDS)) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True, bos_token="[DEC]")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(
            BlipConfig(text_config=TINY_CONFIG["text_config"], vision_config=TINY_CONFIG["vision_config"])
        )
        bias = dict(model.named_parameters())["text_decoder.cls.predictions.bias"]
        with torch.no_grad():
            bias[: len(TINY_SPECIAL)] = TINY_SPECIAL_BIAS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_preprocessing(folder, {"height": TINY_SIDE_PX, "width": TINY_SIDE_PX}, *TINY_PIXELS)


def _write_preprocessing(folder: Path, size: dict[str, int], mean: list[float], std: list[float]) -> None:
    described = {
        "image_processor_type": "BlipImageProcessor", "do_resize": True, "size": size, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(described, indent=2) + "\n")
