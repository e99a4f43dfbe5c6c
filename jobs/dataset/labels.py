"""Interpret values as labels: real = 0, fake = 1, or None if the context does not determine it.

Some words are unambiguous; others, such as `human`, count only beside a word of the other label. Numbers are ambiguous:
0 and 1 are this project's labels, but also the first two of a thousand classes, or a data set's own order with `fake`
first. So `meanings` interprets all values of a column together, with the names that the file gives its numbers, if any.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final

from nsnet.errors import SourceError

WORDS: Final = {
    "0": 0, "real": 0, "0_real": 0, "nature": 0, "1": 1, "fake": 1, "1_fake": 1, "ai": 1, "ai_generated": 1,
    "ai-generated": 1,
}  # fmt: skip
"""Words that are always labels, in lower case."""
PAIRED_WORDS: Final = {word: label for word, label in WORDS.items() if not word.isdigit()} | {
    "natural": 0, "human": 0, "human_made": 0, "authentic": 0, "original": 0, "originals": 0, "genuine": 0,
    "pristine": 0, "photo": 0, "photos": 0, "photograph": 0, "photographs": 0, "camera": 0, "reals": 0,
    "generated": 1, "synthetic": 1, "synthetics": 1, "synthesis": 1, "synthesized": 1, "fakes": 1, "ai_gen": 1,
    "ai_made": 1, "aigc": 1, "artificial": 1, "deepfake": 1, "deepfakes": 1, "deep_fake": 1, "generated_ai": 1,
    "machine_generated": 1, "computer_generated": 1,
}  # fmt: skip
"""Words of a name, joined by `_`, that are a label if a word of the other label is beside them."""
NO_GENERATOR: Final = "(none)"
"""What images without a generator are grouped under."""
NOUNS: Final = frozenset(
    "image images img imgs picture pictures pic pics photo photos photograph photographs art arts artworks data "
    "dataset face faces sample samples set file files class jpg jpeg png webp train training val valid validation test "
    "testing".split()
)  # fmt: skip
"""Words that are ignored in a name, as in `train_real` and `AiArtData`."""
HUMP: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
WORD: Final = re.compile(r"[^\W_]+")
MAX_DIGITS: Final = 100
"""Maximum digits of a number: `1e999999999` is a short text."""
MAX_WORD: Final = 200
"""Characters of a text that are searched for a label."""
MAX_SHOWN: Final = 5
UNKNOWN: Final = -1
"""Number that data sets use for an unknown label."""
HUGGINGFACE: Final = b"huggingface"
"""Key of the features of `datasets` in a Parquet file's metadata."""
MAX_FEATURES_BYTES: Final = 2**16
"""Maximum metadata of `datasets` that are read."""


def is_missing(value: Any) -> bool:
    """Whether a value is missing: null, NaN (as pandas writes it), or an empty text."""
    return value is None or value == "" or value != value


def word(value: str) -> int | None:
    """The label of an unambiguous word, else None."""
    return WORDS.get(value.strip().lower())


@lru_cache(maxsize=2**16)
def paired_label(name: str) -> int | None:
    """The label of a name or a value if a word of the other label is beside it, else None."""
    words = words_of(name)
    if "_".join(words) in PAIRED_WORDS:
        return PAIRED_WORDS["_".join(words)]
    return PAIRED_WORDS.get("_".join(word for word in words if word not in NOUNS and not word.isdigit()))


def words_of(name: str) -> list[str]:
    """Words of a name in lower case: `AIGenerated images` gives `ai`, `generated`, `images`."""
    return WORD.findall(HUMP.sub("_", name).lower())


def number(value: Any) -> int | None:
    """A value as an integer; None if it is not one, such as a word or 0.5."""
    try:
        decimal = Decimal(str(int(value) if isinstance(value, bool) else value).strip())
    except ArithmeticError:
        return None
    if not decimal.is_finite() or decimal.adjusted() > MAX_DIGITS:
        return None
    return int(decimal) if decimal == decimal.to_integral_value() else None


def meanings(values: Iterable[Any], names: Sequence[str] | None = None) -> Mapping[Any, int] | None:
    """Value -> label, for the distinct values of a column or of all `.cls` members of a tar; other values have none.

    An ambiguous word, such as `human`, counts if a word of the other label is among the values. `names`: the file's
    names of its numbers, in order (a ClassLabel of `datasets`). Returns None if the values are not labels, such as
    numbers other than 0 and 1.
    """
    labels: dict[Any, int] = {}
    texts: dict[Any, str] = {}
    for value in values:
        if is_missing(value):
            continue
        index = number(value)
        if index is None:
            if not isinstance(value, str):
                return None  # 0.5, infinity: not a class
            texts[value] = value
        elif names is not None:
            texts |= {value: names[index]} if 0 <= index < len(names) else {}
        elif index in (0, 1):
            labels[value] = index
        elif index != UNKNOWN:
            return None
    possible = {paired_label(text[:MAX_WORD]) for text in (*texts.values(), *(names or ()))}
    for value, text in texts.items():
        label, ambiguous = word(text), paired_label(text[:MAX_WORD])
        if label is None and ambiguous is not None and 1 - ambiguous in possible:
            label = ambiguous
        if label is not None:
            labels[value] = label
    return labels


def without_label(values: Iterable[Any], found: Mapping[Any, int], names: Sequence[str] | None = None) -> str | None:
    """Text that lists the values (or their names) without a label in `found`; None: all have one."""
    unlabelled = set()
    for value in values:
        if not is_missing(value) and value not in found and (index := number(value)) != UNKNOWN:
            is_named = names is not None and index is not None and 0 <= index < len(names)
            unlabelled.add(names[index] if is_named else str(value))  # type: ignore[index]
    shown = [repr(text[:40]) for text in sorted(unlabelled)[:MAX_SHOWN]] + ["…"] * (len(unlabelled) > MAX_SHOWN)
    return ", ".join(shown) or None


def class_names(key_value: Mapping[bytes, bytes], column: str) -> list[str] | None:
    """Class names of a column's numbers in a Parquet file's `huggingface` metadata; None: it gives no names.

    Raises `SourceError` if the metadata are damaged: read without its names, a number may mean the opposite.
    """
    metadata = key_value.get(HUGGINGFACE)
    if not metadata:
        return None
    try:
        value = json.loads(metadata) if len(metadata) <= MAX_FEATURES_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SourceError(f"its `huggingface` metadata are not a JSON object of at most {MAX_FEATURES_BYTES:,} bytes")
    for key in ("info", "features", column):
        value = value.get(key)
        if not isinstance(value, dict):
            return None
    if value.get("_type") != "ClassLabel":
        return None
    names = value.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"its `huggingface` metadata name the classes of `{column}` by other values than texts")
    return names


def text(value: Any) -> str | None:
    """The name of a generator or split; None if it is missing."""
    return None if is_missing(value) else str(value)
