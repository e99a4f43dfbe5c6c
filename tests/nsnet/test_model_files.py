"""Model folders from strangers: what could run, fetch or open something is refused by name before a library sees it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipImageProcessor,
    BlipProcessor,
    GenerationConfig,
)

from nsnet import captioner as captioner_module
from nsnet import captions, clip, clip_weights, lora, model_files, model_settings, weight_formats
from nsnet.captioner import Captioner
from nsnet.configuration import CaptionerConfig, ClipConfig
from nsnet.errors import ConfigError, WeightsError
from tests.support import models
from tests.support.tables import tar_bytes

TINY = CaptionerConfig(model=None, max_new_tokens=4)
SMALL = models.FROZEN.clip


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind; do not change it."""
    root = tmp_path_factory.mktemp("models")
    (root / "captioner").mkdir()
    captioner_module.save_tiny_captioner(root / "captioner", seed=0)
    clip.load_clip(SMALL).save(root / "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "captioner" / name, root / "clip" / name)
    described = json.loads((root / "clip" / clip_weights.CONFIG_FILE).read_text())
    described["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP"
    (root / "clip" / clip_weights.CONFIG_FILE).write_text(json.dumps(described))
    lora.save_lora(lora.add_lora(clip.load_clip(SMALL).visual, lora.LoraSettings(rank=2)), root / "lora")
    shutil.copytree(root / "clip", root / "text")
    return root


@pytest.fixture
def folders(stocked: Path, tmp_path: Path) -> Path:
    shutil.copytree(stocked, tmp_path / "models")
    return tmp_path / "models"


def use(folder: Path) -> None:
    """Load a folder as its kind is loaded."""
    if folder.name == "captioner":
        Captioner.load(TINY, folder)
    elif folder.name in ("clip", "text"):
        clip.load_clip(SMALL, folder)
    else:
        lora.merge_lora(clip.load_clip(SMALL).visual, folder)


def refused(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        use(folder)
    message = models.one_line(caught.value)
    assert str(folder) in message
    return message


def change(path: Path, keys: str, value: Any) -> None:
    """Set `a.b.c` in a JSON file."""
    values = json.loads(path.read_text()) if path.exists() else {}
    place, (*parents, last) = values, keys.split(".")
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = value
    path.write_text(json.dumps(values))


# --- what is refused -------------------------------------------------------------------------------------------------


def arm(folder: Path, target: Path) -> None:
    """Have the tokenizer of a CLIP folder run code that writes a file."""
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "tokenizer.py").write_text(f"open({str(target)!r}, 'w').close()\n")
    change(folder / clip_weights.CONFIG_FILE, "model_cfg.text_cfg.tokenizer_kwargs", {"trust_remote_code": True})
    where = f"{folder.parent / 'elsewhere'}--tokenizer.Tokenizer"
    change(folder / "tokenizer_config.json", "auto_map", {"AutoTokenizer": [None, where]})
    change(folder / "tokenizer_config.json", "tokenizer_class", "Foreign")


def test_clip_folder_with_code_is_refused_and_the_code_is_not_run(folders: Path, tmp_path: Path) -> None:
    arm(folders / "clip", tmp_path / "harmed")
    assert "tokenizer_kwargs.trust_remote_code" in refused(folders / "clip")
    assert not (tmp_path / "harmed").exists()


def test_code_of_the_test_above_is_armed(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only place that runs it: were the folder harmless, its refusal would prove nothing."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    arm(folders / "clip", tmp_path / "harmed")
    with pytest.raises(AttributeError):
        open_clip.get_tokenizer(f"local-dir:{folders / 'clip'}")
    assert (tmp_path / "harmed").exists()


SETTINGS = [
    ("clip/open_clip_config.json", "custom_pipelines", {"a": 1}),
    ("clip/open_clip_config.json", "model_cfg.text_cfg.tokenizer_kwargs", {"bpe_path": "/etc/passwd"}),
    ("clip/open_clip_config.json", "model_cfg.text_cfg.tokenizer_kwargs", {"clean": "other"}),
    ("clip/open_clip_config.json", "model_cfg.text_cfg.hf_model_name", "stranger/repository"),
    ("clip/open_clip_config.json", "model_cfg.text_cfg.hf_model_name", "/data/model"),
    ("clip/open_clip_config.json", "model_cfg.text_cfg.hf_tokenizer_name", "../elsewhere"),
    ("clip/open_clip_config.json", "model_cfg.vision_cfg.timm_model_name", "hf-hub:stranger/repository"),
    ("clip/open_clip_config.json", "model_cfg.vision_cfg.timm_model_name", "local-dir:/data"),
    ("clip/open_clip_config.json", "model_cfg.vision_cfg.timm_model_pretrained", True),
    ("clip/open_clip_config.json", "model_cfg.multimodal_cfg", {}),
    ("clip/tokenizer_config.json", "auto_map", {"AutoTokenizer": [None, "tokenizer.T"]}),
    ("clip/tokenizer_config.json", "trust_remote_code", True),
    ("clip/tokenizer_config.json", "tokenizer_class", "AutoModel"),
    ("clip/tokenizer_config.json", "tokenizer_class", "RagTokenizer"),
    ("clip/tokenizer_config.json", "vocab_file", "/etc/passwd"),
    ("clip/tokenizer_config.json", "fast_tokenizer_files", ["../tokenizer.json"]),
    ("clip/tokenizer_config.json", "init_inputs", ["/etc/passwd"]),
    ("clip/tokenizer_config.json", "added_tokens_decoder", {"0": {"content": "a", "auto_map": "b"}}),
    ("clip/tokenizer_config.json", "src_lang", "../elsewhere"),
    ("clip/special_tokens_map.json", "auto_map", {}),
    ("clip/tokenizer.json", "auto_map", {}),
    ("captioner/config.json", "auto_map", {"AutoModel": "modeling.Foreign"}),
    ("captioner/config.json", "model_type", "llama"),
    ("captioner/config.json", "architectures", ["Foreign"]),
    ("captioner/config.json", "_attn_implementation", "stranger/kernel"),
    ("captioner/config.json", "attn_implementation", "stranger/kernel"),
    ("captioner/config.json", "quantization_config", {"quant_method": "gptq"}),
    ("captioner/config.json", "transformers_weights", "../elsewhere.bin"),
    ("captioner/config.json", "tokenizer_class", "Foreign"),
    ("captioner/config.json", "num_labels", 10**9),
    ("captioner/config.json", "text_config.auto_map", {}),
    ("captioner/config.json", "text_config.hidden_act", "stranger/activation"),
    ("captioner/config.json", "vision_config.model_type", "llama"),
    ("captioner/config.json", "dtype", "os.system"),
    ("captioner/generation_config.json", "custom_generate", "stranger/repository"),
    ("captioner/generation_config.json", "cache_implementation", "offloaded"),
    ("captioner/generation_config.json", "num_return_sequences", 10**6),
    ("captioner/preprocessor_config.json", "auto_map", {"AutoImageProcessor": "a.B"}),
    ("captioner/processor_config.json", "image_processor.auto_map", {}),
    ("captioner/processor_config.json", "chat_template", "{{ 7 }}"),
    ("captioner/tokenizer_config.json", "auto_map", {}),
    ("captioner/model.safetensors.index.json", "weight_map", {"a": "../elsewhere.safetensors"}),
    ("captioner/model.safetensors.index.json", "weight_map", {"a": "/data/model-00001-of-00001.safetensors"}),
    ("lora/adapter_config.json", "auto_mapping", {"base_model_class": "C", "parent_library": "foreign"}),
    ("lora/adapter_config.json", "base_model_name_or_path", "stranger/repository"),
    ("lora/adapter_config.json", "modules_to_save", ["head"]),
    ("lora/adapter_config.json", "megatron_config", {"a": 1}),
    ("lora/adapter_config.json", "megatron_core", "foreign"),
    ("lora/adapter_config.json", "peft_type", "XLORA"),
    ("lora/adapter_config.json", "target_modules", "(a+)+$"),
    ("lora/adapter_config.json", "revision", "main"),
    ("lora/adapter_config.json", "r", 10**9),
    ("lora/adapter_config.json", "colour", "red"),
]


@pytest.mark.parametrize(("file", "keys", "value"), SETTINGS, ids=lambda part: str(part)[:40])
def test_setting_that_could_choose_code_or_a_place_is_refused_by_name(
    file: str, keys: str, value: Any, folders: Path
) -> None:
    change(folders / file, keys, value)
    message = refused((folders / file).parent)
    assert file.partition("/")[2] in message and keys.rpartition(".")[2] in message and "refused" in message


@pytest.mark.parametrize("kind", ["clip", "captioner"])
@pytest.mark.parametrize("name", ["tokenizer.py", "modeling_blip.py", "extension.so", "weights.pkl"])
def test_code_in_a_folder_is_refused_by_name(kind: str, name: str, folders: Path) -> None:
    (folders / kind / name).write_text("")
    assert f"{name} is refused: a model folder may hold no code" in refused(folders / kind)


def test_files_that_no_library_needs_are_not_shown_to_one(folders: Path) -> None:
    for name in ("README.md", "adapter_config.json", "chat_template.jinja", "tf_model.h5", ".gitattributes"):
        (folders / "captioner" / name).write_text("{}")
    (folders / "captioner" / "custom_generate").mkdir()
    (folders / "captioner" / "custom_generate" / "generate.py").write_text("")
    with model_files.opened(folders / "captioner", "captioner") as shown:
        assert {path.name for path in shown.iterdir()} == {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "vocab.txt",
        }  # fmt: skip
    assert not shown.exists()


def test_library_sees_what_was_checked_though_the_file_changes(folders: Path) -> None:
    with model_files.opened(folders / "clip", "clip") as shown:
        change(folders / "clip" / "tokenizer_config.json", "auto_map", {})
        (folders / "clip" / "tokenizer.py").write_text("")
        assert "auto_map" not in json.loads((shown / "tokenizer_config.json").read_text())
        assert not (shown / "tokenizer.py").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_link_out_of_the_folder_is_refused(name: str, folders: Path) -> None:
    (folders / "captioner" / name).rename(folders / name)
    (folders / "captioner" / name).symlink_to(folders / name)
    assert f"{name} is a link out of its folder" in refused(folders / "captioner")


def test_links_of_the_hubs_cache_are_followed(folders: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (folders / "captioner").iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    Captioner.load(TINY, snapshot)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_fifo_in_the_place_of_a_file_is_refused_at_once(name: str, folders: Path) -> None:
    (folders / "captioner" / name).unlink()
    os.mkfifo(folders / "captioner" / name)
    assert name in refused(folders / "captioner")


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, '{"bos_token":' + "[" * 900 + "]" * 900 + "}", " " * (2**20 + 1), "1" * 10_000],
    ids=["deep", "deep-objects", "deep-tokens", "large", "long-number"],
)
@pytest.mark.parametrize("file", ["clip/open_clip_config.json", "captioner/tokenizer_config.json"])
def test_json_that_would_hurt_is_refused(content: str, file: str, folders: Path) -> None:
    (folders / file).write_text(content)
    assert Path(file).name in refused((folders / file).parent)


def test_folder_of_very_many_files_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MAX_ENTRIES", 3)
    assert "more than 3 files" in refused(folders / "captioner")


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:/data", "a/b", "../b", "x" * 200 + "/"])
def test_name_that_is_a_place_is_refused(name: str) -> None:
    for make in (lambda: ClipConfig(model=name), lambda: ClipConfig(pretrained=name)):
        with pytest.raises(ConfigError, match="must be a name that open_clip knows"):
            make()
    if name != "a/b":  # for a captioner, a repository
        with pytest.raises(ConfigError, match="must be a name on the hub"):
            CaptionerConfig(model=name)
    with pytest.raises(ConfigError, match="must be a name on the hub"):
        CaptionerConfig(revision=name)


@pytest.mark.parametrize(
    ("tower", "setting"),
    [
        ("text_cfg", {"hf_model_name": "xlm-roberta-base"}),
        ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}),
        ("vision_cfg", {"timm_model_name": "hf-hub:a/b"}),
        ("vision_cfg", {"timm_model_pretrained": True}),
    ],
)
def test_architecture_that_fetches_or_chooses_code_is_refused(tower: str, setting: dict[str, Any]) -> None:
    architecture = {**models.ARCHITECTURE, tower: {**models.ARCHITECTURE[tower], **setting}}
    with pytest.raises(ConfigError, match=f"architecture: .*{next(iter(setting))}"):
        ClipConfig(model="small", pretrained=None, architecture=architecture)


# --- what is allowed -------------------------------------------------------------------------------------------------


def test_stocked_folders_load(stocked: Path) -> None:
    for kind in model_files.FOLDERS:
        use(stocked / kind)


def allowed(values: Any, rules: Any) -> str:
    return model_settings.complaint(json.loads(json.dumps(values)), rules)


def test_every_architecture_of_open_clip_with_two_towers_is_allowed() -> None:
    known = {name: open_clip.get_model_config(name) or {} for name in open_clip.list_models()}
    with_decoder = {name for name, config in known.items() if "multimodal_cfg" in config}
    found = {name: allowed({"model_cfg": config}, model_settings.OPEN_CLIP) for name, config in known.items()}
    assert {name for name, complaint in found.items() if complaint} == with_decoder
    towers = {config["text_cfg"].get("hf_model_name") for config in known.values()}
    assert towers - {None} <= {*model_settings.TEXT_TOWERS}


def test_configurations_of_the_installed_transformers_are_allowed() -> None:
    assert not allowed(BlipConfig().to_dict(), model_settings.BLIP)
    assert not allowed(BlipConfig().to_diff_dict(), model_settings.BLIP)
    assert not allowed(GenerationConfig(bos_token_id=1).to_diff_dict(), model_settings.GENERATION)
    assert not allowed(BlipImageProcessor().to_dict(), model_settings.PREPROCESSOR)


PUBLIC_TOWER = {
    "add_cross_attention": False, "architectures": None, "bad_words_ids": None, "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "length_penalty": 1.0,
    "is_encoder_decoder": False, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None,
    "torchscript": False, "transformers_version": "4.26.0.dev0", "typical_p": 1.0, "use_bfloat16": False,
    "_name_or_path": "", "initializer_factor": 1.0,
}  # fmt: skip
"""What transformers 4 writes into each tower's configuration besides its sizes, as in the public BLIP."""


def test_folder_of_transformers_4_loads_with_the_same_captions(folders: Path, stocked: Path) -> None:
    folder = folders / "captioner"
    described = json.loads((folder / "config.json").read_text())
    described |= {"_commit_hash": None, "torch_dtype": "float32", "transformers_version": None}
    for tower in ("text_config", "vision_config"):
        described[tower] = {**PUBLIC_TOWER, **described[tower]}
    (folder / "config.json").write_text(json.dumps(described))
    for key, value in {
        "do_basic_tokenize": True, "never_split": None, "special_tokens_map_file": "/home/me/.cache/map.json",
        "name_or_path": "me/blip", "processor_class": "BlipProcessor", "model_input_names": ["input_ids"],
    }.items():  # fmt: skip
        change(folder / "tokenizer_config.json", key, value)
    change(folder / "special_tokens_map.json", "unk_token", "[UNK]")
    thumbnails = models.mosaics(3)
    expected = Captioner.load(TINY, stocked / "captioner").caption(thumbnails)
    assert Captioner.load(TINY, folder).caption(thumbnails) == expected


def test_captioner_saved_by_transformers_5_loads(folders: Path, stocked: Path) -> None:
    """Its `BlipProcessor` writes one `processor_config.json`, and no `preprocessor_config.json`."""
    folder = folders / "captioner"
    processor = BlipProcessor(BlipImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    (folder / "preprocessor_config.json").unlink()
    processor.save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    expected, loaded = (Captioner.load(TINY, path) for path in (stocked / "captioner", folder))
    assert (loaded.mean == expected.mean).all() and (loaded.std == expected.std).all()
    thumbnails = models.mosaics(3)
    assert loaded.caption(thumbnails) == expected.caption(thumbnails)


def test_side_of_the_thumbnails_is_the_processors_where_the_model_leaves_it_out(folders: Path) -> None:
    described = json.loads((folders / "captioner" / "config.json").read_text())
    del described["vision_config"]["image_size"]
    (folders / "captioner" / "config.json").write_text(json.dumps(described))
    assert captions.thumbnail_px(folders / "captioner") == captions.TINY_SIDE_PX


# --- weights in another format ---------------------------------------------------------------------------------------


def torchscript(path: Path) -> None:
    import torch

    path.unlink()
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))


def archive(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("notes.txt", "no weights")


FOREIGN: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "lfs": (
        "a Git LFS pointer to weights: run `git lfs pull`",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ),
    "html": ("an HTML page: download", lambda path: path.write_text("\n<!DOCTYPE html><html>Sign in</html>")),
    "xml": ("an XML page: download", lambda path: path.write_text("<?xml version='1.0'?><Error/>")),
    "json": ("JSON: give the weight file", lambda path: path.write_text('{"weight_map": {}}')),
    "empty": ("empty: download it again", lambda path: path.write_bytes(b"")),
    "keras": ("a Keras weight file: use", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))),
    "torchscript": ("a TorchScript archive, which holds code: if you trust it", torchscript),
    "zeros": ("a file that begins with zeros: download it again", lambda path: path.write_bytes(bytes(9999))),
    "text": (
        "a text file that begins with 'Entry not found': download",
        lambda path: path.write_text("Entry not found"),
    ),
    "marked html": ("an HTML page: download", lambda path: path.write_text("\ufeff<!doctype html>", "utf-8")),
    "tar": ("a tar archive: unpack it", lambda path: path.write_bytes(tar_bytes({"a": b"x"}))),
    "onnx": ("an ONNX model: use", lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99))),
    "7z": ("a 7z archive: unpack it", lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(99))),
    "zip": ("a ZIP archive without tensors: unpack it", archive),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_weights_in_another_format_are_named_as_what_they_are(kind: str, suffix: str, tmp_path: Path) -> None:
    message, write = FOREIGN[kind]
    path = tmp_path / f"weights{suffix}"
    path.touch()
    write(path)
    with pytest.raises(WeightsError, match=message) as caught:
        weight_formats.check(path)
    assert str(path) in models.one_line(caught.value)
    with pytest.raises(WeightsError, match=message):
        clip.load_clip(SMALL, clip_weights.find_weights(SMALL, path))


@pytest.mark.parametrize("kind", ["lfs", "html", "empty", "torchscript"])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_folder_with_weights_in_another_format_names_them(kind: str, folders: Path) -> None:
    message, write = FOREIGN[kind]
    for name, weights in (("captioner", "model.safetensors"), ("clip", clip_weights.WEIGHTS_FILE)):
        write(folders / name / weights)
        assert f"{weights} is {message}" in refused(folders / name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.safetensors", "with the suffix .safetensors: rename it to .pt"),
        ("a.pt", "with another suffix: .* .safetensors"),
    ],
)
def test_weights_under_the_name_of_another_format_are_named(name: str, advice: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = {"a": torch.zeros(2)}
    torch.save(state, tmp_path / name) if name.endswith(".safetensors") else save_file(state, tmp_path / name)
    with pytest.raises(WeightsError, match=advice):
        weight_formats.check(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_transformers_clip_is_named_as_such(suffix: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = models.huggingface_clip_state(clip.load_clip(SMALL).model.state_dict())
    path = tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(WeightsError, match="transformers' CLIPModel .* open_clip_model.safetensors of the same model"):
        clip.load_clip(SMALL, path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(WeightsError, match="transformers' format; give .* in open_clip's") as caught:
        clip_weights.find_weights(SMALL, tmp_path)
    models.one_line(caught.value)


def test_header_of_safetensors_may_have_any_length(tmp_path: Path) -> None:
    """One of 0x120008 bytes begins as an ONNX model does."""
    header = b"{}".ljust(0x120008)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    weight_formats.check(tmp_path / "model.safetensors")
