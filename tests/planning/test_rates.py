"""Files of rates: what this release ships, and what is refused in those of others."""

import json
import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.planning import rates
from jobs.storage.uris import Uri
from nsnet.config import from_dict, to_dict
from nsnet.errors import ConfigError
from tests.support.rates import RATES, file_of

REPO_ROOT = Path(__file__).parents[2]


def refusal(content: bytes, path: Path) -> str:
    """Why a file with this content is refused."""
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        rates.load(Uri(str(path)))
    message = str(raised.value)
    assert message.startswith(f"--rates {path}: ") and "\n" not in message
    assert len(message) <= len(f"--rates {path}: ") + rates.MAX_TEXT
    return message.removeprefix(f"--rates {path}: ")


def changed(**values: Any) -> bytes:
    """A good file with other rates, or with other settings if they are no rates."""
    good = to_dict(file_of())
    for name, value in values.items():
        (good["rates"] if name in rates.NAMES else good)[name] = value
    return json.dumps(good).encode()


def test_rates_of_this_release_say_that_no_gpu_was_measured() -> None:
    file = rates.load()
    assert not file.gpu_was_measured
    assert {*rates.GPU_RATES} <= {*file.estimated}
    assert {"prepare_images_per_s", "efficiency"} <= {*file.measured}
    assert "nothing ran" in file.machine
    assert sorted((*file.measured, *file.estimated)) == sorted(rates.NAMES)


def test_decoding_of_this_release_agrees_with_both_measured_sizes() -> None:
    found = rates.load().rates
    assert found.prepare_seconds(1.048576) == pytest.approx(0.020)
    assert found.prepare_seconds(12.0) == pytest.approx(0.193, rel=0.01)


def test_installed_package_contains_the_rates() -> None:
    settings = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["*"]
    assert any(rates.DEFAULT_FILE.match(pattern) for pattern in patterns)


def test_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for file in (file_of(), file_of(replace(RATES, both_images_per_s=40.0), measured=rates.NAMES)):
        (tmp_path / "rates.json").write_text(json.dumps(to_dict(file)))
        assert rates.load(Uri(str(tmp_path / "rates.json"))) == file
    assert file.gpu_was_measured and file.estimated == ()
    assert from_dict(rates.RatesFile, to_dict(file)) == file


@pytest.mark.parametrize("value", [0, -1, 1e-9, 1e16, 10**400, float("nan"), float("inf"), True, "50", None, [50]])
@pytest.mark.parametrize("name", ["prepare_images_per_s", "score_images_per_s", "efficiency", "actor_bytes"])
def test_rate_that_is_no_positive_number_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    reason = refusal(changed(**{name: value}), tmp_path / "rates.json")
    assert name in reason or value == 10**400


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"efficiency": 1.01}, r"efficiency must be between 0\.01 and 1, got 1\.01"),
        ({"prepare_fixed_seconds": 0.02}, r"prepare_fixed_seconds must be less than the 0\.02 s of a whole image"),
        ({"both_images_per_s": 100.0}, "both_images_per_s must be less than captioning and scoring alone, got 100"),
        ({"both_images_per_s": -1}, "both_images_per_s must be between"),
        ({"speed": 1}, r"file: unknown settings \['speed'\], missing settings \[\]"),
        ({"rates": {}}, r"file\.rates: unknown settings \[\], missing settings \['actor_bytes'"),
        ({"rates": 5}, r"file\.rates must be an object, got int"),
        ({"machine": ""}, "machine must be a text of 1 to 200 characters"),
        ({"machine": "x" * 201}, "machine must be a text of 1 to 200 characters"),
        ({"machine": 5}, r"file\.machine must be str, got 5"),
        ({"date": "yesterday"}, "date must be a day such as 2026-11-29, got 'yesterday'"),
        ({"versions": {"ray": 2}}, r"versions\.ray must be a text"),
        ({"versions": {f"p{i}": "1" for i in range(21)}}, "versions must hold at most 20 packages, got 21"),
        ({"measured": ["speed"]}, "measured must hold names of rates, got speed"),
        ({"measured": "efficiency"}, r"file\.measured must be a list"),
        ({"precision": None}, r"file\.precision must be str, got None"),
    ],
)
def test_file_with_wrong_settings_is_refused(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert re.match(reason, refusal(changed(**values), tmp_path / "rates.json"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is no JSON"),
        (b"{", "it is no JSON"),
        (b"\xff\xfe\x00", "it is no JSON"),
        (b"[]", "file must be an object, got list"),
        (b"null", "file must be an object, got NoneType"),
        (b"[" * 60_000, "it is nested too deeply"),
        (b'{"' + b"x" * 60_000 + b'": 1}', "file: unknown settings"),
        (b"9" * 60_000, "it is no JSON"),
        (b" " * 65_537, "larger than 65536 bytes"),
    ],
)
def test_file_that_holds_no_rates_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    assert refusal(content, tmp_path / "rates.json").startswith(reason)


def test_address_that_is_no_local_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, reason in {
        str(tmp_path / "absent"): "No such file or directory",
        str(tmp_path): "Is a directory",
        str(tmp_path / "pipe"): "not a regular file but a FIFO",
        "s3://bucket/rates.json": "it must be a local file",
    }.items():
        with pytest.raises(ConfigError, match=f"^--rates {re.escape(place)}: {reason}"):
            rates.load(Uri(place))
