"""The paper's sizes with seeded random weights: ViT-L/14 in open_clip's format, BLIP base in transformers'.

About a minute on two idle cores, and 6 GiB. The weights say nothing; files, loaders, shapes and numbers are real.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsnet import clip, clip_weights, recipes
from nsnet.configuration import ClipConfig
from nsnet.detector import Detector
from nsnet.training import Batch, build_optimizer, training_step
from tests.support import models

VOCABULARY = Path(__file__).parents[3] / "shared/data/tokenizers/bert_base_uncased_vocab.txt"
CAPTIONS = ["a red boat on a lake", "two dogs asleep under a table, seen from above", "the moon"]
CONFIG = recipes.get("vit-l-14").detector


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Reference(NamedTuple):
    """Weights on disk, and what stock open_clip and Hugging Face's CLIP make of them."""

    folder: Path
    """open_clip's `local-dir` format."""
    pixels: Tensor
    image: Tensor
    text: Tensor
    huggingface_image: Tensor
    huggingface_text: Tensor

    @property
    def file(self) -> Path:
        return self.folder / clip_weights.WEIGHTS_FILE


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    from transformers import CLIPModel

    folder = tmp_path_factory.mktemp("vit-l-14")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(14)
        stock = open_clip.create_model(CONFIG.clip.model, pretrained=None).eval()
        models.randomise(stock, 0, only="bias", std=0.02)
        mean, std = (
            torch.tensor(value).view(1, 3, 1, 1)
            for value in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        pixels = (torch.from_numpy(models.mosaics(3, 224)).permute(0, 3, 1, 2) / 255.0 - mean) / std
        tokens = open_clip.get_tokenizer(CONFIG.clip.model)(CAPTIONS)
        image, text = stock.encode_image(pixels), stock.encode_text(tokens)
        clip.Clip(stock, None, CONFIG.clip).save(folder)
        del stock
        with torch.device("meta"):
            theirs = CLIPModel(models.huggingface_clip_config(open_clip.get_model_config(CONFIG.clip.model)))
        theirs.to_empty(device="cpu").eval()
        for embeddings in (theirs.vision_model.embeddings, theirs.text_model.embeddings):
            embeddings.position_ids.copy_(torch.arange(embeddings.position_ids.shape[1])[None])
        theirs.load_state_dict(models.huggingface_clip_state(load_file(folder / clip_weights.WEIGHTS_FILE)))
        out = theirs(input_ids=tokens, pixel_values=pixels)
        del theirs
    gc.collect()
    yield Reference(folder, pixels, image, text, out.image_embeds, out.text_embeds)
    (folder / clip_weights.WEIGHTS_FILE).unlink()  # 1.7 GB that pytest would keep


@pytest.fixture(scope="module")
def blip_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """BLIP base as `Salesforce/blip-image-captioning-base` has it, but for the values of its weights."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    if not VOCABULARY.is_file():
        pytest.skip(f"no vocabulary of BERT at {VOCABULARY}")
    folder = tmp_path_factory.mktemp("blip-base")
    tokenizer = BertTokenizerFast(str(VOCABULARY), do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]", "[SEP]"]) == [30522, 30523, 102]
    text = {"num_attention_heads": 12, "vocab_size": 30524, "bos_token_id": 30522, "sep_token_id": 102}
    with torch.random.fork_rng():
        torch.manual_seed(16)
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config={"image_size": 384}))
    assert 220e6 < sum(parameter.numel() for parameter in model.parameters()) < 260e6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessor().save_pretrained(folder)
    del model
    gc.collect()
    yield folder
    (folder / "model.safetensors").unlink()


def test_vit_l_14_gives_the_features_of_open_clip_and_hugging_face(reference: Reference) -> None:
    loaded = clip.load_clip(CONFIG.clip, clip_weights.find_weights(CONFIG.clip, reference.folder))
    assert (loaded.embed_dim, loaded.image_px) == (768, 224) and loaded.mean == open_clip.OPENAI_DATASET_MEAN
    with torch.no_grad():
        image = loaded.visual(reference.pixels)
    text = loaded.encode_text(CAPTIONS)
    torch.testing.assert_close(image, reference.image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text, reference.text, atol=1e-5, rtol=1e-5)
    assert models.cosine(image, reference.huggingface_image) > 0.9999
    assert models.cosine(text, reference.huggingface_text) > 0.9999


def test_vit_l_14_and_blip_base_take_a_training_step_and_predict(
    reference: Reference, blip_base: Path, tmp_path: Path
) -> None:
    recipe = recipes.get("vit-l-14")
    detector = Detector.build(CONFIG, clip_weights=reference.file)
    network = detector.network
    adapters = [p for name, p in network.named_parameters() if p.requires_grad and name.startswith("visual.")]
    assert sum(parameter.numel() for parameter in adapters) == 884_736

    with torch.no_grad():
        out = network(torch.from_numpy(models.mosaics(3, 224)), detector.clip.encode_text(CAPTIONS))
    torch.testing.assert_close(out.image, reference.image, atol=1e-5, rtol=1e-5)
    assert models.cosine(out.image, reference.huggingface_image) > 0.9999

    before = {
        name: parameter.detach().clone() for name, parameter in network.named_parameters() if parameter.requires_grad
    }
    frozen = network.visual.base_model.model.transformer.resblocks[23].attn.q_proj.base_layer.weight  # type: ignore[union-attr, index]
    frozen_before = frozen.clone()
    batch = Batch(
        torch.from_numpy(models.mosaics(2, 224, seed=1)),
        detector.clip.encode_text(CAPTIONS[:2]),
        torch.tensor([0, 1]),
        torch.ones(2, dtype=torch.bool),
    )
    network.train()
    losses, energy = training_step(
        network, batch, build_optimizer(network, recipe.training), CONFIG.loss, recipe.training
    )
    assert all(bool(torch.isfinite(value)) for value in losses) and 0 < energy / 2 <= 1  # of two rows
    after = dict(network.named_parameters())
    # A starts with B at zero, so that its first gradient is zero: all that is trained moves but A
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert still == {name for name in before if ".lora_A." in name} or not still
    assert torch.equal(frozen, frozen_before)

    network.eval()
    models.randomise(network, 3, only="lora_B", std=0.02)  # one step hardly moves the adapters: the merge must count
    expected = detector.score(models.mosaics(2, 224, seed=2), CAPTIONS[:2])
    description = detector.save(tmp_path / "bundle", training={"steps": 1})
    assert sum(path.stat().st_size for path in (tmp_path / "bundle").rglob("*")) < 20e6
    plain_image = out.image
    del detector, network, after, before, frozen, frozen_before
    gc.collect()

    loaded = Detector.load(tmp_path / "bundle", clip_weights=reference.folder, captioner=blip_base)
    assert loaded.detector_id == description.detector_id
    with torch.no_grad():
        merged = loaded.network.visual(reference.pixels)
    assert (merged - plain_image).abs().max() > 1e-3
    scores = loaded.score(models.mosaics(2, 224, seed=2), CAPTIONS[:2])
    np.testing.assert_allclose(scores.logit, expected.logit, atol=1e-5)

    assert loaded.captioner is not None and loaded.captioner.thumbnail_px == 384
    verdicts = loaded.predict([models.image(1, 640, 480), models.file_bytes(models.image(2, 300, 500), "JPEG")])
    for verdict in verdicts:
        assert verdict.status == "scored", verdict
        assert verdict.verdict in ("real", "fake") and 0 <= verdict.prob_fake <= 1  # type: ignore[operator]
        assert verdict.caption
        assert not {"[DEC]", "[ENC]", "[CLS]", "[SEP]", "[PAD]"} & set(verdict.caption.upper().split())
    assert [(verdict.width, verdict.height) for verdict in verdicts] == [(640, 480), (300, 500)]


def test_named_weights_from_a_file_keep_the_normalisation_of_their_name(tmp_path: Path) -> None:
    model, tag = "MobileCLIP2-S0", "dfndr2b"  # the smallest whose normalisation is not OpenAI's; SigLIP's is not either
    weights = tmp_path / "weights.safetensors"
    untagged = clip.load_clip(ClipConfig(model=model, pretrained=None))
    assert untagged.mean == (0.0, 0.0, 0.0)  # random weights take those of the model's first tag
    save_file(untagged.model.state_dict(), weights)
    tagged = clip.load_clip(ClipConfig(model=model, pretrained=tag), weights)
    assert tagged.mean == (0.0, 0.0, 0.0) and tagged.std == (1.0, 1.0, 1.0)
    assert tagged.digest() == untagged.digest()
    weights.unlink()
