"""Features of captions: shorter padding changes nothing, and each caption is encoded once."""

import open_clip
import pytest
import torch

from nsnet import clip
from nsnet.clip import Clip
from nsnet.configuration import ClipConfig
from nsnet.text_features import TextFeatures
from tests.support import models

LONG = " ".join(["a tall tower of stone beside the old river"] * 3)
CAPTIONS = ["a dog", "two cats on a red chair", LONG, "", "a dog", " ".join(["word"] * 60)]
CONTEXT = 48
CONFIG = ClipConfig(
    model="small", pretrained=None,
    architecture={**models.ARCHITECTURE, "text_cfg": {**models.ARCHITECTURE["text_cfg"], "context_length": CONTEXT}},
)  # fmt: skip


@pytest.fixture(scope="module")
def tower() -> Clip:
    loaded = clip.load_clip(CONFIG)
    models.randomise(loaded.model, 3)
    return loaded


def calls(tower: Clip, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the calls of the text tower."""
    seen: list[tuple[int, int]] = []
    original = tower._encode_short
    monkeypatch.setattr(tower, "_encode_short", lambda tokens: seen.append(tuple(tokens.shape)) or original(tokens))
    return seen


def test_length_is_the_least_that_holds_the_caption(tower: Clip) -> None:
    assert tower.text_lengths(CAPTIONS) == [16, 16, 32, 16, 16, CONTEXT]
    assert tower.text_lengths([]) == []
    tokens = tower._tokens(["word " * count for count in (14, 15, 30, 31, 46, 47)])
    assert (tokens.argmax(dim=1) + 1).tolist() == [16, 17, 32, 33, 48, 48]
    assert tower.text_lengths(["word " * count for count in (14, 15, 30, 31)]) == [16, 32, 32, CONTEXT]


def test_features_equal_those_of_the_whole_context(tower: Clip) -> None:
    expected = tower.model.encode_text(tower._tokens(CAPTIONS))  # type: ignore[operator]
    assert len(torch.unique(expected.round(decimals=3), dim=0)) == 5
    torch.testing.assert_close(TextFeatures(tower).of(CAPTIONS), expected, atol=1e-5, rtol=1e-5)
    for caption, feature in zip(CAPTIONS, expected, strict=True):
        torch.testing.assert_close(tower.encode_text([caption])[0], feature, atol=1e-5, rtol=1e-5)


def test_length_that_cuts_a_caption_gives_another_feature(tower: Clip) -> None:
    whole, cut = (tower.encode_text([LONG], length)[0] for length in (32, 16))
    assert (whole - cut).abs().max() > 1e-3


def test_calls_have_equal_shapes_and_each_caption_is_encoded_once(tower: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(tower, monkeypatch)
    features = TextFeatures(tower, batch_size=2)
    first = features.of(CAPTIONS)
    assert sorted(seen) == [(2, 16), (2, 16), (2, 32), (2, CONTEXT)]
    again = features.of(CAPTIONS[::-1])
    assert len(seen) == 4
    assert torch.equal(again.flip(0), first)


def test_feature_does_not_depend_on_the_other_captions(tower: Clip) -> None:
    together = TextFeatures(tower, batch_size=4).of(CAPTIONS)
    for caption, feature in zip(CAPTIONS, together, strict=True):
        assert torch.equal(TextFeatures(tower, batch_size=4).of([caption])[0], feature)


def test_without_a_batch_size_nothing_is_remembered_or_padded(tower: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(tower, monkeypatch)
    features = TextFeatures(tower)
    assert torch.equal(features.of(CAPTIONS[:2]), features.of(CAPTIONS[:2]))
    assert seen == [(2, 16), (2, 16)]


def test_oldest_features_are_forgotten(tower: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(tower, monkeypatch)
    features = TextFeatures(tower, batch_size=1, entries=2)
    for caption in ("a dog", "a cat", "a bird", "a bird", "a dog"):
        assert features.of([caption]).shape == (1, tower.embed_dim)
    assert len(seen) == 4
    assert features.of(["a", "b", "c", "d"]).shape == (4, tower.embed_dim)


def test_tower_that_is_not_causal_gets_the_whole_context() -> None:
    text = {**models.ARCHITECTURE["text_cfg"], "no_causal_mask": True}
    model = open_clip.CustomTextCLIP(
        embed_dim=32, vision_cfg=models.ARCHITECTURE["vision_cfg"], text_cfg=text, output_dict=False
    ).eval()
    tower = Clip(model, open_clip.get_tokenizer("ViT-B-32", context_length=16), CONFIG)
    assert tower.text_lengths(["a dog"]) == [16]
    expected = model.encode_text(tower._tokens(["a dog"]))
    assert torch.equal(TextFeatures(tower, 1).of(["a dog"]), expected)
