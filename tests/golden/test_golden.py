"""The numbers of this tree are the golden ones. 25 s of CPU, nearly all of it for drawing, BLIP and imports."""

import json
from typing import Any

import pytest

from tests.golden.compute import FOLDER, LOSSES, STEPS, computed

PROBABILITY = 1e-6
LOSS = 1e-5
"""Rounding of other kernels adds up to 2e-6 over the steps; a sign in a loss moves the first step by 1e-2 and more."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return computed()


def golden(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_losses_of_each_step_are_the_golden_ones(found: dict[str, Any]) -> None:
    expected = golden("losses.json")
    assert len(expected) == STEPS == 20 and set(expected[0]) == set(LOSSES)
    assert found["losses.json"] == [pytest.approx(step, abs=LOSS) for step in expected]


def test_verdicts_of_the_fixed_bundle_are_the_golden_ones(found: dict[str, Any]) -> None:
    expected = golden("verdicts.json")
    assert len(expected) == 12 and {row["verdict"] for row in expected.values()} == {"real", "fake"}
    assert found["verdicts.json"].keys() == expected.keys()
    for name, row in expected.items():
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        assert {key: found["verdicts.json"][name][key] for key in numbers} == pytest.approx(numbers, abs=PROBABILITY)
        assert {key: found["verdicts.json"][name][key] for key in ("caption", "verdict")} == {
            key: row[key] for key in ("caption", "verdict")
        }
