"""Variables travel so that only a holder of the token reads them, and are set within a process, not before it."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.submission import sealing
from jobs.submission.sealing import check_plain, chosen, seal, unseal
from nsnet.errors import UsageError

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCY"
VALUES = {
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "EMPTY": "",
    "TEXT": "ä\n\udcff",
    "AWS_ENDPOINT_URL": f"http://u:{SECRET}@host",
}


def test_what_is_sealed_is_unsealed_and_shows_no_value() -> None:
    text = seal(VALUES, "token")
    assert unseal(text, "token") == VALUES
    assert SECRET.encode() not in base64.b64decode(text) and b"AWS" not in base64.b64decode(text)
    assert seal(VALUES, "token") != text
    assert text.isascii() and "\n" not in text


@pytest.mark.parametrize("place", [0, 20, 40, -1])
def test_changed_text_and_another_token_are_refused_in_one_line(place: int) -> None:
    data = bytearray(base64.b64decode(seal(VALUES, "token")))
    with pytest.raises(UsageError, match="not the one of the submitter"):
        unseal(base64.b64encode(data).decode(), "another")
    data[place] ^= 1
    with pytest.raises(UsageError, match="cannot be opened here"):
        unseal(base64.b64encode(data).decode(), "token")


def test_values_come_from_the_environment_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    assert chosen(["MY_KEY", "MY_KEY"]) == {"MY_KEY": SECRET}
    assert chosen([]) == {}
    with pytest.raises(UsageError, match=r"--env NSNET_UNSET: this variable is not set"):
        chosen(["MY_KEY", "NSNET_UNSET"])


def test_value_in_place_of_a_name_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (f"MY_KEY={SECRET}", SECRET, ""):
        with pytest.raises(UsageError, match="takes the name of a variable") as caught:
            chosen([given])
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_DATA_X", "PYTHONPATH", "LD_PRELOAD", "NSNET_SEALED"])
def test_variable_that_a_process_reads_when_it_starts_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(UsageError, match="set it in the nodes' environment"):
        chosen([name])


def test_more_than_an_argument_of_a_process_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARGE", "x" * 70_000)
    assert len(seal(chosen(["LARGE"]), "token")) < 120 * 1024
    monkeypatch.setenv("LARGE", "é" * 35_000)  # of as many bytes, but JSON writes six for each
    with pytest.raises(UsageError, match="at most 98304 can be passed"):
        seal(chosen(["LARGE"]), "token")


@pytest.mark.parametrize("text", ["abc", "!!!!", "é", "", "AAAA" * 20])
def test_text_that_was_never_sealed_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be opened here"):
        unseal(text, "token")


def test_without_a_token_secrets_are_refused_and_others_pass() -> None:
    check_plain({"NSNET_DEBUG": "1", "AWS_ENDPOINT_URL": "http://store:9000", "RAY_AUTH_TOKEN_PATH": "/x"})
    check_plain({"TOKENIZERS_PARALLELISM": "true", "KEYBOARD": "de", "PWD": "/x", "NSNET_WEIGHTS": "s3://weights"})
    secret = (
        "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN",
        "S3_SECRET_KEY_2", "MINIO_ACCESS_KEY", "DB_PASS", "GPG_PASSPHRASE", "GCP_CREDENTIALS", "hf_token", "MYTOKEN",
    )  # fmt: skip
    for name, value in (*((name, "x") for name in secret), ("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@host")):
        with pytest.raises(UsageError, match=f"--env {name} looks like a secret") as caught:
            check_plain({name: value})
        assert SECRET not in str(caught.value)


def test_process_that_unseals_shows_the_values_to_itself_only(tmp_path: Path) -> None:
    """Its first environment, which `/proc` shows to others, holds none of them."""
    (tmp_path / "token").write_text("a-token-of-this-test")
    code = (
        "import os; from jobs.submission.sealing import unseal_environment\n"
        "unseal_environment(); print(os.environ['AWS_SECRET_ACCESS_KEY'])\n"
        "print(os.environ['AWS_SECRET_ACCESS_KEY'].encode() in open('/proc/self/environ', 'rb').read())"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    environment = own | {
        sealing.SEALED: seal({"AWS_SECRET_ACCESS_KEY": SECRET}, "a-token-of-this-test"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [SECRET, "False"]
