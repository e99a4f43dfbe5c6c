"""BLIP from an image to a caption (arXiv 2201.12086), for inference: vision transformer, text decoder, greedy choice.

Dimensions: B images, S image side in pixels, N image tokens (patches and the class token), H width, h heads of width d,
L layers of the decoder, T tokens of a caption at most, V vocabulary.

Modules are named as in transformers' state dict, so that weights are found by name, and are built in its order, so that
a seed gives the same random weights. `fuse` then joins the projections that read the same input; it changes the names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsnet.decoding import CUDA_CHECK_STEPS, BatchShape, CaptionBatch, StepRunner, decode

Activation = Callable[[torch.Tensor], torch.Tensor]


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


_TANH_GELU: Final[Activation] = partial(F.gelu, approximate="tanh")
ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu": F.gelu, "gelu_new": _TANH_GELU, "gelu_pytorch_tanh": _TANH_GELU, "quick_gelu": _quick_gelu,
    "relu": F.relu, "silu": F.silu, "swish": F.silu,
}  # fmt: skip
"""transformers' name of an activation -> its function."""

UNPLANNED: Final = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels of attention in the decoder, on CUDA: all but cuDNN's, which plans anew for each length of the captions."""


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """Sizes of the vision transformer; names and defaults are those of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 384
    """Side S, in pixels."""
    patch_size: int = 16
    """In pixels."""
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Sizes and tokens of the text decoder; names and defaults are those of transformers."""

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    bos_token_id: int = 30522
    """The token before the first word."""
    sep_token_id: int = 102
    """The token that ends a caption."""
    pad_token_id: int = 0
    """Fills a row after its end."""


@dataclass(frozen=True, kw_only=True)
class BlipSettings:
    """Everything that defines a BLIP, except its weights."""

    vision: VisionSettings
    text: TextSettings
    tied: bool = True
    """Whether the output layer has the weights of the word embeddings, and its bias under a second name."""


class Linear(nn.Linear):
    """A linear layer that computes in the precision of its weights, whatever that of its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


class Embedding(nn.Embedding):
    """An embedding that draws no weights on the device `meta`: torch would import its compiler for normal numbers."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def _joined(*parts: nn.Linear) -> Linear:
    """One layer with the outputs of several, in their order."""
    layer = Linear(parts[0].in_features, sum(part.out_features for part in parts), device="meta")
    layer.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
    layer.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
    return layer


# --- the vision transformer ------------------------------------------------------------------------------------------


class VisionEmbeddings(nn.Module):
    """Patches and the class token, with learned positions."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        width, patch = settings.hidden_size, settings.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(1, (settings.image_size // patch) ** 2 + 1, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), -1, -1)
        return torch.cat([first, patches.to(first.dtype)], dim=1) + self.position_embedding


class VisionAttention(nn.Module):
    """Attention of all image tokens to each other."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.heads = settings.num_attention_heads
        self.qkv = Linear(settings.hidden_size, 3 * settings.hidden_size)
        self.projection = Linear(settings.hidden_size, settings.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        count, tokens, width = hidden.shape
        qkv = self.qkv(hidden).view(count, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        return cast(torch.Tensor, self.projection(seen.transpose(1, 2).reshape(count, tokens, width)))


class VisionFeedForward(nn.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[settings.hidden_act]
        self.fc1 = Linear(settings.hidden_size, settings.intermediate_size)
        self.fc2 = Linear(settings.intermediate_size, settings.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.fc2(self.activation(self.fc1(hidden))))


class VisionLayer(nn.Module):
    """A layer with the normalisation before each part; the sums keep the precision of their first term, fp32."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.self_attn = VisionAttention(settings)
        self.layer_norm1 = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.mlp = VisionFeedForward(settings)
        self.layer_norm2 = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + cast(torch.Tensor, self.mlp(self.layer_norm2(hidden)))


class VisionEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VisionLayer(settings) for _ in range(settings.num_hidden_layers)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class VisionModel(nn.Module):
    """Pixels (B, 3, S, S) fp32, normalised, to image tokens (B, N, H) fp32; the first is the class token."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(settings)
        self.encoder = VisionEncoder(settings)
        self.post_layernorm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.post_layernorm(self.encoder(self.embeddings(pixels))))


# --- the text decoder ------------------------------------------------------------------------------------------------


class TextEmbeddings(nn.Module):
    """Words with learned positions, normalised."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.word_embeddings = Embedding(settings.vocab_size, width, padding_idx=settings.pad_token_id)
        self.position_embeddings = Embedding(settings.max_position_embeddings, width)
        self.LayerNorm = nn.LayerNorm(width, eps=settings.layer_norm_eps)

    def forward(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        words = self.word_embeddings(tokens) + self.position_embeddings.weight[position]
        return cast(torch.Tensor, self.LayerNorm(words))


class Projections(nn.Module):
    """Query, key and value of an attention; `fuse` joins those with the same input."""

    def __init__(self, settings: TextSettings, source_width: int) -> None:
        super().__init__()
        self.query = Linear(settings.hidden_size, settings.hidden_size)
        self.key = Linear(source_width, settings.hidden_size)
        self.value = Linear(source_width, settings.hidden_size)

    def join(self, *names: str) -> None:
        """Replace these layers by one, `joined`."""
        self.joined = _joined(*(getattr(self, name) for name in names))
        for name in names:
            delattr(self, name)


class Residual(nn.Module):
    """A linear layer, added to what came before and normalised."""

    def __init__(self, settings: TextSettings, source_width: int) -> None:
        super().__init__()
        self.dense = Linear(source_width, settings.hidden_size)
        self.LayerNorm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)

    def forward(self, added: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.LayerNorm(hidden + self.dense(added)))


class TextAttention(nn.Module):
    """Projections and output of an attention, to earlier words or to image tokens."""

    def __init__(self, settings: TextSettings, source_width: int) -> None:
        super().__init__()
        self.self = Projections(settings, source_width)
        self.output = Residual(settings, settings.hidden_size)


class Activated(nn.Module):
    """A linear layer with its activation."""

    def __init__(self, settings: TextSettings, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[settings.hidden_act]
        self.dense = Linear(settings.hidden_size, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden))


class TextLayer(nn.Module):
    """A layer of the decoder, with the normalisation after each part."""

    def __init__(self, settings: TextSettings, image_width: int) -> None:
        super().__init__()
        self.heads = settings.num_attention_heads
        self.attention = TextAttention(settings, settings.hidden_size)
        self.crossattention = TextAttention(settings, image_width)
        self.intermediate = Activated(settings, settings.intermediate_size)
        self.output = Residual(settings, settings.intermediate_size)

    def forward(self, hidden: torch.Tensor, position: int, image: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Hidden (B, H) of one position to the next layer's. image (2, B, h, N, d): keys and values of image tokens;
        words (2, B, h, T, d): those of positions; this one's are written."""
        count, width = hidden.shape
        qkv = self.attention.self.joined(hidden).view(count, 3, self.heads, width // self.heads)
        words[:, :, :, position] = qkv[:, 1:].transpose(0, 1)
        keys, values = words[:, :, :, : position + 1]
        seen = F.scaled_dot_product_attention(qkv[:, 0, :, None], keys, values)
        hidden = self.attention.output(seen.reshape(count, width), hidden)

        query = self.crossattention.self.query(hidden).view(count, self.heads, 1, width // self.heads)
        seen = F.scaled_dot_product_attention(query, image[0], image[1])
        hidden = self.crossattention.output(seen.reshape(count, width), hidden)
        return cast(torch.Tensor, self.output(self.intermediate(hidden), hidden))

    def image_keys_values(self, image: torch.Tensor) -> torch.Tensor:
        """Image tokens (B, N, H) to their keys and values (2, B, h, N, d)."""
        count, tokens, _ = image.shape
        joined: torch.Tensor = self.crossattention.self.joined(image)
        return joined.view(count, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)


class TextEncoder(nn.Module):
    """The layers of the decoder; transformers calls them an encoder."""

    def __init__(self, settings: TextSettings, image_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([TextLayer(settings, image_width) for _ in range(settings.num_hidden_layers)])


class TextModel(nn.Module):
    """Embeddings and layers of the decoder."""

    def __init__(self, settings: TextSettings, image_width: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(settings)
        self.encoder = TextEncoder(settings, image_width)


class Transform(Activated):
    """An activated layer with a normalisation, in fp32."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__(settings, settings.hidden_size)
        self.LayerNorm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.LayerNorm(super().forward(hidden).float()))


class Predictions(nn.Module):
    """Hidden (B, H) to logits (B, V) fp32."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__()
        self.transform = Transform(settings)
        self.decoder = nn.Linear(settings.hidden_size, settings.vocab_size)
        self.bias = nn.Parameter(torch.zeros(settings.vocab_size))
        """The decoder's bias, if tied; else without use."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.decoder(self.transform(hidden)))


class Head(nn.Module):
    """The predictions, under the name that they have in files."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__()
        self.predictions = Predictions(settings)


class TextDecoder(nn.Module):
    """The decoder with its output layer."""

    def __init__(self, bert: TextModel, head: Head) -> None:
        super().__init__()
        self.bert = bert
        self.cls = head

    @property
    def layers(self) -> list[TextLayer]:
        return cast(list[TextLayer], list(self.bert.encoder.layer))

    def forward(self, tokens: torch.Tensor, position: int, image: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) fp32 of the token after `position`, from tokens (B,) int64 at that position.

        image (L, 2, B, h, N, d): keys and values of image tokens. words (L, 2, B, h, T, d): those of positions: earlier
        ones are read, this one's are written.
        """
        hidden = self.bert.embeddings(tokens, position)
        for layer, of_image, of_words in zip(self.layers, image, words, strict=True):
            hidden = layer(hidden, position, of_image, of_words)
        return cast(torch.Tensor, self.cls.predictions(hidden))


Drawn = TypeVar("Drawn", bound=nn.Module)


@torch.no_grad()
def draw_weights(part: Drawn, std: float) -> Drawn:
    """Draw the weights of a part anew, in the order and from the distributions of transformers; returns the part.

    std: standard deviation, transformers' `initializer_range`. Equal states of torch's generator before a part is built
    give the weights that transformers would draw.
    """
    for child in part.children():
        draw_weights(child, std)
    if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
        nn.init.normal_(part.weight, std=std)
        if not isinstance(part, nn.Embedding):
            nn.init.zeros_(cast(torch.Tensor, part.bias))
        elif part.padding_idx is not None:
            nn.init.zeros_(part.weight[part.padding_idx])
    elif isinstance(part, VisionEmbeddings):
        nn.init.trunc_normal_(part.position_embedding, std=std)
        nn.init.trunc_normal_(part.class_embedding, std=std)
    return part


# --- both ------------------------------------------------------------------------------------------------------------


@contextmanager
def _as_current(device: torch.device) -> Iterator[None]:
    """On CUDA, make a device the current one, where graphs are captured and replayed, with `UNPLANNED` attention."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), sdpa_kernel(UNPLANNED):
        yield


class Blip(nn.Module):
    """Images to captions. `build` makes one; load its weights, `tie`, then `fuse` it for `generate`."""

    def __init__(self, settings: BlipSettings, vision: VisionModel, bert: TextModel, head: Head) -> None:
        super().__init__()
        self.settings = settings
        self.vision_model = vision
        self.text_decoder = TextDecoder(bert, head)
        self._runner: StepRunner | None = None
        self.tie()

    @classmethod
    def build(cls, settings: BlipSettings) -> Self:
        """Build the modules, with torch's random weights."""
        text = settings.text
        return cls(settings, VisionModel(settings.vision), TextModel(text, settings.vision.hidden_size), Head(text))

    def tie(self) -> None:
        """Let the output layer use the word embeddings and the bias of the predictions, if the settings say so."""
        if self.settings.tied:
            predictions = self.text_decoder.cls.predictions
            predictions.decoder.weight = self.text_decoder.bert.embeddings.word_embeddings.weight
            predictions.decoder.bias = predictions.bias

    def fuse(self, dtype: torch.dtype | None = None, *, graphs: bool = True, compile_vision: bool = False) -> Self:
        """Prepare for `generate`, on the device where the weights lie: freeze, join projections, choose precision.

        dtype: `torch.bfloat16` or `torch.float16`: linear layers, convolutions and attention compute in it;
        normalisations, sums, word embeddings and logits stay in fp32, because equal logits of two words would choose
        the wrong one. None: fp32.
        graphs: on CUDA, replay the steps of decoding as CUDA graphs; the keys and values of the largest batch then stay
        allocated (BLIP base in fp32: 43 MB an image). compile_vision: on CUDA, compile the vision transformer at the
        first image.
        """
        for layer in self.text_decoder.layers:
            layer.attention.self.join("query", "key", "value")
            layer.crossattention.self.join("key", "value")
        if dtype is not None:
            for module in self.modules():
                if isinstance(module, Linear | nn.Conv2d):
                    module.to(dtype)
        self.requires_grad_(False).eval()
        device = self.text_decoder.cls.predictions.bias.device
        if compile_vision and device.type == "cuda":
            self.vision_model.compile(dynamic=False)
        on_cuda = device.type == "cuda"
        self._runner = StepRunner(graphs=graphs and on_cuda, check_steps=CUDA_CHECK_STEPS if on_cuda else 1)
        return self

    @torch.inference_mode()
    def generate(self, pixels: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Choose the likeliest next token, from `bos_token_id` until `sep_token_id` or `max_new_tokens` tokens.

        pixels: (B, 3, S, S) fp32, normalised, on the model's device.
        Returns tokens (B, steps) int64 without the first, `bos_token_id`; after its end a row has `pad_token_id`. On
        CUDA there may be more steps than the longest row needs. Of equal logits the first one wins.
        Raises `ValueError` for another size or more tokens than positions, `RuntimeError` before `fuse`.
        """
        side, positions = self.settings.vision.image_size, self.settings.text.max_position_embeddings
        if self._runner is None:
            raise RuntimeError("fuse the model before it generates")
        if pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels must be (B, 3, {side}, {side}), got {tuple(pixels.shape)}")
        if not 1 <= max_new_tokens <= positions:
            raise ValueError(f"max_new_tokens must be between 1 and {positions}, got {max_new_tokens}")
        text, image = self.settings.text, self.vision_model(pixels)
        batch = self._runner.batch(self._shape(image, max_new_tokens), image.device)
        for layer, keys_values in zip(self.text_decoder.layers, batch.image, strict=True):
            keys_values[:, : len(image)] = layer.image_keys_values(image)
        with _as_current(image.device):
            return decode(
                batch, len(image), self._step, self._runner, first=text.bos_token_id, padding=text.pad_token_id
            )

    def _shape(self, image: torch.Tensor, max_new_tokens: int) -> BatchShape:
        """Sizes of the batch for image tokens (B, N, H)."""
        text = self.settings.text
        return BatchShape(
            rows=len(image),
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            head_width=text.hidden_size // text.num_attention_heads,
            image_tokens=image.shape[1],
            max_tokens=max_new_tokens,
            dtype=self.text_decoder.layers[0].crossattention.self.query.weight.dtype,
        )

    def _step(self, batch: CaptionBatch, rows: int, position: int) -> None:
        """Choose the next token of the first rows of a batch. Reads and writes its tensors only, as a graph must."""
        text, ended = self.settings.text, batch.ended[:rows]
        logits = self.text_decoder(batch.last[:rows], position, batch.image[:, :, :rows], batch.words[:, :, :rows])
        chosen = logits.argmax(dim=-1).masked_fill_(ended, text.pad_token_id)
        batch.last[:rows] = chosen
        batch.written[:rows, position] = chosen
        ended.logical_or_(chosen == text.sep_token_id)
