"""BLIP base, as `Salesforce/blip-image-captioning-base` has it but for the values of its weights, against transformers.

About 80 s of a core, and 3.2 GiB.
"""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

from nsnet.captioner import Captioner
from nsnet.configuration import CaptionerConfig
from nsnet.decoding import CaptionBatch

STEPS = 20
TEXT = {
    "num_attention_heads": 12, "vocab_size": 30524, "bos_token_id": 30522, "sep_token_id": 102,
    "initializer_range": 0.05,
}  # fmt: skip
VISION = {"image_size": 384, "initializer_range": 0.03}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blip-base")
    words = ["[PAD]", *(f"w{i}" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"{'##' if i % 3 == 0 else ''}w{i}" for i in range(len(words), 30522)]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(str(path / "vocab.txt"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    tokenizer.save_pretrained(path)
    BlipImageProcessor().save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(16)
        model = BlipForConditionalGeneration(BlipConfig(text_config=TEXT, vision_config=VISION))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.05 * torch.randn_like(parameter)
    assert 220e6 < sum(parameter.numel() for parameter in model.parameters()) < 260e6
    model.save_pretrained(path)
    return path


@torch.inference_mode()
def test_tokens_and_logits_are_those_of_transformers(folder: Path) -> None:
    captioner = Captioner.load(CaptionerConfig(max_new_tokens=STEPS), folder)
    thumbnails = np.random.default_rng(0).integers(0, 256, (4, 384, 384, 3), dtype=np.uint8)
    thumbnails[1] //= 3
    thumbnails[2, :200] = 250
    pixels = torch.from_numpy(thumbnails).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - captioner.mean) / captioner.std
    ours = captioner.model
    image = ours.vision_model(pixels)
    tokens = ours.generate(pixels, STEPS)
    captions = captioner.caption(thumbnails)
    batch = CaptionBatch(ours._shape(image, STEPS), image.device)
    for layer, keys_values in zip(ours.text_decoder.layers, batch.image, strict=True):
        keys_values.copy_(layer.image_keys_values(image))
    given = torch.cat([torch.full((4, 1), 30522), tokens[:, :-1]], dim=1)
    logits = torch.stack([ours.text_decoder(given[:, i], i, batch.image, batch.words) for i in range(STEPS)], dim=1)
    tokenizer = captioner.tokenizer
    del captioner, ours, batch
    gc.collect()

    theirs = BlipForConditionalGeneration.from_pretrained(folder)
    features = theirs.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(image, features, atol=1e-4, rtol=1e-4)
    expected = theirs.text_decoder(given, encoder_hidden_states=features).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(tokens, theirs.generate(pixels, max_new_tokens=STEPS, do_sample=False, num_beams=1)[:, 1:])
    assert expected.std() > 0.5 and len({tuple(row) for row in tokens.tolist()}) == 4
    from transformers import AutoTokenizer

    decoded = AutoTokenizer.from_pretrained(folder).batch_decode(tokens, skip_special_tokens=True)
    assert tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True) == decoded
    assert captions == [" ".join(text.split()) for text in decoded]
