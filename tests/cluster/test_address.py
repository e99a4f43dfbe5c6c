"""A cluster that does not answer is found out within seconds, whatever is at its address."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from jobs.cluster import address, resources
from jobs.cluster.address import check_address
from jobs.runs import lock
from nsnet.errors import NsnetError, StorageError, UsageError
from tests.support.models import closed_address
from tests.support.tables import image_file, put, run_command, save_bundle


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "PROBE_SECONDS", 0.3)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def complaint(given: str | None) -> str:
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        check_address(given)
    assert time.monotonic() - started < 5 and "\n" not in str(caught.value)
    return str(caught.value)


def test_no_address_and_local_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked"))
    for given in (None, "", "local"):
        check_address(given)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    check_address(None)


@pytest.mark.parametrize("host", ["a..b", ".", "x" * 100])
def test_name_that_no_host_can_have_is_said(host: str) -> None:
    assert f"{host} is not a host name" in complaint(f"ray://{host}:6379")


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_closed_port_is_said_with_where_it_was_named(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = form.format(closed_address().removeprefix("http://"))
    message = complaint(dead)
    assert message.startswith(f"the Ray cluster of --address {dead} cannot be reached: ") and "refused" in message
    monkeypatch.setenv("RAY_ADDRESS", dead)
    assert complaint(None).startswith(f"the Ray cluster of RAY_ADDRESS {dead} cannot be reached: ")


def test_port_that_says_nothing_is_given_up(silent: str) -> None:
    assert f"no answer from {silent} within 0.3 s" in complaint(f"ray://{silent}")


def test_name_that_nobody_knows_is_said() -> None:
    assert "the host name nobody.invalid is unknown" in complaint("ray://nobody.invalid:6379")


def test_name_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def look_up(*_: object, **__: object) -> None:
        released.wait(5)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", look_up)
    assert "no answer within 0.6 s" in complaint("ray://slow.example:6379")
    released.set()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is a web server"),
        (b"220 mail\r\n", "is not a Ray cluster"),
        (b"", "is not a Ray cluster"),
    ],
)
def test_server_of_another_kind_is_named(answer: bytes, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        replied = pool.submit(_reply, server, answer)
        assert reason in complaint(f"ray://127.0.0.1:{server.getsockname()[1]}")
        replied.result()


def _reply(server: socket.socket, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(100)
        connection.sendall(answer)


def test_grpc_server_passes() -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            check_address(f"ray://127.0.0.1:{port}")
        finally:
            server.stop(None).wait()


def test_auto_without_any_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.services as services

    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    assert complaint("auto").startswith("--address auto: no Ray cluster runs on this machine")
    dead = closed_address().removeprefix("http://")
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: dead)  # a file that a dead cluster has left
    assert "refused" in complaint("auto")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("http://head:8265", "is the address for Ray jobs (`nsnet submit … --address http://head:8265`)"),
        ("https://head", "is the address for Ray jobs"),
        ("redis://head:6379", "give host:port, ray://host:port, auto or local"),
        ("head", "has no valid port"),
        ("ray://head:port", "has no valid port"),
        ("ray://me:s3cret@head:10001", "ray://***@head:10001: an address must not contain a user"),
    ],
)
def test_address_of_another_kind_is_refused(given: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_address(given)
    assert reason in str(caught.value) and "s3cret" not in str(caught.value)


@pytest.mark.parametrize("command", ["score", "caption", "train", "audit", "ablate", "demo", "evaluate"])
def test_command_ends_before_it_locks_or_writes_anything(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "hold", lambda *_, **__: pytest.fail("locked"))
    monkeypatch.setattr(resources, "connect", lambda *_: pytest.fail("connected"))
    files = {f"{label}/{i}.png": image_file(i) for i, label in enumerate(["0_real", "1_fake"] * 2)}
    arguments = [] if command == "demo" else [put(str(tmp_path / "pictures"), files)]
    if command in ("score", "evaluate"):
        arguments += ["--detector", str(save_bundle(tmp_path / "detector"))]
    dead = "ray://" + closed_address().removeprefix("http://")
    out = tmp_path / "out"
    code, _, err = run_command(command, *arguments, "--out", str(out), "--address", dead)
    assert code == 1 and err.startswith(f"error: the Ray cluster of --address {dead} cannot be reached"), err
    assert not out.exists() and not Path(f"{out}.training").exists()


def test_connecting_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("begun"))
    with pytest.raises(NsnetError, match="cannot be reached"):
        resources.connect("ray://" + closed_address().removeprefix("http://"))
