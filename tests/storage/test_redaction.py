"""No secret leaves the program: not in a message, a row, a file, a log or a traceback."""

import io
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from jobs import cli
from jobs.cluster import resources
from jobs.dataset.manifest import from_values
from jobs.pipeline import rows
from jobs.runs import lock
from jobs.storage import uris
from jobs.storage.redaction import SecretsFilter, guard_logs, holds_secrets, shown, without_secrets
from nsnet.errors import FetchError, UsageError
from tests.support.models import closed_address
from tests.support.tables import image_file, put, run_command, save_bundle

SHOWN = [
    ("http://me:s3cret@store:8080/a", "http://***@store:8080/a"),
    ("http://me:s3@cret@store", "http://***@store"),
    ("s3://KEY:SEC/RET+x@bucket/key", "s3://***@bucket/key"),
    ("me:s3cret@host:9000", "***@host:9000"),
    ("Invalid endpoint: me:s3cret@host:9000", "Invalid endpoint: ***@host:9000"),
    ("'KEY:SEC/RET@bucket'", "'***@bucket'"),
    ("me:s3@cret@host:9000", "***@host:9000"),
    ("https://proxy/x/https%3A%2F%2Fme%3As3cret%40store", "https://proxy/x/https%3A%2F%2F***%40store"),
    ("s3://bucket/x%3Fsig%3Ds3cret%26page%3D2", "s3://bucket/x%3Fsig%3D***"),
    ("aws_secret_access_key=s3cret", "aws_secret_access_key=***"),
    ("AccountKey=s3cret", "AccountKey=***"),
    ("https://store/x?X-Amz-Signature=abc&b=c is gone", "https://store/x?*** is gone"),
    ("s3://bucket/x?sig=abc&page=2", "s3://bucket/x?sig=***&page=2"),
    ("token=abcdef", "token=***"),
    ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
    ("Authorization: Basic QWxhZGRpbjpvcGVu", "Authorization: Basic ***"),
]
LEFT_ALONE = [
    "s3://bucket/photo@2x.jpg", "http://host:9000/a@b", "/data/2026-01-02T12:30:05/photo@2x.jpg", "me@example.org",
    "warning: x: y@z", "/data/token=abc/x.jpg", "AUROC=0.9, threshold=0.5", "s3://bucket/what?.jpg", "file:///data/a@b",
    "s3://bucket/it's 100%40.jpg", "s3://bucket/a%3Fb@2x.jpg",
    # names of pages that were crawled
    "s3://bucket/crawl/https%3A%2F%2Fcdn.example.com%2Fa.jpg%3Fw%3D640", "https%3A%2F%2Fcdn%2Fa.jpg%3Fid%3D1",
    "/data/crawl/https%3A%2F%2Fcdn.example.com%2Fa.jpg%3Fid%3D1",
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_secret_in_a_text_is_hidden(text: str, shown: str) -> None:
    assert without_secrets(text) == shown and without_secrets(shown) == shown


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_text_without_a_secret_is_left_alone(text: str) -> None:
    assert without_secrets(text) == text and not holds_secrets(text)


@pytest.mark.parametrize("letter", ["'", '"', " ", "\n", "<", "%40", "%2F", "@", "/"])
@pytest.mark.parametrize(
    "address", ["s3://KEY:s3{}cret@bucket/x", "s3://KEY:s3{}cret%40bucket", "s3%3A%2F%2FKEY:s3{}cret%40bucket"]
)
def test_address_alone_hides_a_password_of_any_letters(address: str, letter: str) -> None:
    text = address.format(letter)
    assert holds_secrets(text) and "cret" not in shown(text)
    with pytest.raises(UsageError) as caught:
        uris.located(text)
    assert "cret" not in str(caught.value)
    place = from_values({"uri": text}, "s3://bucket/m.parquet", 0)
    assert "cret" not in f"{place['uri']} {place['problem']}"


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wJalr/XUtnFEMI", ["wJalr/XUtnFEMI"]),
        ("AWS_SESSION_TOKEN", "FwoGZXIvYXdzE", ["FwoGZXIvYXdzE"]),
        ("HF_TOKEN", "hf_abcdefgh", ["hf_abcdefgh"]),
        ("https_proxy", "http://me:pr0xy%40pass@proxy:3128", ["pr0xy%40pass", "pr0xy@pass"]),
        ("AWS_ENDPOINT_URL", "me:endp0int-pass@host:9000", ["endp0int-pass"]),
    ],
)
def test_value_of_a_secret_variable_is_hidden_wherever_it_stands(
    name: str, value: str, hidden: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for secret in hidden:
        assert without_secrets(f"x{secret}y") == "x***y"


def test_variable_that_names_a_file_or_a_mode_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("SOME_PASSWORD", "short")
    assert without_secrets("/home/me/.ray/auth_token token short") == "/home/me/.ray/auth_token token short"


@pytest.mark.parametrize("part", ["://", "+", "a:", "http://", "token=", "@", "a:b@", "https://x?", "bearer "])
def test_long_text_of_a_stranger_costs_little(part: str) -> None:
    started = time.process_time()
    without_secrets(part * (100_000 // len(part)))
    assert time.process_time() - started < 5


def test_logs_hold_no_secret_in_message_arguments_and_traceback() -> None:
    stream = io.StringIO()
    logger = logging.getLogger("test-redaction")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.propagate = False
    guard_logs(logger.name)
    guard_logs(logger.name)  # twice does no harm
    assert [type(known) for known in handler.filters] == [SecretsFilter]
    try:
        raise OSError("https://me:s3cret@store")
    except OSError:
        logger.exception("at %s with %d", "s3://KEY:s3cret@bucket", 3)
    text = stream.getvalue()
    assert "s3cret" not in text and text.startswith("at s3://***@bucket with 3\nTraceback")
    assert text.rstrip().endswith("OSError: https://***@store")


def test_row_of_a_failed_image_holds_no_secret() -> None:
    row = rows.failed({"uri": "x"}, FetchError("no answer from https://me:s3cret@store/x?sig=s3cret"))
    assert row["error_message"] == "no answer from https://***@store/x?***"


# The commands, with a secret in each place where people put one.

SECRET = "S3cretS3cretS3cret"
SIGNED = f"https://store.example/b/k?X-Amz-Signature={SECRET}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bundle(tmp_path_factory.mktemp("detector")))


def manifest(folder: Path, uri: str) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"uri": [uri, str(folder / "absent.png")]}), folder / "manifest.parquet")
    return str(folder / "manifest.parquet")


PLACES = {
    "source": "score train caption evaluate predict audit calibrate",
    "out": "score train caption evaluate audit calibrate",
    "detector": "score evaluate predict calibrate",
    "captions": "train",
    "split": "train",
    "row-https": "score train audit",
    "row-s3": "score train audit",
    "endpoint": "score predict",
    "endpoint-bare": "score predict",
    "proxy": "score",
    "address": "score train",
    "option": "score",
}
"""Where a secret may stand -> the commands that read this."""


@pytest.mark.parametrize(
    ("command", "place"), [(name, place) for place, names in PLACES.items() for name in names.split()]
)
def test_command_shows_and_writes_no_secret(
    command: str, place: str, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "connect", _no_cluster)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    s3fs.S3FileSystem.clear_instance_cache()
    images = put(str(tmp_path / "in"), {f"{label}/{i}.png": image_file(i) for i, label in
                                          enumerate(["0_real", "1_fake"] * 2)})  # fmt: skip
    given = {"source": images, "out": str(tmp_path / "out"), "detector": bundle, "captions": "", "split": ""}
    options: list[str] = []
    if place in given:
        given[place] = f"s3://KEY:{SECRET}@bucket/x"
    elif place.startswith("row"):
        given["source"] = manifest(tmp_path / "rows", SIGNED if place == "row-https" else f"s3://KEY:{SECRET}@bucket/x")
    elif place.startswith("endpoint"):
        given["source"] = "s3://bucket/x"
        scheme = "" if place.endswith("bare") else "http://"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}somebody:{SECRET}@127.0.0.1:9")
    elif place == "proxy":
        given["source"] = "s3://bucket/x"
        dead = closed_address().removeprefix("http://")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")
        monkeypatch.setenv("HTTP_PROXY", f"http://somebody:{SECRET}@{dead}")
        monkeypatch.setattr("jobs.storage.probes.PROBE_TIMEOUT_SECONDS", 0.5)
    elif place == "address":
        options = ["--address", f"ray://somebody:{SECRET}@head:10001"]
    else:
        options = ["--max-failed", SIGNED]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "somebody-known")
    code, out, err = run_command(command, *_arguments(command, given), *options)
    s3fs.S3FileSystem.clear_instance_cache()
    assert code != 0 or command in ("predict", "audit"), out + err
    assert SECRET not in out + err and "Traceback" not in err
    assert _files_with(SECRET, tmp_path, except_for=tmp_path / "rows") == []


def _arguments(command: str, given: dict[str, str]) -> list[str]:
    source, out, detector = given["source"], ["--out", given["out"]], ["--detector", given["detector"]]
    learning = [part for name in ("captions", "split") if given[name] for part in (f"--{name}", given[name])]
    return {
        "score": [source, *detector, *out],
        "train": [source, *out, *learning],
        "caption": [source, *out],
        "evaluate": [source, *detector, *out],
        "predict": [source, *detector],
        "audit": [source, *out],
        "calibrate": [given["detector"], "--predictions", source, "--operating-point", "accuracy", *out],
    }[command]


def _no_cluster(*_: Any) -> None:
    raise FetchError(f"stopped before a cluster was begun, by https://me:{SECRET}@store")


def _files_with(text: str, folder: Path, except_for: Path) -> list[Path]:
    """Files whose bytes, or whose rows where they are Parquet, hold a text; also names."""
    found = []
    for path in folder.rglob("*"):
        if path == except_for or except_for in path.parents:
            continue
        content = path.read_bytes() if path.is_file() else b""
        rows = json.dumps(pq.read_table(path).to_pylist(), default=str) if path.suffix == ".parquet" else ""
        if text in str(path) or text.encode() in content or text in rows:
            found.append(path)
    return found


def test_search_of_files_finds_a_secret(tmp_path: Path) -> None:
    manifest(tmp_path / "rows", SIGNED)
    assert [path.name for path in _files_with(SECRET, tmp_path, tmp_path / "none")] == ["manifest.parquet"]


def test_no_module_prints_or_logs_past_the_console() -> None:
    folder = Path(cli.__file__).parent
    users = {path.name for path in folder.rglob("*.py") if re.search(r"\bclick\.echo\(|\bprint\(", path.read_text())}
    assert users == {"output.py"}
