"""Turns tokens into text as transformers' tokenizers do, without its seconds of import."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordPiece

BERT: Final = (None, "BertTokenizer", "BertTokenizerFast")
"""Values of `tokenizer_class` for a vocabulary of word pieces, as every public BLIP has; None: not given."""
NAMED_TOKENS: Final = {
    "bos_token": None, "eos_token": None, "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
    "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip
"""Special tokens by name, with BERT's defaults, in the order in which those that no file lists get their numbers."""
PUNCTUATION: Final = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""Replacements in the text of a tokenizer with `clean_up_tokenization_spaces`."""


class CaptionTokenizer(Protocol):
    """What a captioner needs of a tokenizer."""

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = ...) -> Any:
        """Return the text of each sequence of tokens, without special tokens if so wanted."""


class WordPieces:
    """A vocabulary of word pieces."""

    def __init__(
        self, vocabulary: Mapping[str, int], special: Sequence[AddedToken] = (), *, cleans_up: bool = False
    ) -> None:
        """special: also tokens that are not in the vocabulary; those get the next numbers. cleans_up: apply
        `PUNCTUATION`."""
        self._tokenizer = Tokenizer(WordPiece(dict(vocabulary), unk_token="[UNK]"))
        self._tokenizer.decoder = decoders.WordPiece(prefix="##")
        self._tokenizer.add_tokens(list(special))
        self._cleans_up = cleans_up

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """Return the text of each sequence of tokens."""
        texts: list[str] = self._tokenizer.decode_batch(list(sequences), skip_special_tokens=skip_special_tokens)
        for old, new in PUNCTUATION if self._cleans_up else ():
            texts = [text.replace(old, new) for text in texts]
        return texts


def load_tokenizer(folder: Path) -> CaptionTokenizer:
    """Load the tokenizer of a private folder with checked files; other kinds than BERT's by transformers.

    For damaged files it raises what the libraries raise.
    """
    config = _json(folder, "tokenizer_config.json")
    described = _json(folder, "tokenizer.json")
    kind = described.get("model", {}).get("type", "WordPiece")
    if config.get("tokenizer_class") not in BERT or kind != "WordPiece":
        from transformers import AutoTokenizer  # seconds to import

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if described:
        vocabulary = described["model"]["vocab"]
    else:
        with (folder / "vocab.txt").open(encoding="utf-8") as lines:
            vocabulary = {line.rstrip("\n"): number for number, line in enumerate(lines)}
    special = list(_added(folder, config, described.get("added_tokens", [])))
    return WordPieces(vocabulary, special, cleans_up=config.get("clean_up_tokenization_spaces") is True)


def _added(folder: Path, config: Mapping[str, Any], in_tokenizer: Sequence[Mapping[str, Any]]) -> Iterator[AddedToken]:
    """Tokens that a folder adds to its vocabulary, in the order of their numbers, then the special ones by name."""
    named = {**NAMED_TOKENS, **{key: value for key, value in config.items() if key in NAMED_TOKENS}}
    others = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    added: dict[int, tuple[str, bool]] = {}
    if "added_tokens_decoder" in config:
        added = {
            int(i): (_text(token), token.get("special", False)) for i, token in config["added_tokens_decoder"].items()
        }
    else:
        for key, value in _json(folder, "special_tokens_map.json").items():
            if key in NAMED_TOKENS:
                named[key] = value
            elif key in ("extra_special_tokens", "additional_special_tokens"):
                others = value
        names = {_text(token) for token in (*named.values(), *_listed(others)) if token}
        for word, number in _json(folder, "added_tokens.json").items():
            added[number] = (word, word in names)
        for token in in_tokenizer:
            added[token["id"]] = (token["content"], token["special"])
    specials = [_text(token) for token in (*named.values(), *_listed(others)) if token]
    for _, (word, is_special) in sorted(added.items()):
        yield AddedToken(word, special=is_special or word in specials)
    for word in specials:
        yield AddedToken(word, special=True)


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens)


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _json(folder: Path, name: str) -> dict[str, Any]:
    """The content of a file; empty if there is none."""
    return json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
