"""Defines the allowed settings of each JSON file of a model folder: an allow-list of keys and of their values.

JSON settings can make a library import classes (`auto_map`, `auto_mapping`, `tokenizer_class`), run Python files
(`trust_remote_code`), download from a hub (`hf_model_name`, `hf-hub:…`, `attn_implementation`) and open paths
(`vocab_file`, `bpe_path`, `weight_map`). Settings that are not known to be harmless are therefore refused, by name,
before a library reads the file. Most values may also not look like a path, a URL or the name of a repository.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

Rule: TypeAlias = "Callable[[Any], bool] | Mapping[str, Rule]"
"""A test of a value, or the rules of an object's keys; other keys are refused."""

MAX_TEXT: Final = 256
MAX_DEPTH: Final = 4


def plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Allow a number, flag, name or null, or lists and objects of them, but no path, URL or repository."""
    if isinstance(value, list) and depth:
        return all(plain(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return all(plain(part, 0) for part in value) and all(plain(item, depth - 1) for item in value.values())
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and not re.search(r"[/\\:~\0]|\.\.", value)
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and not math.isnan(value))


def ignored(value: Any) -> bool:
    """Allow any value and hide it from libraries: the origin of a file, or settings that are not used here."""
    return True


def anything(value: Any) -> bool:
    """Allow any value: the library that reads it treats it as data, without paths or classes."""
    return True


def off(value: Any) -> bool:
    """Allow only values that switch a feature off."""
    return value is None or value is False or value in ("", [], {}, ())


def one_of(*allowed: Any) -> Callable[[Any], bool]:
    """Allow one of these values, of the same type."""
    return lambda value: any(type(value) is type(known) and value == known for known in allowed)


def text(pattern: str) -> Callable[[Any], bool]:
    """Allow null or a text that matches the pattern."""
    return lambda value: value is None or (isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def number(value: Any) -> bool:
    """Allow a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def channels(value: Any) -> bool:
    """Allow null or a number for each of the three channels of an image."""
    return value is None or (isinstance(value, list) and len(value) == 3 and all(map(number, value)))


def token(value: Any) -> bool:
    """Allow one or several tokens of a tokenizer: a text, or an object with its text and flags."""
    if isinstance(value, list):
        return all(token(item) for item in value)
    if isinstance(value, dict):
        flags = {"lstrip", "normalized", "rstrip", "single_word", "special"}
        return all(
            isinstance(part, bool) if key in flags else key in ("content", "__type") and isinstance(part, str)
            for key, part in value.items()
        )
    return value is None or (isinstance(value, str) and len(value) <= MAX_TEXT)


def tokens(value: Any) -> bool:
    """Allow tokens by name or number, or as a list."""
    return value is None or (all(map(token, value.values())) if isinstance(value, dict) else token(value))


def _each(names: str, rule: Rule = plain) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


# --- CLIP, in open_clip's format -------------------------------------------------------------------------------------

TEXT_TOWERS: Final = (
    "bert-base-uncased", "facebook/nllb-200-distilled-1.3B", "facebook/nllb-200-distilled-600M", "google/mt5-base",
    "google/mt5-xl", "roberta-base", "xlm-roberta-base", "xlm-roberta-large",
)  # fmt: skip
"""Text towers of transformers that open_clip's own architectures use; their configuration is downloaded by name."""

_BLOCKS: Final = _each(
    "width layers mlp_ratio ls_init_value final_ln_after_pool pool_type output_tokens act_kwargs norm_kwargs "
    "block_type qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc"
)
_VISION: Final[dict[str, Rule]] = {
    **_BLOCKS,
    **_each("head_width patch_size image_size patch_dropout attentional_pool attn_pooler_queries attn_pooler_heads"),
    **_each("no_ln_pre pos_embed_type timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path"),
    "timm_model_name": text(r"\w+(\.\w+)?"),
    "timm_model_pretrained": off,
}
_TEXT: Final[dict[str, Rule]] = {
    **_BLOCKS,
    **_each("context_length vocab_size heads embed_cls pad_id eos_id no_causal_mask proj_bias proj_type"),
    **_each("hf_proj_type hf_pooler_type tokenizer_mode"),
    "hf_tokenizer_name": text(r"\w[\w.-]*(/\w[\w.-]*)?"),  # open_clip reads it from the folder
    "tokenizer_kwargs": {
        "clean": one_of("canonicalize", "lower", "whitespace"),
        "strip_sep_token": one_of(True, False),
    },
}
ARCHITECTURE: Final[dict[str, Rule]] = {
    **_each("embed_dim quick_gelu custom_text init_logit_scale init_logit_bias nonscalar_logit_scale"),
    "vision_cfg": _VISION,
    "text_cfg": _TEXT,
}
"""open_clip's `model_cfg` as a setting of this package: it may not download anything."""

OPEN_CLIP: Final[dict[str, Rule]] = {
    "model_cfg": {
        **ARCHITECTURE,
        "text_cfg": {**_TEXT, "hf_model_name": one_of(None, *TEXT_TOWERS), "hf_model_pretrained": off},
    },
    "preprocess_cfg": {**_each("size mode interpolation resize_mode fill_color"), **_each("mean std", channels)},
}

# --- LoRA, in peft's format ------------------------------------------------------------------------------------------

_PROJECTION: Final = one_of("q_proj", "k_proj", "v_proj")
ADAPTER: Final[dict[str, Rule]] = {
    "r": lambda value: type(value) is int and 1 <= value <= 4096,
    **_each("lora_alpha lora_dropout qalora_group_size", number),
    **_each("inference_mode init_lora_weights", one_of(True, False)),
    "peft_type": one_of("LORA"),
    "bias": one_of("none"),
    "target_modules": lambda value: isinstance(value, list) and all(map(_PROJECTION, value)),
    "peft_version": plain,
    "megatron_core": one_of("megatron.core"),  # peft's default, imported only with a `megatron_config`
    "auto_mapping": {"base_model_class": text(r"\w+"), "parent_library": text(r"open_clip\.\w+")},
    **_each(
        "alora_invocation_tokens alpha_pattern arrow_config base_model_name_or_path corda_config ensure_weight_tying "
        "eva_config exclude_modules fan_in_fan_out kasa_config layer_replication layers_pattern layers_to_transform "
        "loftq_config lora_bias lora_ga_config megatron_config modules_to_save monteclora_config rank_pattern revision "
        "target_parameters task_type trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config",
        off,
    ),
}  # fmt: skip

# --- BLIP, in the formats of transformers 4 and 5 --------------------------------------------------------------------

_ANY_MODEL: Final[dict[str, Rule]] = {
    **_each("_name_or_path _commit_hash transformers_version", ignored),
    **_each("dtype torch_dtype", one_of(None, "float32", "float16", "bfloat16")),
    **_each("tokenizer_class torchscript use_bfloat16 pruned_heads task_specific_params", off),
    **_each(
        "add_cross_attention bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward "
        "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping "
        "encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task "
        "forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder is_encoder_decoder "
        "label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
        "num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix "
        "problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id "
        "suppress_tokens temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings top_k top_p typical_p "
        "use_cache"
    ),
}
_TOWER: Final[dict[str, Rule]] = {
    **_ANY_MODEL,
    **_each(
        "attention_dropout attention_probs_dropout_prob dropout hidden_act hidden_dropout_prob hidden_size "
        "initializer_factor initializer_range intermediate_size label_smoothing layer_norm_eps num_attention_heads "
        "num_hidden_layers projection_dim architectures"
    ),
}
BLIP: Final[dict[str, Rule]] = {
    **_ANY_MODEL,
    **_each("image_text_hidden_size initializer_factor initializer_range label_smoothing logit_scale_init_value"),
    "projection_dim": plain,
    "architectures": one_of(None, ["BlipForConditionalGeneration"]),
    "model_type": one_of("blip"),
    "text_config": {
        **_TOWER,
        **_each("encoder_hidden_size max_position_embeddings vocab_size"),
        "model_type": one_of("blip_text_model"),
    },
    "text_config_dict": off,
    "vision_config": {
        **_TOWER,
        **_each("image_size num_channels patch_size"),
        "model_type": one_of("blip_vision_model"),
    },
    "vision_config_dict": off,
}

GENERATION: Final[dict[str, Rule]] = {
    "transformers_version": ignored,
    **_each(
        "_from_model_config bos_token_id decoder_start_token_id do_sample early_stopping eos_token_id length_penalty "
        "max_length min_length no_repeat_ngram_size num_beams output_attentions output_hidden_states pad_token_id "
        "repetition_penalty temperature top_k top_p use_cache"
    ),
}

PREPROCESSOR: Final[dict[str, Rule]] = _each(
    "crop_size data_format default_to_square device disable_grouping do_center_crop do_convert_rgb do_normalize do_pad "
    "do_rescale do_resize feature_extractor_type image_mean image_processor_type image_std input_data_format pad_size "
    "processor_class resample rescale_factor return_tensors size size_divisor"
)
PROCESSOR: Final[dict[str, Rule]] = {
    "image_processor": PREPROCESSOR,
    "processor_class": plain,
    "num_query_tokens": off,
}

# --- tokenizers of transformers, of CLIP and of BLIP -----------------------------------------------------------------

TOKENIZERS: Final = tuple(
    f"{name}Tokenizer{speed}"
    for name in (
        "Bert", "CLIP", "GPT2", "Gemma", "Llama", "MT5", "Nllb", "PreTrained", "Roberta", "Siglip", "Siglip2", "T5",
        "XLMRoberta",
    )
    for speed in ("", "Fast")
)  # fmt: skip
"""Tokenizer classes that only use a `tokenizer.json` or word list."""

_SPECIAL: Final[dict[str, Rule]] = {
    **_each("bos_token cls_token eos_token mask_token pad_token sep_token unk_token", token),
    **_each("additional_special_tokens extra_special_tokens", tokens),
}
SPECIAL_TOKENS: Final = _SPECIAL
TOKENIZER_CONFIG: Final[dict[str, Rule]] = {
    **_SPECIAL,
    "added_tokens_decoder": tokens,
    "tokenizer_class": one_of(None, "TokenizersBackend", *TOKENIZERS),
    **_each("errors never_split", token),
    **_each(
        "add_bos_token add_eos_token add_prefix_space clean_up_tokenization_spaces do_basic_tokenize do_lower_case "
        "extra_ids keep_accents language_codes legacy legacy_behaviour max_length model_input_names model_max_length "
        "pad_to_multiple_of pad_token_type_id padding_side processor_class return_token_type_ids sp_model_kwargs "
        "spaces_between_special_tokens src_lang stride strip_accents tgt_lang tokenize_chinese_chars trim_offsets "
        "truncation_side truncation_strategy use_default_system_prompt wordpieces_prefix"
    ),
    **_each(
        "_commit_hash backend chat_template is_local local_files_only name_or_path special_tokens_map_file "
        "tokenizer_file transformers_version use_fast",
        ignored,
    ),
}
TOKENIZER: Final[dict[str, Rule]] = _each(
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model", anything
)
_SHARD: Final = text(r"model-\d{5}-of-\d{5}\.safetensors")
WEIGHTS_INDEX: Final[dict[str, Rule]] = {
    "metadata": plain,
    "weight_map": lambda value: isinstance(value, dict) and all(map(_SHARD, value.values())),
}


def complaint(value: Any, rules: Mapping[str, Rule], place: str = "") -> str:
    """Describe the first setting that the rules do not allow, as part of a sentence; "" if all are allowed."""
    if not isinstance(value, dict):
        return f"{place or 'it'} must be an object"
    for key, part in value.items():
        name = f"{place}.{key}" if place else str(key)
        rule = rules.get(key)
        if rule is None:
            return f"{name[:MAX_TEXT]!r} is not an allowed setting"
        if isinstance(rule, Mapping):
            reason = "" if part is None else complaint(part, rule, name)
        else:
            reason = "" if rule(part) else f"{name!r} may not be {repr(part)[:80]}"
        if reason:
            return reason
    return ""


def shown(value: Any, rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Return an object without the settings that are hidden from libraries (`ignored`)."""
    return {
        key: shown(part, rule) if isinstance(rule := rules[key], Mapping) and part is not None else part
        for key, part in value.items()
        if rules[key] is not ignored
    }
