"""Reads a BLIP from a checked folder in transformers' format: settings from `config.json`, then weights by name."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors.torch import load_file

from nsnet.blip import ACTIVATIONS, Blip, BlipSettings, TextSettings, VisionSettings
from nsnet.errors import WeightsError

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"

GREEDY: Final[dict[str, tuple[Any, ...]]] = {
    "repetition_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "min_length": (0, None),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
}
"""Setting of text generation -> values with which the likeliest token is always chosen, as transformers 4 writes them.
Settings of sampling and of beams are without effect here, as they were with transformers."""

DECODER: Final = "text_decoder.cls.predictions"
TIED: Final = (
    ("text_decoder.bert.embeddings.word_embeddings.weight", f"{DECODER}.decoder.weight"),
    (f"{DECODER}.bias", f"{DECODER}.decoder.bias"),
)
"""Names of equal weights, of which a file needs only one: the first wins."""

Tower = TypeVar("Tower", VisionSettings, TextSettings)


def settings_of(described: Mapping[str, Any], place: str) -> BlipSettings:
    """Settings from the content of a `config.json`, with transformers' defaults. Raises `WeightsError`.

    place: the file, for messages.
    """
    try:
        vision = _tower(VisionSettings, described.get("vision_config") or {})
        text_config = described.get("text_config") or {}
        if text_config.get("pad_token_id", 0) is None:  # as transformers does
            text_config = {**text_config, "pad_token_id": text_config.get("sep_token_id", TextSettings.sep_token_id)}
        text = _tower(TextSettings, text_config)
        for name in ("bos_token_id", "sep_token_id", "pad_token_id"):
            token: int = getattr(text, name)
            if not 0 <= token < text.vocab_size:
                raise WeightsError(f"{name} is {token}, but the vocabulary has {text.vocab_size} tokens")
        if vision.image_size < vision.patch_size:
            raise WeightsError(f"image_size ({vision.image_size}) is below patch_size ({vision.patch_size})")
        # transformers ties them if either part asks for it
        tied = any(part.get("tie_word_embeddings", True) for part in (described, text_config))
    except WeightsError as error:
        raise WeightsError(f"{place} describes no BLIP that can be built: {error}") from error
    return BlipSettings(vision=vision, text=text, tied=tied)


def _tower(kind: type[Tower], described: Mapping[str, Any]) -> Tower:
    """The settings of one tower; each of the type of its default, and sizes positive."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        default: Any = field.default
        value: Any = described.get(field.name, default)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        is_size = isinstance(default, int) and not field.name.endswith("_id")
        if type(value) is not type(default) or (is_size and value < 1):
            raise WeightsError(f"{field.name} may not be {repr(value)[:80]}")
        values[field.name] = value
    tower = kind(**values)
    if tower.hidden_size % tower.num_attention_heads:
        raise WeightsError(
            f"hidden_size ({tower.hidden_size}) is no multiple of num_attention_heads ({tower.num_attention_heads})"
        )
    if tower.hidden_act not in ACTIVATIONS:
        raise WeightsError(f"hidden_act may not be {tower.hidden_act[:80]!r}, only one of {', '.join(ACTIVATIONS)}")
    return tower


def check_generation(folder: Path, name: str) -> None:
    """Raise `WeightsError` if the model's author asks for captions other than the greedy ones that are made here.

    Without `generation_config.json`, transformers 4 took such settings from the text decoder's part of `config.json`.
    transformers 5 captions with BLIP greedily and reads neither; a folder whose captions depend on the version of a
    library is refused, rather than captioned in one of two ways. name: what messages call the folder.
    """
    if (folder / GENERATION).exists():
        place, described = GENERATION, json.loads((folder / GENERATION).read_text())
    else:
        place, described = CONFIG, json.loads((folder / CONFIG).read_text()).get("text_config") or {}
    for setting, neutral in GREEDY.items():
        if (value := described.get(setting)) not in neutral:
            raise WeightsError(
                f"{name}/{place} sets {setting} to {repr(value)[:80]}, but captions are chosen greedily: set it to "
                f"{json.dumps(neutral[0])} if greedy captions are meant, or use another captioner"
            )


def load(folder: Path, name: str) -> Blip:
    """Load a BLIP in fp32 on the CPU, not fused, from a private folder with checked files.

    name: what messages call the folder. Raises `WeightsError`; for damaged files, what the libraries raise.
    """
    settings = settings_of(json.loads((folder / CONFIG).read_text()), f"{name}/{CONFIG}")
    with torch.device("meta"):  # without memory, and without drawing weights that are replaced
        model = Blip.build(settings)
    expected = model.state_dict()
    state = read_weights(folder)
    for first, second in TIED if settings.tied else ():
        if first not in state and second in state:
            state[first] = state[second]
        state.pop(second, None)
        expected.pop(second)
    if missing := expected.keys() - state.keys():
        raise WeightsError(f"{name} lacks {len(missing)} weights of a BLIP captioner")
    found: dict[str, torch.Tensor] = {}
    for key, wanted in expected.items():
        tensor = state.pop(key)
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise WeightsError(f"cannot load BLIP from {name}: {key} is not a tensor of floating-point numbers")
        if tensor.shape != wanted.shape:
            raise WeightsError(
                f"cannot load BLIP from {name}: {key} has the shape {tuple(tensor.shape)}, but {CONFIG} describes "
                f"{tuple(wanted.shape)}: use the configuration and the weights of one model"
            )
        # copied: a mapped file that is changed or cut later must neither change captions nor end the process
        found[key] = tensor.to(torch.float32, copy=True)
    model.load_state_dict(found, strict=False, assign=True)
    model.tie()
    return model


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name: from one safetensors file, from several with an index, or from a .bin file."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    if (folder / "model.safetensors.index.json").exists():
        shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
        return {name: tensor for shard in sorted(set(shards)) for name, tensor in load_file(folder / shard).items()}
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return dict(state)
