"""Fixtures for the whole suite."""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from botocore.loaders import JSONFileLoader

from tests.support.preloaded import preloaded
from tests.support.priority import preferred
from tests.support.proxy import FaultyProxy, in_front_of
from tests.support.swift import SwiftServer, s3_server

__all__ = ["s3_server"]

os.environ.update(
    RAY_AUTH_MODE="disabled",  # no token is left behind on the machine, and none is looked for
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_V2_ENABLED="1",
    RAY_worker_niceness="0",  # not 15: beside other tests its workers would wait until those have ended
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # several test processes share the cores, and threads that wait for each other spin
)
for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "RAY_ADDRESS"):
    os.environ.pop(name, None)


# A suite that runs in the background ignores Ctrl-C, and so would the processes that its tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Each S3 client parses botocore's descriptions of AWS again, for 0.1 s; a test makes several clients.
load_once = cache(JSONFileLoader().load_file)
JSONFileLoader.load_file = lambda _, path: load_once(path)
os.fsync = os.fstat  # no test survives a power failure; waiting for the disk was a fiftieth of their time
logging.getLogger().addHandler(logging.NullHandler())  # else the first message adds one that writes to stderr
gc.set_threshold(20_000)  # imports make millions of objects, of which a collection looks at all again and again
LONG_SECONDS = 60.0
LONG = Path(__file__).parent / "long"
STORAGE = Path(__file__).parent / "storage"


class LongTests:
    """Says at once which tests take long, so that the output of a suite that was stopped shows where its time went."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._plugins.getplugin("terminalreporter")  # which is registered after this
        if report.duration > LONG_SECONDS and terminal is not None:
            terminal.write_line(f" {report.nodeid} ({report.when}): {report.duration:.0f} s")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LongTests(config))


def pytest_collection_finish() -> None:
    """What is imported by now stays: collections of garbage skip it, which took a twentieth of all tests' time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries that count their objects at the end report frozen ones as leaks."""
    gc.unfreeze()


RAYS_WARNINGS = (  # it leaves sockets and files to the garbage collector, and warns of its own coming changes
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For tests on a cluster, leave out files that name no fixture of one: their imports take half a minute."""
    marks = config.option.markexpr
    if "cluster" not in marks or "not cluster" in marks or not collection_path.match("test_*.py"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    return not ("cluster" in text or "forked_workers" in text) or None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark each test by the servers that it uses. Once a cluster was started, Ray may warn until the last test."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & {"cluster", "forked_workers"}:
            item.add_marker(pytest.mark.cluster)
        if "s3_server" in fixtures:
            item.add_marker(pytest.mark.s3)
        if item.path.is_relative_to(LONG) or (_is_at(item, "s3") and not item.path.is_relative_to(STORAGE)):
            item.add_marker(pytest.mark.long)
    yield  # those of other marks are deselected
    clustered = [i for i, item in enumerate(items) if item.get_closest_marker("cluster")]
    for item in items[min(clustered, default=len(items)) :]:
        item.add_marker(pytest.mark.filterwarnings(*RAYS_WARNINGS))


def _is_at(item: pytest.Item, place: str) -> bool:
    """Whether a test runs at this kind of `place`."""
    return (
        isinstance(item, pytest.Function) and hasattr(item, "callspec") and item.callspec.params.get("place") == place
    )


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The warnings and errors that are logged during a test, in place of pytest's `caplog`, which is off."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield messages
    logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def s3_environment(s3_server: SwiftServer) -> Iterator[SwiftServer]:
    """The S3 server, named by the usual AWS variables for the whole process and its children."""
    before = dict(os.environ)
    os.environ.update(s3_server.environment())
    yield s3_server
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a test may write: a folder on disk that does not exist yet, then a prefix in a bucket of its own.

    `make test` runs the tests of storage at both places and those above storage on disk; `make test-all` runs the
    latter on S3. A test of what only S3 can do asks for `s3_environment` instead, and is in `make test`.
    """
    if request.param == "disk":
        return str(tmp_path / "place")
    request.getfixturevalue("s3_environment")
    from tests.support.tables import new_bucket

    return new_bucket() + "/place"


@pytest.fixture(scope="module")
def module_proxy(s3_environment: SwiftServer) -> Iterator[FaultyProxy]:
    """A proxy in front of the S3 server, for a module's tests."""
    with in_front_of(s3_environment) as proxy:
        yield proxy


@pytest.fixture
def proxy(module_proxy: FaultyProxy) -> FaultyProxy:
    """The proxy, faultless and with nothing counted."""
    module_proxy.forget()
    return module_proxy


@pytest.fixture(scope="session")
def forked_workers() -> Iterator[None]:
    """Clusters that this process starts fork their workers, which saves each ten seconds of imports."""
    with preloaded():
        yield


@pytest.fixture(scope="session")
def cluster(s3_environment: SwiftServer, forked_workers: None) -> Iterator[None]:
    """An embedded Ray cluster whose workers know the S3 server."""
    import ray

    from jobs.cluster import resources

    with preferred():
        resources.connect("local")
    yield
    ray.shutdown()


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting or joining a cluster ends the test."""
    from jobs.cluster import resources

    def refuse(*_: object) -> None:
        pytest.fail("a cluster was asked for")

    monkeypatch.setattr(resources, "connect", refuse)
