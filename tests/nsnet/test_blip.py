"""The project's own BLIP, against transformers' from the same folder: features, logits, tokens, and what is refused."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertTokenizerFast, BlipConfig, BlipForConditionalGeneration

from nsnet import blip_files, captioner, decoding
from nsnet.blip import Blip
from nsnet.caption_words import load_tokenizer
from nsnet.captioner import Captioner
from nsnet.configuration import CaptionerConfig
from nsnet.decoding import CaptionBatch, StepRunner
from nsnet.errors import WeightsError
from tests.support import models

REPO_ROOT = Path(__file__).parents[2]
TINY = CaptionerConfig(model=None, max_new_tokens=8)
WEIGHTS = "model.safetensors"
STEPS = 18

TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_hidden_layers": 3, "vocab_size": 61,
    "max_position_embeddings": 20, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-6, "initializer_range": 0.2,
    "bos_token_id": 7, "sep_token_id": 4, "pad_token_id": 2, "eos_token_id": 9,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 40,
    "patch_size": 12, "hidden_act": "gelu_new", "layer_norm_eps": 1e-4, "initializer_range": 0.2,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "as the tiny one": (captioner.TINY_CONFIG["text_config"], captioner.TINY_CONFIG["vision_config"], True),
    "other sizes, tied": (TEXT, VISION, True),
    "other sizes, untied": ({**TEXT, "tie_word_embeddings": False}, VISION, False),
    "relu and silu": ({**TEXT, "hidden_act": "relu"}, {**VISION, "hidden_act": "silu"}, True),
    "narrow text": ({**TEXT, "num_attention_heads": 6}, {**VISION, "hidden_size": 64, "image_size": 36}, True),
}


class Pair:
    """A folder, and both models that are loaded from it."""

    def __init__(self, folder: Path, text: dict[str, Any], vision: dict[str, Any], tied: bool, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = BlipConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
            model = BlipForConditionalGeneration(config)
            with torch.no_grad():  # transformers draws no biases: a forgotten or swapped one would not be seen
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        self.folder = folder
        self.reload()

    def reload(self) -> None:
        self.theirs = BlipForConditionalGeneration.from_pretrained(self.folder)
        self.loaded = blip_files.load(self.folder, "here")
        self.ours = copy.deepcopy(self.loaded).fuse()

    def pixels(self, count: int, seed: int = 0) -> torch.Tensor:
        side = self.ours.settings.vision.image_size
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))

    def expected(self, pixels: torch.Tensor, steps: int) -> torch.Tensor:
        """transformers' tokens, without the first."""
        return self.theirs.generate(pixels, max_new_tokens=steps, do_sample=False, num_beams=1)[:, 1:]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("blip"), *VARIANTS[request.param])


@pytest.fixture
def other(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "blip", *VARIANTS["other sizes, tied"])


def logits_of(model: Blip, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of our decoder, given tokens (B, T) step by step."""
    assert model._runner is not None
    batch = CaptionBatch(model._shape(image, tokens.shape[1]), image.device)
    batch.words.fill_(torch.nan)  # what is not written yet must not be read
    for layer, keys_values in zip(model.text_decoder.layers, batch.image, strict=True):
        keys_values.copy_(layer.image_keys_values(image))
    steps = [model.text_decoder(tokens[:, i], i, batch.image, batch.words) for i in range(tokens.shape[1])]
    return torch.stack(steps, dim=1)


def rows_run(model: Blip) -> list[int]:
    """Let a model tell the number of rows of each step that it runs."""
    runner, rows = model._runner, []
    assert runner is not None
    plain = runner.run

    def run(step: Any, batch: CaptionBatch, count: int, position: int) -> None:
        rows.append(count)
        plain(step, batch, count, position)

    runner.run = run  # type: ignore[method-assign]
    return rows


# --- as transformers -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_vision_features_are_those_of_transformers(pair: Pair) -> None:
    pixels = pair.pixels(5)
    expected = pair.theirs.vision_model(pixels).last_hidden_state
    assert expected.std() > 0.3 and (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(pair.ours.vision_model(pixels), expected, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_logits_of_each_step_are_those_of_transformers(pair: Pair) -> None:
    image = pair.theirs.vision_model(pair.pixels(6)).last_hidden_state
    vocabulary = pair.ours.settings.text.vocab_size
    tokens = torch.randint(0, vocabulary, (6, STEPS), generator=torch.Generator().manual_seed(1))
    expected = pair.theirs.text_decoder(tokens, encoder_hidden_states=image).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits_of(pair.ours, image, tokens), expected, atol=1e-4, rtol=1e-5)


def test_logits_depend_on_the_image_and_on_every_earlier_word(pair: Pair) -> None:
    """What makes the comparisons above worth something."""
    with torch.inference_mode():
        image = pair.ours.vision_model(pair.pixels(2))
        tokens = torch.arange(5, 5 + STEPS).repeat(2, 1)
        first, second = logits_of(pair.ours, image, tokens)
        assert (first - second).abs().max() > 1e-2
        changed = tokens.clone()
        changed[:, 3] = 30
        difference = (logits_of(pair.ours, image, changed)[0] - first).abs().amax(dim=-1)
    assert (difference[:3] == 0).all() and (difference[3:] > 1e-3).all()


@pytest.mark.parametrize("steps", [1, 2, STEPS])
@pytest.mark.parametrize("count", [1, 7])
def test_tokens_are_those_of_transformers(steps: int, count: int, pair: Pair) -> None:
    pixels = pair.pixels(count, seed=steps)
    tokens = pair.ours.generate(pixels, steps)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, pair.expected(pixels, steps))


def test_as_many_tokens_as_positions(pair: Pair) -> None:
    positions = pair.ours.settings.text.max_position_embeddings
    pixels = pair.pixels(2)
    assert torch.equal(pair.ours.generate(pixels, positions), pair.expected(pixels, positions))
    with pytest.raises(ValueError, match=f"between 1 and {positions}, got {positions + 1}"):
        pair.ours.generate(pixels, positions + 1)
    with pytest.raises(ValueError, match="got 0"):
        pair.ours.generate(pixels, 0)


def test_same_images_give_the_same_bits(pair: Pair) -> None:
    pixels = pair.pixels(4)
    with torch.inference_mode():
        assert torch.equal(pair.ours.vision_model(pixels), pair.ours.vision_model(pixels))
    assert torch.equal(pair.ours.generate(pixels, STEPS), pair.ours.generate(pixels, STEPS))


def test_first_of_equal_logits_wins(other: Pair) -> None:
    predictions = other.ours.text_decoder.cls.predictions
    predictions.decoder.weight.zero_()
    predictions.bias.zero_()[[21, 13, 50]] = 1.0
    assert (other.ours.generate(other.pixels(3), 4) == 13).all()


# --- the end of captions ---------------------------------------------------------------------------------------------


@pytest.fixture
def ending(tmp_path: Path) -> Pair:
    """The captions of this seed's weights end early, if one of its words is the end, and at different steps."""
    return Pair(tmp_path / "blip", *VARIANTS["as the tiny one"], seed=1)


def end_often(pair: Pair, pixels: torch.Tensor) -> torch.Tensor:
    """Make a word the end of a caption that comes early, at different steps; returns transformers' tokens."""
    tokens = pair.expected(pixels, STEPS).tolist()
    firsts = {word: [row.index(word) if word in row else STEPS for row in tokens] for word in {*sum(tokens, [])}}
    end = max(firsts, key=lambda word: (min(len({*firsts[word]}), 5), -sum(firsts[word])))
    assert len({*firsts[end]}) >= 4, "rows must end at different steps"
    config = json.loads((pair.folder / "config.json").read_text())
    config["text_config"]["sep_token_id"] = end
    (pair.folder / "config.json").write_text(json.dumps(config))
    pair.reload()
    return pair.expected(pixels, STEPS)


def test_rows_that_ended_are_padded_and_leave_the_batch(ending: Pair) -> None:
    pixels = ending.pixels(32)
    expected = end_often(ending, pixels)
    rows = rows_run(ending.ours)
    tokens = ending.ours.generate(pixels, STEPS)
    assert torch.equal(tokens, expected)
    text = ending.ours.settings.text
    lengths = [
        int((row == text.sep_token_id).nonzero()[0]) + 1 if (row == text.sep_token_id).any() else STEPS
        for row in tokens
    ]
    assert len(set(lengths)) >= 4 and (tokens[lengths.index(min(lengths)), min(lengths) :] == text.pad_token_id).all()
    # never more than twice the rows that still decode
    still = [sum(length > step for length in lengths) for step in range(len(rows))]
    assert len(rows) == max(lengths) and all(n <= count < max(2 * n, 2) for n, count in zip(still, rows, strict=True))
    assert len(set(rows)) >= 3


@pytest.mark.parametrize("every", [2, 3, 8, 100])
def test_asking_rarely_for_the_end_changes_no_token(every: int, ending: Pair) -> None:
    pixels = ending.pixels(32)
    expected = end_often(ending, pixels)
    ending.ours._runner = StepRunner(check_steps=every)
    tokens = ending.ours.generate(pixels, STEPS)
    steps = expected.shape[1]
    assert (
        torch.equal(tokens[:, :steps], expected) and (tokens[:, steps:] == ending.ours.settings.text.pad_token_id).all()
    )
    assert tokens.shape[1] <= min(STEPS, steps + every - 1)


def test_decoding_stops_when_all_have_ended(other: Pair) -> None:
    bias = other.ours.text_decoder.cls.predictions.bias
    bias[other.ours.settings.text.sep_token_id] = 1e4
    rows = rows_run(other.ours)
    assert torch.equal(other.ours.generate(other.pixels(5), STEPS), torch.full((5, 1), 4)) and rows == [5]


# --- graphs ----------------------------------------------------------------------------------------------------------


class Replayed(StepRunner):
    """Graphs without a GPU: a capture runs nothing, a replay runs the step on the batch of its capture."""

    def __init__(self, check_steps: int = 1) -> None:
        super().__init__(graphs=True, check_steps=check_steps)
        self.log: list[str] = []

    def _run_beside(self, step: decoding.Step, batch: CaptionBatch, rows: int, position: int) -> None:
        self.log.append("plain")
        step(batch, rows, position)

    def _capture(self, step: decoding.Step, batch: CaptionBatch, rows: int, position: int) -> Any:
        self.log.append("captured")

        class Graph:
            def replay(graph) -> None:
                self.log.append("replayed")
                step(batch, rows, position)

        return Graph()


@pytest.mark.parametrize("every", [1, 4])
def test_graphs_are_captured_once_and_replayed_on_the_same_batch(every: int, ending: Pair) -> None:
    calls = [ending.pixels(16, seed) for seed in range(4)] + [ending.pixels(9), ending.pixels(32), ending.pixels(16)]
    end_often(ending, calls[0])
    plain = copy.deepcopy(ending.ours)
    plain._runner = StepRunner(check_steps=every)
    runner = ending.ours._runner = Replayed(every)
    batches = []
    for i, pixels in enumerate(calls):
        runner.log.clear()
        assert torch.equal(ending.ours.generate(pixels, STEPS), plain.generate(pixels, STEPS))
        batches.append(runner._kept)
        if i == 0:
            assert {*runner.log} == {"plain"}
        if i == 1:
            assert runner.log.count("captured") == runner.log.count("replayed") > 0
    assert batches[0] is batches[4] and batches[4] is not batches[5] and batches[5] is batches[6]
    ending.ours.generate(calls[0], STEPS - 1)
    assert runner._kept is not batches[6], "caches of another length need graphs of their own"


# --- low precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.12), (torch.float16, 0.02)])
def test_low_precision_stays_close(dtype: torch.dtype, tolerance: float, pair: Pair) -> None:
    low = copy.deepcopy(pair.loaded).fuse(dtype)
    pixels = pair.pixels(8)
    tokens = pair.ours.generate(pixels, STEPS)
    with torch.inference_mode():
        expected = logits_of(pair.ours, pair.ours.vision_model(pixels), tokens)
        found = logits_of(low, low.vision_model(pixels), tokens)
    assert found.dtype == low.vision_model(pixels[:1]).dtype == torch.float32
    assert (found - expected).std() < tolerance * expected.std() and not torch.equal(found, expected)
    precisions = {name: parameter.dtype for name, parameter in low.named_parameters()}
    kept = {name for name, precision in precisions.items() if precision == torch.float32}
    assert {name.rpartition(".")[0] for name in kept if "norm" not in name.lower()} == {
        "vision_model.embeddings", "text_decoder.bert.embeddings.word_embeddings",
        "text_decoder.bert.embeddings.position_embeddings", "text_decoder.cls.predictions",
        *(["text_decoder.cls.predictions.decoder"] if not low.settings.tied else []),
    }  # fmt: skip
    assert {precision for name, precision in precisions.items() if name not in kept} == {dtype}


# --- files -----------------------------------------------------------------------------------------------------------


def test_weights_of_the_tiny_captioner_are_those_that_transformers_draws(tmp_path: Path) -> None:
    for seed in (0, 1, -5, 2**62):
        folder = tmp_path / str(seed)
        folder.mkdir()
        captioner.save_tiny_captioner(folder, seed)
        drawn, saved = captioner.tiny_model(seed).state_dict(), load_file(folder / WEIGHTS)
        tied = {f"text_decoder.cls.predictions.decoder.{kind}" for kind in ("weight", "bias")}
        assert drawn.keys() - saved.keys() == tied and saved.keys() <= drawn.keys()
        assert all(torch.equal(drawn[name], saved[name]) for name in saved)
        settings = blip_files.settings_of(json.loads((folder / "config.json").read_text()), "here")
        assert settings == captioner.tiny_model(seed).settings
        loaded = Captioner.load(TINY, folder)
        tiny = Captioner.load(CaptionerConfig(model=None, max_new_tokens=8, seed=seed))
        assert torch.equal(tiny.mean, loaded.mean) and torch.equal(tiny.std, loaded.std)
        assert tiny.thumbnail_px == loaded.thumbnail_px
        ids = [list(range(start, 79, 5)) for start in range(5)]
        assert tiny.tokenizer.batch_decode(ids, True) == loaded.tokenizer.batch_decode(ids, True)


def test_captioner_that_is_not_in_a_folder_is_saved_as_one_that_is(tmp_path: Path) -> None:
    captioner.save_tiny_captioner(tmp_path, 0)
    Captioner.load(TINY).save(tmp_path / "first")
    Captioner.load(TINY, tmp_path).save(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second and len(first) == 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "captioner"
    path.mkdir()
    captioner.save_tiny_captioner(path, 0)
    return path


def captions_of(folder: Path | None) -> list[str | None]:
    return Captioner.load(TINY, folder).caption(models.mosaics(6))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def describe(folder: Path, file: str = "config.json", **settings: Any) -> None:
    described = json.loads((folder / file).read_text())
    for name, value in settings.items():
        place, _, key = name.rpartition("__")
        (described[place] if place else described)[key] = value
    (folder / file).write_text(json.dumps(described))


def refused(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        Captioner.load(TINY, folder)
    message = models.one_line(caught.value)
    assert str(folder) in message
    return message


def test_shards_and_more_tensors_than_needed_are_read(folder: Path) -> None:
    state = load_file(folder / WEIGHTS) | {"text_decoder.bert.embeddings.position_ids": torch.arange(32)[None]}
    (folder / WEIGHTS).unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    placed = {name: names[i % 2] for i, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name in state if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert captions_of(folder) == captions_of(None)
    (folder / names[1]).unlink()
    assert names[1] in refused(folder)


def test_half_precision_files_become_fp32(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    model = Captioner.load(TINY, folder).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    weight = load_file(folder / WEIGHTS)["vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(dict(model.named_parameters())["vision_model.encoder.layers.0.mlp.fc1.weight"], weight.float())


@pytest.mark.parametrize("kept", [0, 1])
def test_tied_weights_are_found_by_either_name(kept: int, folder: Path) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        for names in blip_files.TIED:
            state[names[kept]] = state.pop(names[0])

    expected = captions_of(folder)
    rewrite(folder, rename)
    assert captions_of(folder) == expected


def test_untied_weights_are_needed(folder: Path) -> None:
    describe(folder, tie_word_embeddings=False, text_config__tie_word_embeddings=False)
    assert "lacks 2 weights" in refused(folder)


def test_weights_do_not_change_with_the_file(folder: Path) -> None:
    loaded = Captioner.load(TINY, folder)
    expected = loaded.caption(models.mosaics(6))
    with (folder / WEIGHTS).open("r+b") as file:  # in place: a mapped file would change with it
        file.write(bytes((folder / WEIGHTS).stat().st_size))
    assert loaded.caption(models.mosaics(6)) == expected


def test_weights_of_another_kind_are_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"vision_model.post_layernorm.bias": torch.ones(64, dtype=torch.int8)}))
    assert "vision_model.post_layernorm.bias is not a tensor of floating-point" in refused(folder)
    rewrite(folder, lambda state: state.update({"vision_model.post_layernorm.bias": torch.ones(65)}))
    assert "vision_model.post_layernorm.bias has the shape (65,), but config.json describes (64,)" in refused(folder)


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("text_config__hidden_act", "mish", "hidden_act may not be 'mish', only one of gelu"),
        ("vision_config__hidden_act", 7, "hidden_act may not be 7"),
        ("text_config__num_attention_heads", 5, "is no multiple of num_attention_heads"),
        ("text_config__num_hidden_layers", 0, "num_hidden_layers may not be 0"),
        ("text_config__hidden_size", "64", "hidden_size may not be '64'"),
        ("vision_config__patch_size", [16, 16], "patch_size may not be"),
        ("vision_config__patch_size", 80, "image_size (64) is below patch_size (80)"),
        ("text_config__bos_token_id", None, "bos_token_id may not be None"),
        ("text_config__sep_token_id", 79, "sep_token_id is 79, but the vocabulary has 79 tokens"),
        ("text_config__layer_norm_eps", True, "layer_norm_eps may not be True"),
        ("vision_config__image_size", None, "image_size may not be None"),
    ],
)
def test_configuration_that_describes_no_model_is_refused(
    setting: str, value: Any, complaint: str, folder: Path
) -> None:
    describe(folder, **{setting: value})
    assert complaint in refused(folder)


def test_padding_that_is_not_set_is_the_end(folder: Path) -> None:
    describe(folder, text_config__pad_token_id=None)
    assert Captioner.load(TINY, folder).model.settings.text.pad_token_id == 3


def test_configuration_without_sizes_has_those_of_transformers() -> None:
    settings, expected = blip_files.settings_of({}, "here"), BlipConfig()
    for ours, theirs in ((settings.text, expected.text_config), (settings.vision, expected.vision_config)):
        assert all(getattr(theirs, name) == value for name, value in vars(ours).items())


GENERATION = [
    ("repetition_penalty", 1.5), ("no_repeat_ngram_size", 3), ("min_length", 5), ("suppress_tokens", [40]),
    ("forced_eos_token_id", 3), ("bad_words_ids", [[40]]), ("encoder_no_repeat_ngram_size", 2),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value"), GENERATION)
def test_generation_other_than_greedy_is_refused(setting: str, value: Any, folder: Path) -> None:
    expected = captions_of(folder)
    describe(folder, **{f"text_config__{setting}": value})
    assert captions_of(folder) == expected, "generation_config.json goes before config.json"
    (folder / "generation_config.json").unlink()
    message = refused(folder)
    assert f"config.json sets {setting} to {value!r}" in message and "set it to" in message
    if setting in ("repetition_penalty", "no_repeat_ngram_size", "min_length"):  # others are not allowed there at all
        (folder / "generation_config.json").write_text(json.dumps({setting: value}))
        assert f"generation_config.json sets {setting} to {value!r}" in refused(folder)


def test_generation_settings_of_the_public_blip_are_accepted(folder: Path) -> None:
    expected = captions_of(folder)
    describe(folder, "generation_config.json", repetition_penalty=1.0, min_length=0, max_length=20, num_beams=3)
    assert captions_of(folder) == expected


def test_size_that_the_image_processor_does_not_make_is_refused(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    del described["vision_config"]["image_size"]
    (folder / "config.json").write_text(json.dumps(described))
    assert "size" in refused(folder)


# --- words -----------------------------------------------------------------------------------------------------------

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] a dog ##s ' s t don ##' , . ! ? can n ##' ##t n't 's 're 've 'm ( ) - ## "
    "caf\u00e9 \u732b ##ly quick"
).split()


def with_vocabulary(folder: Path, **config: Any) -> Path:
    """A folder with word pieces in `vocab.txt` alone."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "blip"}))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_plain(folder: Path) -> None:
    with_vocabulary(folder)


def make_configured(folder: Path) -> None:
    with_vocabulary(folder, tokenizer_class="BertTokenizer", bos_token="[DEC]", clean_up_tokenization_spaces=True)


def make_additional(folder: Path) -> None:
    with_vocabulary(
        folder, bos_token="[BEGIN]", additional_special_tokens=["[ENC]"], tokenizer_class="BertTokenizerFast"
    )
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"cls_token": {"content": "[CLS]", "lstrip": False}, "eos_token": "[END]"})
    )
    (folder / "added_tokens.json").write_text(json.dumps({"[ENC]": len(WORDS), "meow": len(WORDS) + 1}))


def make_saved(folder: Path) -> None:
    with_vocabulary(folder)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    tokenizer.add_tokens(["meow"])
    tokenizer.save_pretrained(folder)


def make_saved_without_configuration(folder: Path) -> None:
    make_saved(folder)
    (folder / "tokenizer_config.json").unlink()


def make_decoder_table(folder: Path) -> None:
    make_saved(folder)
    table = {"0": "[PAD]", "5": "[DEC]", str(len(WORDS)): "[ENC]"}
    describe(folder, "tokenizer_config.json", added_tokens_decoder={
        number: {"content": word, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                 "single_word": False}
        for number, word in table.items()
    })  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [make_plain, make_configured, make_additional, make_saved, make_saved_without_configuration, make_decoder_table],
    ids=lambda make: make.__name__,
)
def test_words_are_those_of_transformers_tokenizer(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "words")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "words"), load_tokenizer(tmp_path / "words")
    rng = np.random.default_rng(0)
    count = len(theirs)
    rows = [*([i] for i in range(count)), *(rng.integers(0, count, rng.integers(0, 12)).tolist() for _ in range(400))]
    for skipping in (True, False):
        expected = theirs.batch_decode(rows, skip_special_tokens=skipping)
        assert ours.batch_decode(rows, skip_special_tokens=skipping) == expected
    assert len({*theirs.batch_decode(rows, skip_special_tokens=True)}) > 300


def test_tokenizer_of_another_kind_is_read_by_transformers(tmp_path: Path) -> None:
    make_saved(tmp_path / "words")
    describe(tmp_path / "words", "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    theirs, ours = (read(tmp_path / "words") for read in (AutoTokenizer.from_pretrained, load_tokenizer))
    assert type(ours) is type(theirs)


# --- what is imported ------------------------------------------------------------------------------------------------


def test_captioning_imports_neither_transformers_nor_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "captioner").mkdir()
    captioner.save_tiny_captioner(tmp_path / "captioner", 0)
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from nsnet.captioner import Captioner\n"
        "from nsnet.configuration import CaptionerConfig\n"
        "config = CaptionerConfig(model=None, max_new_tokens=4)\n"
        "for folder in (None, Path(sys.argv[1])):\n"
        "    assert Captioner.load(config, folder).caption(np.zeros((2, 64, 64, 3), np.uint8))[0]\n"
        "print(sorted({'torch._dynamo', 'transformers', 'transformers.generation'} & {*sys.modules}))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "captioner")]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
