"""What values mean as labels: real = 0, fake = 1, or None where their context does not say it.

A word says what it means. A number does not: 0 and 1 are this project's labels, but also the first two of a thousand
classes, or a data set's own order with `fake` first. So a column of numbers is read as a whole (`numbers`), by the
names that its file gives them where there are any.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

WORDS: Final = {
    "0": 0, "real": 0, "0_real": 0, "nature": 0, "natural": 0, "human": 0, "authentic": 0, "photo": 0,
    "1": 1, "fake": 1, "1_fake": 1, "ai": 1, "generated": 1, "synthetic": 1, "ai_generated": 1, "ai-generated": 1,
}  # fmt: skip
"""Words that are labels, small."""
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


def number(value: Any) -> int | None:
    """A value as a whole number; None where it is none, such as a word or 0.5."""
    try:
        found = Decimal(str(int(value) if isinstance(value, bool) else value).strip())
    except ArithmeticError:
        return None
    return int(found) if found.is_finite() and found == found.to_integral_value() else None


def meanings(values: Iterable[Any], names: Sequence[str] | None = None) -> Mapping[Any, int] | None:
    """Value -> label, of the distinct values of a column or of all `.cls` members of a tar; values beyond it have none.

    `names`: what the file calls its numbers, in their order (a ClassLabel of `datasets`). None: they are numbers whose
    context does not say that they are labels, as where there are more than 0 and 1.
    """
    found: dict[Any, int] = {}
    for value in values:
        if is_missing(value):
            continue
        index = number(value)
        if index is None:
            label = word(str(value)) if isinstance(value, str) else None
            if label is None and not isinstance(value, str):
                return None  # 0.5, infinity: no class at all
        elif names is not None:
            label = word(names[index]) if 0 <= index < len(names) else None
        elif index == UNKNOWN:
            label = None
        elif index in (0, 1):
            label = index
        else:
            return None
        if label is not None:
            found[value] = label
    return found


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
