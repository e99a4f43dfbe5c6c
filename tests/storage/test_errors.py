"""Faults of a store: what an error means, and fetching through a network that fails, on a real S3 server."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import s3fs
from botocore import exceptions as boto
from botocore.exceptions import ClientError
from ray.exceptions import ObjectLostError
from s3fs.errors import translate_boto_error

from jobs.storage import errors, filesystems, listing, probes, reading, uris, writing
from jobs.storage.errors import ATTEMPTS, Fault, fetch_error, kind, wait_seconds
from nsnet.errors import FetchError, ObjectChangedError, ObjectDeniedError, ObjectMissingError, UsageError
from tests.support.proxy import Action, Always, FaultyProxy, RandomPolicy, Script
from tests.support.swift import SwiftServer
from tests.support.tables import new_bucket, put

CONTENT = os.urandom(300_000)
SLOW_DOWN, RESET, LOSE = Action("slow_down"), Action("reset"), Action("lose_answer")


@pytest.fixture
def image(proxy: FaultyProxy) -> str:
    """The URI of an object behind the proxy."""
    return put(new_bucket(), {"a.jpg": CONTENT}) + "/a.jpg"


# What an error means.


def answer(status: int, code: str = "", operation: str = "GetObject") -> ClientError:
    described = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(described, operation)


ANSWERS = {
    (503, "SlowDown"): Fault.TRANSIENT, (503, "ServiceUnavailable"): Fault.TRANSIENT, (503, ""): Fault.TRANSIENT,
    (500, "InternalError"): Fault.TRANSIENT, (502, ""): Fault.TRANSIENT, (429, ""): Fault.TRANSIENT,
    (400, "RequestTimeout"): Fault.TRANSIENT, (408, ""): Fault.TRANSIENT, (200, "SlowDown"): Fault.TRANSIENT,
    (400, "ExpiredToken"): Fault.CREDENTIALS, (403, "InvalidAccessKeyId"): Fault.CREDENTIALS,
    (403, "SignatureDoesNotMatch"): Fault.CREDENTIALS, (403, "RequestTimeTooSkewed"): Fault.CREDENTIALS,
    (403, "AccessDenied"): Fault.DENIED, (403, ""): Fault.DENIED, (401, ""): Fault.DENIED,
    (404, "NoSuchKey"): Fault.MISSING, (404, "NoSuchBucket"): Fault.MISSING, (404, ""): Fault.MISSING,
    (404, "404"): Fault.MISSING, (412, "PreconditionFailed"): Fault.CHANGED, (412, ""): Fault.CHANGED,
    (400, "InvalidArgument"): Fault.PERMANENT,
    (400, "400"): Fault.CREDENTIALS, (403, "InvalidObjectState"): Fault.DENIED, (0, ""): Fault.PERMANENT,
}  # fmt: skip


@pytest.mark.parametrize(("status", "code"), ANSWERS)
def test_answer_of_a_store_means_what_its_code_and_status_say(status: int, code: str) -> None:
    assert kind(answer(status, code)) is ANSWERS[status, code]


URL = {"endpoint_url": "http://x"}
OTHERS: list[tuple[Exception, Fault]] = [
    (boto.EndpointConnectionError(**URL), Fault.TRANSIENT),
    (boto.ConnectTimeoutError(**URL), Fault.TRANSIENT),
    (boto.ReadTimeoutError(**URL), Fault.TRANSIENT),
    (boto.ConnectionClosedError(**URL), Fault.TRANSIENT),
    (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), Fault.TRANSIENT),
    (boto.HTTPClientError(error="x"), Fault.TRANSIENT),
    (boto.NoCredentialsError(), Fault.CREDENTIALS),
    (boto.CredentialRetrievalError(provider="x", error_msg="y"), Fault.CREDENTIALS),
    (boto.ParamValidationError(report="x"), Fault.PERMANENT),
    (aiohttp.ClientPayloadError("x"), Fault.TRANSIENT),
    (aiohttp.ServerDisconnectedError(), Fault.TRANSIENT),
    (aiohttp.ClientOSError(errno.ECONNRESET, "x"), Fault.TRANSIENT),
    (aiohttp.SocketTimeoutError("x"), Fault.TRANSIENT),
    (TimeoutError(), Fault.TRANSIENT),
    (ConnectionResetError(errno.ECONNRESET, "x"), Fault.TRANSIENT),
    (BrokenPipeError(errno.EPIPE, "x"), Fault.TRANSIENT),
    (TimeoutError(errno.ETIMEDOUT, "x"), Fault.TRANSIENT),
    (OSError(errno.EIO, "x"), Fault.TRANSIENT),
    (OSError(errno.ESTALE, "x"), Fault.TRANSIENT),
    (OSError(errno.EBUSY, "x"), Fault.TRANSIENT),
    (OSError(errno.EHOSTUNREACH, "x"), Fault.TRANSIENT),
    (errors.CutError("x"), Fault.TRANSIENT),
    (FileNotFoundError(errno.ENOENT, "x"), Fault.MISSING),
    (NotADirectoryError(errno.ENOTDIR, "x"), Fault.MISSING),
    (PermissionError(errno.EACCES, "x"), Fault.DENIED),
    (errors.ChangedError("x"), Fault.CHANGED),
    (IsADirectoryError(errno.EISDIR, "x"), Fault.PERMANENT),
    (OSError(errno.ENAMETOOLONG, "x"), Fault.PERMANENT),
    (OSError("without a number"), Fault.PERMANENT),
    (ValueError("x"), Fault.PERMANENT),
    (KeyError("x"), Fault.PERMANENT),
]


@pytest.mark.parametrize(("error", "fault"), OTHERS, ids=lambda value: getattr(value, "name", repr(value)))
def test_error_of_a_connection_or_a_disk_means_what_helps(error: Exception, fault: Fault) -> None:
    assert kind(error) is fault


@pytest.mark.parametrize(("status", "code"), [answer for answer in ANSWERS if all(answer)])
def test_answer_that_s3fs_translated_means_the_same(status: int, code: str) -> None:
    error = translate_boto_error(answer(status, code))
    assert isinstance(error, OSError) and kind(error) is ANSWERS[status, code]


@pytest.mark.parametrize("attempt", range(1, 12))
def test_wait_is_spread_below_a_bound_that_doubles(attempt: int) -> None:
    bound = min(errors.MAX_WAIT_SECONDS, errors.FIRST_WAIT_SECONDS * 2**attempt)
    waits = [wait_seconds(attempt) for _ in range(2000)]
    assert 0.0 <= min(waits) < 0.05 * bound and 0.95 * bound < max(waits) <= bound
    assert abs(sum(waits) / len(waits) - bound / 2) < 0.05 * bound
    assert len(set(waits)) > 1900


def test_wait_of_many_attempts_is_bounded() -> None:
    assert max(wait_seconds(attempt) for attempt in (50, 500, 1000)) <= errors.MAX_WAIT_SECONDS


FETCH_ERRORS: list[tuple[Exception, type[FetchError], bool]] = [
    (answer(404, "NoSuchKey"), ObjectMissingError, True),
    (FileNotFoundError(errno.ENOENT, "x"), ObjectMissingError, True),
    (errors.ChangedError("x"), ObjectChangedError, False),
    (answer(403, "AccessDenied"), ObjectDeniedError, False),
    (answer(503, "SlowDown"), FetchError, True),
    (boto.EndpointConnectionError(**URL), FetchError, True),
    (answer(400, "ExpiredToken"), FetchError, True),
    (answer(400, "InvalidArgument"), FetchError, False),
    (ValueError("x"), FetchError, False),
]


@pytest.mark.parametrize(("error", "kind", "may_be_outage"), FETCH_ERRORS, ids=lambda value: repr(value)[:40])
def test_error_becomes_that_of_an_image(error: Exception, kind: type[FetchError], may_be_outage: bool) -> None:
    made = fetch_error(error, 3)
    assert type(made) is kind and made.may_be_outage is may_be_outage
    assert made.requests == 3 and "(after 3 requests)" in str(made) and type(error).__name__ in str(made)
    assert "asked" not in str(fetch_error(error, 1))
    assert made.stage == "fetch"


def test_message_is_one_short_line() -> None:
    message = str(fetch_error(ValueError("a\n b\r\n" + "c" * 1000), 1))
    assert "\n" not in message and message.startswith("ValueError: a b c") and len(message) < 400
    assert "no answer in time" in str(fetch_error(TimeoutError(), 1))


# Fetching through a network that fails.


@pytest.mark.s3
def test_fetch_without_a_fault_takes_one_request(proxy: FaultyProxy, image: str) -> None:
    etag = listing.describe(image).etag
    for start, length in ((0, None), (0, len(CONTENT) + 1), (100, 50)):
        before = proxy.requests("GET ")
        fetched = reading.fetch(image, start, length, etag)
        assert fetched.data == CONTENT[start:][:length] and fetched.requests == 1
        assert proxy.requests("GET ") - before == 1


FAULTS = {
    "503": SLOW_DOWN,
    "500": Action("refuse", status=500, code="InternalError"),
    "reset": RESET,
    "lost answer": LOSE,
    "cut in the body": Action("cut", 0.5),
    "cut before the body": Action("cut", 0),
    "cut by one byte": Action("cut", len(CONTENT) - 1),
    "cut in the head": Action("cut", 1.0),
}
UNSEEN = ("reset", "lost answer", "cut in the head")


@pytest.mark.s3
@pytest.mark.parametrize("length", [None, len(CONTENT) + 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_costs_another_request(fault: str, length: int | None, proxy: FaultyProxy, image: str) -> None:
    proxy.policy = Script(FAULTS[fault], wanted="GET ")
    fetched = reading.fetch(image, 0, length)
    assert fetched.data == CONTENT and proxy.requests("GET ") == 2
    # aiohttp asks again by itself, and tells nobody, where a connection that it had kept breaks before the answer
    assert fetched.requests == 2 or (fault in UNSEEN and fetched.requests == 1)


@pytest.mark.s3
def test_part_of_an_object_survives_a_cut(proxy: FaultyProxy, image: str) -> None:
    proxy.policy = Script(Action("cut", 10), Action("cut", 0.9), wanted="GET ")
    assert reading.fetch(image, 1000, 500).data == CONTENT[1000:1500]
    assert proxy.counts["cut"] == 2


@pytest.mark.s3
def test_requests_of_several_faults_are_counted(proxy: FaultyProxy, image: str) -> None:
    proxy.policy = Script(SLOW_DOWN, SLOW_DOWN, Action("cut", 0.5), SLOW_DOWN, wanted="GET ")
    fetched = reading.fetch(image)
    assert fetched.data == CONTENT and proxy.requests("GET ") == 5 and fetched.requests > 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec makes a client of its own for these settings."""
    monkeypatch.setattr(filesystems, "READ_SECONDS", 1)
    monkeypatch.setattr(filesystems, "CONNECT_SECONDS", 1)


@pytest.mark.s3
@pytest.mark.parametrize("at", [None, 0, 0.5])
def test_store_that_stalls_for_too_long_is_asked_again(
    at: float | None, impatient: None, proxy: FaultyProxy, image: str
) -> None:
    proxy.policy = Script(Action("stall", at, 600.0), wanted="GET ")
    assert reading.fetch(image).data == CONTENT
    assert proxy.requests("GET ") == 2


@pytest.mark.s3
def test_stall_shorter_than_the_time_limit_is_waited_for(proxy: FaultyProxy, image: str) -> None:
    proxy.policy = Script(Action("stall", 0.5, 0.5), wanted="GET ")
    assert reading.fetch(image).requests == proxy.requests("GET ") == 1


@pytest.mark.s3
def test_body_that_only_trickles_is_asked_for_again(
    proxy: FaultyProxy, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "READ_SECONDS", 2)
    monkeypatch.setattr(reading, "MIN_BYTES_PER_SECOND", 10**9)
    proxy.policy = Script(Action("trickle", seconds=20.0), wanted="GET ")  # a piece a second, none too late
    assert reading.fetch(image, 0, len(CONTENT)).data == CONTENT
    assert proxy.requests("GET ") == 2


@pytest.mark.s3
@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET, LOSE, Action("cut", 0.5)], ids=lambda action: action.kind)
def test_asking_ends_after_some_attempts(fault: Action, proxy: FaultyProxy, image: str) -> None:
    proxy.policy = Always(fault, wanted="GET ")
    with pytest.raises(FetchError) as caught:
        reading.fetch(image)
    assert type(caught.value) is FetchError and caught.value.may_be_outage
    # botocore makes at most four of each, and aiohttp some of each of those
    assert ATTEMPTS <= caught.value.requests <= proxy.requests("GET ") <= 12 * ATTEMPTS
    assert f"(after {caught.value.requests} requests)" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.s3
def test_store_that_is_away_is_a_possible_outage(proxy: FaultyProxy, image: str) -> None:
    with proxy.away(), pytest.raises(FetchError) as caught:
        reading.fetch(image)
    assert type(caught.value) is FetchError and caught.value.may_be_outage
    assert reading.fetch(image).data == CONTENT


@pytest.mark.s3
def test_denied_object_is_not_asked_for_again(proxy: FaultyProxy, image: str) -> None:
    proxy.policy = Always(Action("refuse", status=403, code="AccessDenied"), wanted="GET ")
    with pytest.raises(ObjectDeniedError) as caught:
        reading.fetch(image)
    assert caught.value.requests == proxy.requests("GET ") == 1 and not caught.value.may_be_outage


@pytest.mark.s3
def test_many_readers_behind_a_bad_network_get_every_byte(proxy: FaultyProxy) -> None:
    contents = {f"{i}.jpg": os.urandom(1000 + 5000 * i) for i in range(40)}
    bucket = put(new_bucket(), contents)
    proxy.policy = RandomPolicy(rate=0.4, seed=3, stall_seconds=0.05)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: reading.fetch(f"{bucket}/{name}", 0, 10**6).data, contents))
    assert found == list(contents.values())
    assert sum(proxy.counts[name] for name in ("slow_down", "reset", "cut", "stall")) >= 4


@pytest.mark.parametrize("password", ["secret", "se@cret", "s:ecret"])
def test_error_is_reported_without_the_password_of_an_address(password: str) -> None:
    error = OSError(f"no answer from http://me:{password}@store:8080/a and https://me:{password}@other, of s3://b/a@b")
    assert (
        errors.reason(error) == "OSError: no answer from http://***@store:8080/a and https://***@other, of s3://b/a@b"
    )


# What was listed and is there no more.


def test_object_that_is_gone_is_missing(place: str) -> None:
    put(place, {"b.jpg": b"x"})
    with pytest.raises(ObjectMissingError) as caught:
        reading.fetch(f"{place}/a.jpg", 0, 100, "an-etag")
    assert caught.value.may_be_outage
    # a busy store may have answered 503 before; that S3 is asked once for what is gone, the proxy sees in the next test
    assert caught.value.requests == 1 or not uris.is_local(place)


@pytest.mark.s3
def test_deleted_object_is_asked_for_once(proxy: FaultyProxy, image: str) -> None:
    entry = listing.describe(image)
    writing.remove_file(image)
    with pytest.raises(ObjectMissingError):
        reading.fetch(image, 0, 100, entry.etag)
    assert proxy.requests("GET ") == 1


@pytest.mark.parametrize("content", [b"another, longer content", b"x", b""])
@pytest.mark.parametrize(("start", "length"), [(0, None), (0, 1000), (5, 3)])
def test_object_that_was_replaced_has_changed(content: bytes, start: int, length: int | None, place: str) -> None:
    put(place, {"a.jpg": b"its content"})
    etag = listing.describe(f"{place}/a.jpg").etag
    assert reading.fetch(f"{place}/a.jpg", start, length, etag).data == b"its content"[start:][:length]
    put(place, {"a.jpg": content})
    with pytest.raises(ObjectChangedError) as caught:
        reading.fetch(f"{place}/a.jpg", start, length, etag)
    assert caught.value.requests == 1 and not caught.value.may_be_outage
    assert reading.fetch(f"{place}/a.jpg", start, length).data == content[start:][: 1000 if length is None else length]


@pytest.mark.s3
def test_object_that_is_replaced_between_two_attempts_has_changed(proxy: FaultyProxy, image: str) -> None:
    etag = listing.describe(image).etag
    replaced = threading.Event()

    def replace(request: Any) -> Action:
        if request.operation == "GET" and not replaced.is_set():
            replaced.set()
            put(image.removesuffix("/a.jpg"), {"a.jpg": CONTENT[::-1]})
            return Action("reset")
        return Action()

    proxy.policy = replace
    with pytest.raises(ObjectChangedError):
        reading.fetch(image, 0, None, etag)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission_is_denied(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.jpg").chmod(0)
    with pytest.raises(ObjectDeniedError) as caught:
        reading.fetch(f"{tmp_path}/a.jpg")
    assert caught.value.requests == 1 and not caught.value.may_be_outage


def test_folder_in_the_place_of_a_file_is_not_asked_for_again(tmp_path: Path) -> None:
    with pytest.raises(FetchError) as caught:
        reading.fetch(str(tmp_path))
    assert caught.value.requests == 1 and not caught.value.may_be_outage


def test_disk_that_stammers_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"content")
    monkeypatch.setattr(errors, "FIRST_WAIT_SECONDS", 0.001)
    left = [OSError(errno.EIO, "x"), OSError(errno.ESTALE, "y")]
    read = reading._read

    def stammer(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return read(*arguments)

    monkeypatch.setattr(reading, "_read", stammer)
    fetched = reading.fetch(f"{tmp_path}/a.jpg")
    assert (fetched.data, fetched.requests) == (b"content", 3)


def test_attempts_are_apart_by_growing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(reading, "_read", fail)

    def wait(attempt: int) -> float:
        waits.append(attempt)
        return 0.0

    monkeypatch.setattr(errors, "wait_seconds", wait)
    with pytest.raises(FetchError) as caught:
        reading.fetch(f"{tmp_path}/a.jpg")
    assert waits == list(range(1, ATTEMPTS)) and caught.value.requests == ATTEMPTS


# Keys that expire.


@pytest.fixture
def wrong_keys(image: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The object, and a client whose keys are no longer right."""
    monkeypatch.setattr(filesystems, "_refreshed_at", float("-inf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(PermissionError):
            listing.describe(image)
    yield image
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.s3
def test_new_keys_are_found_where_the_old_ones_came_from(wrong_keys: str) -> None:
    fetched = reading.fetch(wrong_keys)
    assert fetched.data == CONTENT and fetched.requests == 2


@pytest.mark.s3
def test_new_keys_are_found_once_for_many_readers(wrong_keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, looks = s3fs.S3FileSystem.connect, []

    def look(self: Any, refresh: bool = False, **settings: Any) -> Any:
        looks.append(refresh)
        return connect(self, refresh=refresh, **settings)

    monkeypatch.setattr(s3fs.S3FileSystem, "connect", look)
    with ThreadPoolExecutor(8) as pool:
        assert {fetched.data for fetched in pool.map(reading.fetch, [wrong_keys] * 24)} == {CONTENT}
    assert looks == [True]


@pytest.mark.s3
def test_keys_that_stay_wrong_are_a_possible_outage(
    wrong_keys: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
    before = proxy.requests("GET ")
    with pytest.raises(FetchError, match="SignatureDoesNotMatch") as caught:
        reading.fetch(wrong_keys)
    assert type(caught.value) is FetchError and caught.value.may_be_outage
    assert caught.value.requests == proxy.requests("GET ") - before == ATTEMPTS


# Whether a store answers at all.


def test_store_answers_although_the_object_is_gone(place: str) -> None:
    put(place, {"b.jpg": b"x"})
    assert probes.store_is_up(f"{place}/a.jpg", place) and probes.store_is_up(f"{place}/b.jpg", place)


@pytest.mark.s3
def test_bucket_that_is_gone_is_away_only_where_it_is_the_source(place: str, s3_environment: SwiftServer) -> None:
    gone = f"{new_bucket()}-gone"
    assert not probes.store_is_up(f"{gone}/a.jpg", f"{gone}/pictures")
    assert probes.store_is_up(f"{gone}/a.jpg", f"{new_bucket()}/manifest.parquet")
    assert probes.store_is_up(f"{gone}/a.jpg", "/disk/manifest.parquet")


def test_disk_whose_source_is_gone_or_empty_does_not_answer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert not probes.store_is_up(f"{source}/a.jpg", str(source))
    source.mkdir()  # the folder on which a disk was mounted
    assert not probes.store_is_up(f"{source}/a.jpg", str(source))
    (source / "b.jpg").write_bytes(b"x")
    assert probes.store_is_up(f"{source}/a.jpg", str(source))


def test_disk_answers_for_a_manifest_as_long_as_that_is_there(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.parquet"
    assert not probes.store_is_up(f"{tmp_path}/a.jpg", str(manifest))
    manifest.write_bytes(b"x")
    assert probes.store_is_up(f"{tmp_path}/a.jpg", str(manifest))
    assert probes.store_is_up(f"{tmp_path}/a.jpg", "s3://bucket/manifest.parquet")
    assert probes.store_is_up(f"{tmp_path}/a.jpg", None)


@pytest.mark.s3
def test_store_that_is_away_or_breaks_every_answer_does_not_answer(
    proxy: FaultyProxy, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image.removesuffix("/a.jpg")
    assert probes.store_is_up(image, source)
    with proxy.away():
        assert not probes.store_is_up(image, source)
    for fault in (SLOW_DOWN, RESET, Action("cut", 0.5), Action("refuse", status=500, code="InternalError")):
        proxy.policy = Always(fault)
        assert not probes.store_is_up(image, source), fault
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", 0.5)
    proxy.policy = Always(Action("stall", None, 600.0))
    started = time.monotonic()
    assert not probes.store_is_up(image, source)
    assert time.monotonic() - started < 20


@pytest.mark.s3
def test_store_that_denies_answers(proxy: FaultyProxy, image: str) -> None:
    proxy.policy = Always(Action("refuse", status=403, code="AccessDenied"))
    assert probes.store_is_up(image, None)


@pytest.mark.s3
@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_store_that_no_longer_takes_the_keys_does_not_answer(code: str, proxy: FaultyProxy, image: str) -> None:
    proxy.policy = Always(Action("refuse", status=400 if code == "ExpiredToken" else 403, code=code))
    assert not probes.store_is_up(image, None)


@pytest.mark.s3
def test_bucket_that_is_gone_does_not_answer(proxy: FaultyProxy, image: str) -> None:
    assert not probes.store_is_up("s3://there-is-no-such-bucket/a.jpg", None)


# What a command's last line says of this machine.


class _Carried(Exception):
    """Stands in for Ray's error: what a task raised is its `cause`."""

    __module__ = "ray.exceptions"

    def __init__(self, cause: BaseException) -> None:
        super().__init__("ray::task() (pid=1)\n" + "  File x\n" * 200)
        self.cause = cause


def full(filename: str | None = None, code: int = errno.ENOSPC) -> OSError:
    return OSError(code, os.strerror(code), filename)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (full("/out/a"), "/out/a: No space left on device; free some space"),
        (full(), "OSError: No space left on device; free some space"),
        (full("/out/a", errno.EROFS), "/out/a: Read-only file system; it is mounted read-only"),
        (full("/out/a", errno.EMFILE), "/out/a: Too many open files; too many files are open: raise `ulimit -n`"),
        (full("/out/a", errno.EFBIG), "/out/a: File too large; the file system or `ulimit -f`"),
        (
            RuntimeError("IO Error: Could not write /tmp/x: No space left on device"),
            "RuntimeError: IO Error: Could not",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "FileNotFoundError: No usa",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), "/a: No such file or directory"),
        (MemoryError("33 GiB"), "MemoryError: 33 GiB: out of memory; end other programs"),
        (
            RuntimeError("Could not determine home directory."),
            "RuntimeError: Could not determine home directory. Set HOME",
        ),
        (
            RecursionError("maximum recursion depth"),
            "RecursionError: maximum recursion depth: data in a file are nes",
        ),
        (UsageError("--out is wrong"), "--out is wrong"),
        (ObjectLostError("0a", "", ""), "the cluster failed: ObjectLostError: Failed to retrieve object 0a"),
    ],
)
def test_what_a_machine_cannot_do_is_one_line_also_out_of_a_task(error: Exception, line: str) -> None:
    carried = _Carried(_Carried(error))
    assert errors.root_cause(carried) is error and errors.root_cause(error) is error
    line_said = errors.explain(carried)
    assert line_said is not None and line_said == errors.explain(error)
    assert line_said.startswith(line) and "\n" not in line_said and "ray::" not in line_said


def test_error_that_ray_data_has_annotated_is_reported_in_its_own_words() -> None:
    suffix = (
        "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, configure"
    )
    written = full()
    written.filename = f"\n{suffix}"  # what becomes of an argument that is appended, on its way between processes
    assert errors.explain(written) == errors.explain(full())
    assert errors.explain(UsageError(f"a bundle is damaged\n{suffix}")) == "a bundle is damaged"


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), ValueError("x"), AssertionError("x"), RuntimeError("x")]
)
def test_bug_is_not_explained_away(error: Exception) -> None:
    assert errors.explain(error) is None and errors.explain(_Carried(error)) is None


def test_circle_of_causes_ends() -> None:
    first, second = _Carried(KeyError()), _Carried(KeyError())
    first.cause, second.cause = second, first
    assert errors.root_cause(first) in (first, second)
