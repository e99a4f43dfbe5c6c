"""What values mean as labels: real = 0, fake = 1, or None where their context does not say it.

Some words say what they mean, others, as `human`, only beside one of the other label. A number does not: 0 and 1 are
this project's labels, but also the first two of a thousand classes, or a data set's own order with `fake` first. So a
column is read as a whole (`meanings`), by the names that its file gives its numbers where there are any.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final

WORDS: Final = {
    "0": 0, "real": 0, "0_real": 0, "nature": 0, "1": 1, "fake": 1, "1_fake": 1, "ai": 1, "ai_generated": 1,
    "ai-generated": 1,
}  # fmt: skip
"""Words that are labels by themselves, small."""
PAIRED_WORDS: Final = {word: label for word, label in WORDS.items() if not word.isdigit()} | {
    "natural": 0, "human": 0, "human_made": 0, "authentic": 0, "original": 0, "originals": 0, "genuine": 0,
    "pristine": 0, "photo": 0, "photos": 0, "photograph": 0, "photographs": 0, "camera": 0, "reals": 0,
    "generated": 1, "synthetic": 1, "synthetics": 1, "synthesis": 1, "synthesized": 1, "fakes": 1, "ai_gen": 1,
    "ai_made": 1, "aigc": 1, "artificial": 1, "deepfake": 1, "deepfakes": 1, "deep_fake": 1, "generated_ai": 1,
    "machine_generated": 1, "computer_generated": 1,
}  # fmt: skip
"""Words of a name, joined by `_`, that are a label beside one of the other label."""
NOUNS: Final = frozenset(
    "image images img imgs image images pic pics photo photos photograph photographs art arts artworks data "
    "dataset face faces sample samples set file files class jpg jpeg png webp train training val valid validation test "
    "testing".split()
)  # fmt: skip
"""What is beside the word that counts, as in `train_real` and `AiArtData`."""
HUMP: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
WORD: Final = re.compile(r"[^\W_]+")
MAX_DIGITS: Final = 100
"""Of a number that is looked at: `1e999999999` is a short text."""
MAX_WORD: Final = 200
"""Letters of a text that are looked at for a label."""
MAX_SHOWN: Final = 5
UNKNOWN: Final = -1
"""Number that data sets write where they know no label."""
HUGGINGFACE: Final = b"huggingface"
"""Key of a Parquet file's metadata under which `datasets` keeps its features."""


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, NaN (as pandas writes it), an empty text."""
    return value is None or value == "" or value != value


def word(value: str) -> int | None:
    """The label that a word says; None: none."""
    return WORDS.get(value.strip().lower())


@lru_cache(maxsize=2**16)
def paired_label(name: str) -> int | None:
    """The label that a name or a value may be, if one of the other label stands beside it."""
    words = words_of(name)
    if "_".join(words) in PAIRED_WORDS:
        return PAIRED_WORDS["_".join(words)]
    return PAIRED_WORDS.get("_".join(word for word in words if word not in NOUNS and not word.isdigit()))


def words_of(name: str) -> list[str]:
    """Words of a name, small: `AIGenerated images` is `ai`, `generated`, `images`."""
    return WORD.findall(HUMP.sub("_", name).lower())


def number(value: Any) -> int | None:
    """A value as a whole number; None where it is none, such as a word or 0.5."""
    try:
        found = Decimal(str(int(value) if isinstance(value, bool) else value).strip())
    except ArithmeticError:
        return None
    if not found.is_finite() or found.adjusted() > MAX_DIGITS:
        return None
    return int(found) if found == found.to_integral_value() else None


def meanings(values: Iterable[Any], names: Sequence[str] | None = None) -> Mapping[Any, int] | None:
    """Value -> label, of the distinct values of a column or of all `.cls` members of a tar; values beyond it have none.

    A word that may be something else, as `human`, counts where one of the other label stands beside it. `names`: what
    the file calls its numbers, in their order (a ClassLabel of `datasets`). None: they are numbers whose context does
    not say that they are labels, as where there are more than 0 and 1.
    """
    found: dict[Any, int] = {}
    said: dict[Any, str] = {}
    for value in values:
        if is_missing(value):
            continue
        index = number(value)
        if index is None:
            if not isinstance(value, str):
                return None  # 0.5, infinity: no class at all
            said[value] = value
        elif names is not None:
            said |= {value: names[index]} if 0 <= index < len(names) else {}
        elif index in (0, 1):
            found[value] = index
        elif index != UNKNOWN:
            return None
    beside = {paired_label(text[:MAX_WORD]) for text in (*said.values(), *(names or ()))}
    for value, text in said.items():
        label, maybe = word(text), paired_label(text[:MAX_WORD])
        if label is None and maybe is not None and 1 - maybe in beside:
            label = maybe
        if label is not None:
            found[value] = label
    return found


def without_label(values: Iterable[Any], found: Mapping[Any, int], names: Sequence[str] | None = None) -> str | None:
    """The values, or what they are called, that `meanings` found no label of, for people; None: all have one."""
    left = set()
    for value in values:
        if not is_missing(value) and value not in found and (index := number(value)) != UNKNOWN:
            is_named = names is not None and index is not None and 0 <= index < len(names)
            left.add(names[index] if is_named else str(value))  # type: ignore[index]
    shown = [repr(text[:40]) for text in sorted(left)[:MAX_SHOWN]] + ["…"] * (len(left) > MAX_SHOWN)
    return ", ".join(shown) or None


def class_names(key_value: Mapping[bytes, bytes], column: str) -> list[str] | None:
    """Names that a Parquet file's `huggingface` metadata gives the numbers of a column; None: none."""
    try:
        feature = json.loads(key_value.get(HUGGINGFACE, b""))["info"]["features"][column]
        names = feature["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if whole and feature.get("_type") == "ClassLabel" else None


def text(value: Any) -> str | None:
    """A generator's or a split's name; None for what stands for none."""
    return None if is_missing(value) else str(value)
