"""A real S3 server for the tests: OpenStack Swift, one replica on the loopback address, four processes.

Swift lives in `.venv-swift`, apart from `.venv`, because its pins are nobody else's business;
`python -m tests.support.swift` makes that environment and does nothing else.
"""

import base64
import email.utils
import fcntl
import hashlib
import hmac
import http.client
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 10.0
STORAGE_SERVERS = ("account", "container", "object")
SERVERS = (*STORAGE_SERVERS, "proxy")

# workers = 0: serve in the process itself. With 1 Swift forks a worker that outlives a killed parent.
# log_udp_*: Swift always logs to syslog too; these datagrams go where nobody listens. Our logs are its stderr.
# *_timeout: a busy machine may miss the defaults (0.5 s to connect, 1 s to enter a new object in its listing),
# and a missed entry stays missing, for the daemon that would add it later does not run here.
SERVER_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {root}
devices = {root}/devices
mount_check = false
fallocate_reserve = 0
disable_fallocate = true
workers = 0
log_udp_host = 127.0.0.1
log_udp_port = {port}
conn_timeout = 20
node_timeout = 60
container_update_timeout = 60
[filter:healthcheck]
use = egg:swift#healthcheck
"""

STORAGE_CONF = """\
[pipeline:main]
pipeline = healthcheck {name}-server
[app:{name}-server]
use = egg:swift#{name}
log_requests = false
"""

# Swift inserts the filters that it cannot do without (copy, listing_formats, ...) by itself. Not its own `cache`: that
# would share state through any memcached that happens to run on this machine.
PROXY_CONF = """\
[pipeline:main]
pipeline = catch_errors healthcheck cache s3api tempauth slo proxy-server
[filter:cache]
use = call:memory_cache:make
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret} .admin
[filter:slo]
use = egg:swift#slo
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""

# Runs the proxy with a cache in its own memory, in place of memcached. Without one, it asks the other servers for
# account and container in each request, which was 29 % of the processor time of all servers.
PROXY_SCRIPT = """\
import copy, runpy, sys, types
from time import monotonic

class Cache:
    def __init__(self):
        self.entries = {}

    def get(self, key, **_):
        value, end = self.entries.get(key, (None, 0.0))
        return copy.deepcopy(value) if monotonic() < end else None

    def set(self, key, value, time=0, **_):
        self.entries[key] = copy.deepcopy(value), monotonic() + time

    def delete(self, key, **_):
        self.entries.pop(key, None)

def make(global_conf, **_):
    cache = Cache()

    def with_cache(app):
        def serve(environment, start_response):
            environment["swift.cache"] = cache
            return app(environment, start_response)
        return serve
    return with_cache

sys.modules["memory_cache"] = types.ModuleType("memory_cache")
sys.modules["memory_cache"].make = make
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Swift's own ring tool takes one process per verb, nine in all; its library needs one.
RING_SCRIPT = """\
import sys
from swift.common.ring import RingBuilder

for argument in sys.argv[1:]:
    path, port = argument.rsplit("=", 1)
    builder = RingBuilder(part_power=6, replicas=1, min_part_hours=1)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "disk", "weight": 1})
    builder.rebalance()
    builder.get_ring().save(path)
"""

# Asks the kernel to kill this process when its parent dies, however it dies, and becomes the server: the request
# survives exec. Not a `preexec_fn`, which may deadlock in a parent with threads. The parent may be dead already, hence
# the comparison.
LAUNCH_SCRIPT = """\
import ctypes, os, signal, sys

PR_SET_PDEATHSIG = 1
parent, *command = sys.argv[1:]
if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != int(parent):
    sys.exit("the parent is gone")
os.execv(command[0], command)
"""


def ensure_environment(repo_root: Path) -> Path:
    """Make `.venv-swift` in repo_root as `swift-requirements.lock` says, unless it is there; return its path."""
    environment = repo_root / ".venv-swift"
    stamp = environment / "lock.sha256"
    uv = str(repo_root / ".venv" / "bin" / "uv")
    with (repo_root / "tests" / "support" / "swift-requirements.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may start at once
        digest = hashlib.sha256(lock.read()).hexdigest()
        python = environment / "bin" / "python"
        if python.exists() and stamp.exists() and stamp.read_text() == digest:
            return environment
        # The stamp goes first and comes last: whatever an interruption leaves is made anew. uv inherits the lock:
        # it may outlive us and must still keep others out.
        venv = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)]
        install = [uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), "-r", lock.name]
        stamp.unlink(missing_ok=True)
        for command in (venv, install):
            subprocess.run(command, check=True, pass_fds=[lock.fileno()])
        stamp.write_text(digest)
    return environment


class SwiftServer:
    """Swift with its files under `root`, an S3 endpoint from `start` to `stop`; a context manager.

    The servers also end with the thread that called `start`, even when that is killed: start it from a thread that
    lives as long as the server is wanted. Linux only.
    """

    access_key = f"test:{secrets.token_hex(10)}"  # both are random, so that tests can search for their traces
    secret_key = secrets.token_hex(20)
    region = "us-east-1"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._reserved: dict[str, socket.socket] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def endpoint_url(self) -> str:
        return f"http://{HOST}:{self._port('proxy')}"

    def environment(self) -> dict[str, str]:
        """The variables with which boto, `s3fs.S3FileSystem()` and pyarrow's `FileSystem.from_uri` use this server.

        A trap: `pyarrow.fs.S3FileSystem()` ignores AWS_ENDPOINT_URL (https://github.com/apache/arrow/issues/49643) and
        wants `endpoint_override=server.endpoint_url`. No addressing style is needed: all put the bucket in the path
        where the host is a bare address. No checksum setting either: Swift takes boto's CRC32 headers as well as
        the chunked bodies with trailing CRC64NVME that pyarrow sends.
        """
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            # Nothing of the developer's own: no profile, and no search for a cloud machine's credentials.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the four servers and return when a signed S3 request succeeds; RuntimeError with their logs if not."""
        environment = ensure_environment(REPO_ROOT)
        deadline = time.monotonic() + START_SECONDS
        try:
            (self.root / "devices" / "disk").mkdir(parents=True, exist_ok=True)
            self._require_xattrs()
            self._reserve_ports()
            self._write_configuration()
            for name in STORAGE_SERVERS:
                self._launch(environment, name)
            # The storage servers come up meanwhile; only the proxy reads the rings at its start.
            rings = [f"{self.root / name}.ring.gz={self._port(name)}" for name in STORAGE_SERVERS]
            subprocess.run([environment / "bin" / "python", "-I", "-c", RING_SCRIPT, *rings], check=True)
            self._launch(environment, "proxy")
            for name in SERVERS:
                self._wait_for(name, "/healthcheck", {}, deadline)
            self._wait_for("proxy", "/", self._signature_of_list_buckets(), deadline)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the servers that `start` started, by their process ids; harmless when there are none."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reserved in self._reserved.values():
            reserved.close()
        self._processes.clear()
        self._reserved.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _port(self, name: str) -> int:
        return int(self._reserved[name].getsockname()[1])

    def _require_xattrs(self) -> None:
        try:
            os.setxattr(self.root / "devices" / "disk", "user.swift.probe", b"1")
        except OSError as error:
            raise RuntimeError(
                f"{self.root}: Swift keeps object metadata in user extended attributes, which this filesystem refuses "
                f"({error.strerror}); choose a directory on ext4, xfs or btrfs, e.g. with pytest --basetemp"
            ) from error

    def _reserve_ports(self) -> None:
        # Bound, never listening, and held while the servers live: nobody else can be given these ports, and Swift,
        # which sets SO_REUSEPORT as well, can still listen on them.
        for name in SERVERS:
            reserved = self._reserved[name] = socket.socket()
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind((HOST, 0))

    def _write_configuration(self) -> None:
        (self.root / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
        for name in SERVERS:
            common = SERVER_CONF.format(port=self._port(name), root=self.root)
            user = self.access_key.replace(":", "_")
            own = PROXY_CONF if name == "proxy" else STORAGE_CONF.format(name=name)
            own = own.replace("{user}", user).replace("{secret}", self.secret_key)
            (self.root / f"{name}.conf").write_text(common + own)

    def _launch(self, environment: Path, name: str) -> None:
        python = str(environment / "bin" / "python")
        start = ["-c", PROXY_SCRIPT] if name == "proxy" else []
        program = str(environment / "bin" / f"swift-{name}-server")
        server = [python, "-I", *start, program, f"{self.root}/{name}.conf", "-v"]
        launcher = [python, "-I", "-c", LAUNCH_SCRIPT, str(os.getpid()), *server]
        with (self.root / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                launcher, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _wait_for(self, name: str, path: str, headers: Mapping[str, str], deadline: float) -> None:
        answer = "no answer"
        while time.monotonic() < deadline:
            status = self._processes[name].poll()
            if status is not None:
                raise RuntimeError(f"the {name} server ended with status {status}\n{self._log_tails()}")
            connection = http.client.HTTPConnection(HOST, self._port(name), timeout=5)
            try:
                connection.request("GET", path, headers=headers)
                response = connection.getresponse()
                if response.status == 200:
                    return
                answer = f"{response.status} {response.read(1000)!r}"
            except (OSError, http.client.HTTPException) as error:
                answer = repr(error)
            finally:
                connection.close()
            time.sleep(0.05)
        raise RuntimeError(
            f"the {name} server did not answer GET {path} within {START_SECONDS:g} s of the start; last: {answer}\n"
            f"{self._log_tails()}"
        )

    def _signature_of_list_buckets(self) -> dict[str, str]:
        """Headers of a signed S3 `GET /`, by version 2 of the signature, which takes two lines and no client."""
        date = email.utils.formatdate(usegmt=True)
        digest = hmac.digest(self.secret_key.encode(), f"GET\n\n\n{date}\n/".encode(), "sha1")
        return {"Date": date, "Authorization": f"AWS {self.access_key}:{base64.b64encode(digest).decode()}"}

    def _log_tails(self) -> str:
        logs = [self.root / f"{name}.log" for name in SERVERS]
        tails = {log: log.read_text(errors="replace").splitlines()[-15:] for log in logs if log.exists()}
        return "\n".join(f"--- {log}\n" + "\n".join(tail) for log, tail in tails.items())


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    """A Swift server for the whole test session; import it in a conftest."""
    with SwiftServer(tmp_path_factory.mktemp("swift")) as server:
        yield server


if __name__ == "__main__":
    print(ensure_environment(REPO_ROOT))
