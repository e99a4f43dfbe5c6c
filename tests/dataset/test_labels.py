"""What values mean as labels."""

import json
from decimal import Decimal
from typing import Any

import pytest

from jobs.dataset.labels import class_names, meanings, text, without_label
from nsnet.errors import SourceError


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], {0: 0, 1: 1}),
        ([1, 0, None, float("nan"), ""], {0: 0, 1: 1}),
        ([0, 1, -1], {0: 0, 1: 1}),
        ([0.0, 1.0], {0.0: 0, 1.0: 1}),
        ([False, True], {False: 0, True: 1}),
        ([Decimal(0), Decimal(1)], {Decimal(0): 0, Decimal(1): 1}),
        (["0", "1"], {"0": 0, "1": 1}),
        (["real", "FAKE ", "AI", "Human"], {"real": 0, "FAKE ": 1, "AI": 1, "Human": 0}),
        (["real", "unsure", "fake"], {"real": 0, "fake": 1}),
        (["cat", "dog"], {}),
        (["human", "dog", "cat"], {}),
        (["photo", "sketch", "cartoon"], {}),
        (["genuine", "fake", "sdxl"], {"genuine": 0, "fake": 1}),
        (["Real Images", "AI images"], {"Real Images": 0, "AI images": 1}),
        (["1e999999999", "-1e999999999", "1e-999999999"], {}),
        ([], {}),
    ],
)
def test_values_mean_what_their_context_says(values: list[Any], expected: dict[Any, int]) -> None:
    assert meanings(values) == expected


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 999], ["0", "1", "7"], [0.5], [-2], [float("inf")], [2**70], [b"0"]])
def test_numbers_beyond_0_and_1_are_classes_of_something_else(values: list[Any]) -> None:
    assert meanings(values) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["fake", "real"], {0: 1, 1: 0}),
        (["real", "fake"], {0: 0, 1: 1}),
        (["human", "SDXL", "ai"], {0: 0}),
        (["cat", "dog"], {}),
        (["real"], {0: 0}),
        (["real", "deepfake"], {0: 0, 1: 1}),
        (["synthetic", "natural"], {0: 1, 1: 0}),
        (["human", "dog"], {}),
    ],
)
def test_numbers_mean_what_their_file_calls_them(names: list[str], expected: dict[int, int]) -> None:
    assert meanings([0, 1, None, -1], names) == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["fake", "real"]}}}}, ["fake", "real"]),
        ({"info": {"features": {"label": {"_type": "Value", "names": ["fake", "real"]}}}}, None),
        ({"info": {"features": {"other": {"_type": "ClassLabel", "names": ["fake", "real"]}}}}, None),
        ({"info": []}, None),
        ({"info": {"features": {"label": ["ClassLabel"]}}}, None),
    ],
)
def test_names_come_from_the_metadata_of_the_file(metadata: Any, expected: list[str] | None) -> None:
    assert class_names({b"huggingface": json.dumps(metadata).encode()}, "label") == expected


def test_file_without_metadata_names_nothing() -> None:
    assert class_names({}, "label") is None and class_names({b"huggingface": b""}, "label") is None


DAMAGED = [
    b"\xff", b"[]", b"7", b"{", b"[" * 60_000, b'{"info": "' + b"x" * 2**16 + b'"}',
    *(json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}).encode()
      for names in (None, 7, "fake", [0, 1], ["fake", None], {"fake": 0})),
]  # fmt: skip
"""Metadata of `datasets` that could name classes, but cannot be understood."""


@pytest.mark.parametrize("metadata", DAMAGED, ids=lambda metadata: metadata[:70].decode("latin-1"))
def test_metadata_that_are_damaged_are_said_in_one_line(metadata: bytes) -> None:
    with pytest.raises(SourceError, match=r"^its `huggingface` metadata (are not a JSON object|name the classes)") as e:
        class_names({b"huggingface": metadata}, "label")
    assert "\n" not in str(e.value) and len(str(e.value)) < 120


def test_generator_that_is_missing_has_no_name() -> None:
    assert [text(value) for value in (None, float("nan"), "", "sdxl", 7)] == [None, None, None, "sdxl", "7"]


def test_values_without_a_label_are_shown_as_their_file_calls_them() -> None:
    names = ["real", "sdxl", "flux"]
    assert without_label([0, 1, 2, -1, None, 9], {0: 0}, names) == "'9', 'flux', 'sdxl'"
    assert without_label(["real", "fake", ""], {"real": 0, "fake": 1}) is None
    assert without_label(map(str, range(100, 200)), {}) == "'100', '101', '102', '103', '104', …"
