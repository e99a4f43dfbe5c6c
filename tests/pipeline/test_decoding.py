"""The guarded decoder: what `prepare` gives, and whatever an image does to its decoder costs that image alone."""

import ast
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from jobs.isolation import frames, guard, sandbox, zygote
from jobs.isolation.guard import Zygote
from jobs.pipeline import decoding
from jobs.pipeline.decoding import GuardedDecoder
from nsnet.errors import (
    DecoderCrashError,
    FetchError,
    ImageCorruptError,
    ImageEmptyError,
    ImageError,
    ImageTimeoutError,
    ImageTooLargeError,
    ImageUnidentifiedError,
)
from nsnet.images import DecodeLimits
from nsnet.patches import PatchConfig
from nsnet.preparation import PreparationConfig, Prepared, prepare
from nsnet.provenance import Provenance
from tests.support.credentials import picture, signed, signer
from tests.support.services.poisoned import CREDENTIALS_MARK
from tests.support.tables import big_image_file, image_file

REPO_ROOT = Path(__file__).parents[2]
LIMITS = DecodeLimits(max_bytes=1_000_000, max_pixels=40_000_000)
CONFIG = PreparationConfig(thumbnail_px=16, patches=(PatchConfig(patch_px=8, mosaic_px=16),), limits=LIMITS)
SMALL = image_file()


def limited(**limits: Any) -> PreparationConfig:
    return replace(CONFIG, limits=replace(LIMITS, **limits))


def assert_same(actual: Prepared, expected: Prepared) -> None:
    for (name, one), other in zip(asdict(actual).items(), asdict(expected).values(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def is_dead(pid: int) -> bool:
    """Gone, or dead and not yet buried by whoever adopted it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pid_of(decoder: GuardedDecoder) -> int:
    assert decoder._child is not None
    return decoder._child.pid


@pytest.fixture(scope="module")
def decoder() -> Iterator[GuardedDecoder]:
    with closing(GuardedDecoder(CONFIG)) as decoder:
        yield decoder


# What comes out.


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "HEIF"])
def test_image_is_prepared_as_without_the_guard(decoder: GuardedDecoder, file_format: str) -> None:
    image = image_file(3, file_format, 90, 70)
    assert_same(decoder.prepare(image), prepare(image, CONFIG))


def test_side_lengths_of_the_configuration_reach_the_child() -> None:
    config = PreparationConfig(thumbnail_px=20, patches=(PatchConfig(patch_px=16, mosaic_px=64, spectrum="power"),))
    with closing(GuardedDecoder(config)) as other:
        assert_same(other.prepare(SMALL), prepare(SMALL, config))


HUGE_HEADER = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
BROKEN = {
    "over the pixel limit": (big_image_file(), ImageTooLargeError),
    "extreme header": (HUGE_HEADER + bytes(4), ImageError),
    "text": (b"no image at all", ImageUnidentifiedError),
    "one byte": (b"\xff", ImageUnidentifiedError),
    "zeros": (bytes(100_000), ImageUnidentifiedError),
    "cut": (image_file(1, "PNG", 200, 200)[:9_000], ImageCorruptError),
    "start of a JPEG": (b"\xff\xd8\xff\xe0" + bytes(30), ImageError),
}


@pytest.mark.parametrize("name", BROKEN)
def test_image_error_comes_through_with_class_and_message(decoder: GuardedDecoder, name: str) -> None:
    image, kind = BROKEN[name]
    with pytest.raises(ImageError) as direct:
        prepare(image, CONFIG)
    with pytest.raises(kind) as guarded:
        decoder.prepare(image)
    assert (type(guarded.value), str(guarded.value)) == (type(direct.value), str(direct.value))
    assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))


@pytest.mark.parametrize(("size", "kind"), [(0, ImageEmptyError), (LIMITS.max_bytes + 1, ImageTooLargeError)])
def test_empty_and_oversized_bytes_never_reach_a_child(size: int, kind: type[ImageError]) -> None:
    fresh = GuardedDecoder(CONFIG)
    with pytest.raises(kind):
        fresh.prepare(bytes(size))
    assert fresh._child is None


# What one image may cost.


def test_child_killed_while_decoding_costs_one_image() -> None:
    with closing(GuardedDecoder(limited(max_pixels=120_000_000))) as decoder:
        decoder.prepare(SMALL)
        first = psutil.Process(pid_of(decoder))
        before = first.cpu_times().user

        def kill_when_busy() -> None:
            wait_until(lambda: first.cpu_times().user > before + 0.1)
            first.kill()

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        with pytest.raises(DecoderCrashError, match="SIGKILL"):
            decoder.prepare(big_image_file())
        killer.join()
        assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))
        assert pid_of(decoder) != first.pid and is_dead(first.pid)


def test_child_killed_before_it_has_read_the_image_costs_one_image() -> None:
    with closing(GuardedDecoder(CONFIG)) as decoder:
        decoder.prepare(SMALL)
        pid = pid_of(decoder)
        os.kill(pid, signal.SIGSTOP)
        killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(DecoderCrashError, match="SIGKILL"):
            decoder.prepare(bytes(900_000))  # more than a pipe holds
        killer.join()


def test_child_that_died_between_two_images_costs_none() -> None:
    with closing(GuardedDecoder(CONFIG)) as decoder:
        decoder.prepare(SMALL)
        pid = pid_of(decoder)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: is_dead(pid))
        assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))


@contextmanager
def at_most(decoder: GuardedDecoder, seconds: float) -> Iterator[None]:
    """Another time limit, for as long as it takes: on a busy machine a child may need longer for any image."""
    before = decoder.config
    decoder.config = replace(before, limits=replace(before.limits, max_seconds=seconds))
    yield
    decoder.config = before


@pytest.mark.parametrize("hangs", [False, True])
def test_decoding_over_the_time_limit_ends_at_the_limit_and_costs_one_image(hangs: bool) -> None:
    with closing(GuardedDecoder(limited(max_pixels=120_000_000))) as decoder:
        decoder.prepare(SMALL)
        pid = pid_of(decoder)
        if hangs:
            os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with (
            at_most(decoder, 1.0),
            pytest.raises(ImageTimeoutError, match=r"longer than 1 s .*\(--max-seconds\)"),
        ):
            decoder.prepare(bytes(900_000) if hangs else big_image_file())
        assert 0.9 < time.monotonic() - started < 20
        assert is_dead(pid)
        assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))


def test_decoding_over_the_memory_limit_costs_one_image() -> None:
    with closing(GuardedDecoder(limited(max_memory_bytes=100_000_000, max_pixels=120_000_000))) as decoder:
        decoder.prepare(SMALL)
        pid = pid_of(decoder)
        with pytest.raises(ImageCorruptError, match="MemoryError"):
            decoder.prepare(big_image_file())
        assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))
        assert pid_of(decoder) == pid


# Images that do to the decoder what they say.


@pytest.fixture(scope="module")
def poisoned() -> Iterator[Zygote]:
    with closing(Zygote("tests.support.services.poisoned")) as zygote:
        yield zygote


@pytest.fixture
def poisonous(poisoned: Zygote) -> Iterator[Callable[..., GuardedDecoder]]:
    made: list[GuardedDecoder] = []

    def make(**limits: Any) -> GuardedDecoder:
        made.append(GuardedDecoder(limited(**limits), poisoned))
        made[-1].prepare(SMALL)
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


def test_image_that_crashes_its_decoder_costs_itself(poisonous: Callable[..., GuardedDecoder]) -> None:
    decoder = poisonous()
    pid = pid_of(decoder)
    for _ in range(3):
        with pytest.raises(DecoderCrashError, match="ended with SIGSEGV on this image"):
            decoder.prepare(b"POISON segfault")
        assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))
    assert is_dead(pid)


def test_image_that_never_ends_costs_itself_and_its_time(poisonous: Callable[..., GuardedDecoder]) -> None:
    decoder = poisonous()
    pid = pid_of(decoder)
    with at_most(decoder, 0.5), pytest.raises(ImageTimeoutError, match=r"longer than 0\.5 s"):
        decoder.prepare(b"POISON sleep")
    assert is_dead(pid)
    assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))


def with_provenance(zygote: Zygote, anchors: str = "") -> GuardedDecoder:
    return GuardedDecoder(replace(CONFIG, provenance=True, anchors=anchors), zygote)


@pytest.mark.parametrize("deed", ["segfault", "sleep", "memory"])
def test_credentials_that_kill_or_hang_their_reader_cost_no_verdict(
    deed: str, poisoned: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.pipeline.decoding.CREDENTIALS_SECONDS", 0.3)
    with closing(with_provenance(poisoned)) as decoder:
        decoder.prepare(SMALL)
        pid = pid_of(decoder)
        found = decoder.prepare(SMALL + CREDENTIALS_MARK + deed.encode())
        assert found.provenance == Provenance(c2pa_state="error")
        assert_same(replace(found, provenance=None), prepare(SMALL, CONFIG))
        assert is_dead(pid)
        assert decoder.prepare(SMALL).provenance == Provenance()


def test_credentials_are_read_in_the_confined_child_with_the_trust_list_of_the_run() -> None:
    mine, other = signed(picture()), signed(picture(), by=signer("stranger"))
    with closing(GuardedDecoder(replace(CONFIG, provenance=True, anchors=signer().anchors))) as decoder:
        pid = None
        for image, state in ((mine, "valid"), (other, "untrusted"), (picture(), "none"), (mine, "valid")):
            found = decoder.prepare(image).provenance
            assert found is not None and found.c2pa_state == state
            assert found.digital_source_type == (None if state == "none" else "trainedAlgorithmicMedia")
            assert pid in (None, pid_of(decoder))
            pid = pid_of(decoder)


def test_image_that_takes_all_memory_costs_itself(poisonous: Callable[..., GuardedDecoder]) -> None:
    decoder = poisonous(max_memory_bytes=300_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecoderCrashError):
        decoder.prepare(b"POISON memory")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB: this process took none
    assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))


@pytest.mark.parametrize("seconds", [1e7, float("inf")])
def test_time_limit_without_an_end_is_taken(seconds: float, echo: Callable[..., GuardedDecoder]) -> None:
    assert echo(max_seconds=seconds).prepare(answer(width=7)).width == 7


# The child as a process.


def test_child_loads_no_torch(decoder: GuardedDecoder) -> None:
    decoder.prepare(SMALL)
    mapped = Path(f"/proc/{pid_of(decoder)}/maps").read_text()
    assert "_imaging" in mapped  # it does decode there
    assert "torch" not in mapped
    heavy = "{'torch', 'ray', 'transformers', 'open_clip'}"
    code = f"import sys, jobs.pipeline.decoding\nprint(sorted({heavy} & {{*sys.modules}}))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_hundreds_of_images_leave_no_descriptor_and_no_process(decoder: GuardedDecoder) -> None:
    decoder.prepare(SMALL)
    before, pid, processes = descriptors(), pid_of(decoder), len(children())
    images = [image_file(seed, "JPEG") for seed in range(10)] + [image_file(1)[:500], b"text"]
    for i in range(300):
        try:
            decoder.prepare(images[i % len(images)])
        except ImageError:
            assert i % len(images) >= 10
    assert (descriptors(), pid_of(decoder), len(children())) == (before, pid, processes)


def test_close_ends_the_child_and_may_be_repeated() -> None:
    before = descriptors()
    decoder = GuardedDecoder(CONFIG)
    decoder.close()
    decoder.prepare(SMALL)
    pid = pid_of(decoder)
    decoder.close()
    decoder.close()
    assert is_dead(pid) and pid not in [child.pid for child in children()] and descriptors() == before
    assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))
    decoder.close()


def test_child_dies_with_a_killed_parent_even_while_it_hangs() -> None:
    program = f"""
import os, signal, time
from jobs.pipeline.decoding import GuardedDecoder
from nsnet.preparation import PreparationConfig
decoder = GuardedDecoder(PreparationConfig(thumbnail_px=16))
decoder.prepare({SMALL!r})
os.kill(decoder._child.pid, signal.SIGSTOP)
print(decoder._child.pid, flush=True)
time.sleep(120)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_dead(pid)
        parent.kill()
    assert wait_until(lambda: is_dead(pid))


def test_child_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIL", "jobs", "json", "nsnet", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file that lay beside the images was run')")
    monkeypatch.chdir(tmp_path)
    with closing(Zygote(decoding.SERVICE)) as zygote, closing(GuardedDecoder(CONFIG, zygote)) as decoder:
        assert_same(decoder.prepare(SMALL), prepare(SMALL, CONFIG))


def test_child_that_cannot_start_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    decoder = GuardedDecoder(CONFIG, Zygote(decoding.SERVICE))
    with pytest.raises(RuntimeError, match=r"could not be started \(exit code 1\)"):
        decoder.prepare(SMALL)
    assert decoder._child is None and descriptors() == before


# A child that lies: it answers with the bytes of the image that it is sent.


@pytest.fixture(scope="module")
def echoing() -> Iterator[Zygote]:
    with closing(Zygote("tests.support.services.echo")) as zygote:
        yield zygote


@pytest.fixture
def echo(echoing: Zygote) -> Iterator[Callable[..., GuardedDecoder]]:
    made: list[GuardedDecoder] = []

    def make(**limits: Any) -> GuardedDecoder:
        made.append(GuardedDecoder(limited(**limits), echoing))
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


def message(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<I", len(header)) + header + payload


PAYLOAD = bytes(4 * 8 * 8 * 3 + 16 * 16 * 3)
FINE = {
    "width": 5,
    "height": 6,
    "format": "PNG",
    "frames": 1,
    "quality": 75,
    "perceptual_hash": "0123456789abcdef",
    "remark": "",
    "size_bytes": 7,
}


def answer(**changes: Any) -> bytes:
    """What an honest child would say, but for the changes; None leaves a value out."""
    header = {name: value for name, value in (FINE | changes).items() if value is not None}
    return message(json.dumps(header).encode(), PAYLOAD)


def error(**values: Any) -> bytes:
    return message(json.dumps(values).encode())


NONSENSE = {
    "no JSON": message(b"\xff\xfe{"),
    "empty header": message(b""),
    "list": message(b"[1, 2]"),
    "number": message(b"7"),
    "deeply nested": message(b"[" * 500_000),
    "huge header": struct.pack("<I", 2**32 - 1) + bytes(1000),
    "header just over the limit": struct.pack("<I", frames.MAX_HEADER_BYTES + 1) + bytes(frames.MAX_HEADER_BYTES + 1),
    "pickle": pickle.dumps(FINE) + PAYLOAD,
    "error without a message": error(error_class="ImageCorruptError"),
    "width missing": answer(width=None),
    "quality missing": answer(quality=None),
    "quality no number": answer(quality="high"),
    "bytes missing": answer(size_bytes=None),
    "bytes negative": answer(size_bytes=-1),
    "perceptual hash too long": answer(perceptual_hash="0" * 17),
    "perceptual hash no number": answer(perceptual_hash="g" * 16),
    "width no number": answer(width="wide"),
    "width a list": answer(width=[1]),
    "width 0": answer(width=0),
    "width over 31 bits": answer(width=2**31),
    "height infinite": answer(height=float("inf")),
    "height NaN": answer(height=float("nan")),
    "frames negative": answer(frames=-1),
    "format missing": answer(format=None),
}


CLAIMS = asdict(Provenance(c2pa_state=None))
LIES = {
    "no JSON": message(b"\xff{"),
    "list": message(b"[]"),
    "nothing": b"",
    "empty": message(b"{}"),
    "unknown state": error(**CLAIMS | {"c2pa_state": "certified"}),
    "unknown source type": error(**CLAIMS | {"c2pa_state": "valid", "digital_source_type": "<b>"}),
    "unknown generator": error(**CLAIMS | {"c2pa_state": "valid", "metadata_generator": "\x1b[2J"}),
    "state missing": error(**CLAIMS),
    "state a list": error(**CLAIMS | {"c2pa_state": []}),
}


@pytest.mark.parametrize("name", LIES)
def test_senseless_answer_about_credentials_costs_no_verdict(
    name: str, echoing: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.pipeline.decoding.CREDENTIALS_SECONDS", 0.3)
    with closing(with_provenance(echoing)) as decoder:
        found = decoder.prepare(answer(provenance=CLAIMS) + LIES[name])
        assert found.provenance == Provenance(c2pa_state="error") and found.width == FINE["width"]
        assert decoder.prepare(answer(provenance=CLAIMS | {"c2pa_state": "none"})).provenance == Provenance()


@pytest.mark.parametrize("name", NONSENSE)
def test_senseless_answer_costs_that_image_and_the_child(name: str, echo: Callable[..., GuardedDecoder]) -> None:
    decoder = echo()
    decoder.prepare(answer())
    pid = pid_of(decoder)
    with pytest.raises(DecoderCrashError, match="the decoder's answer is malformed"):
        decoder.prepare(NONSENSE[name])
    assert is_dead(pid)
    assert decoder.prepare(answer(width=77)).width == 77


@pytest.mark.parametrize("said", [b"\x02", message(b"{")[:-1], answer()[:-1], answer()[: -len(PAYLOAD)]])
def test_answer_that_does_not_end_costs_that_image(said: bytes, echo: Callable[..., GuardedDecoder]) -> None:
    decoder = echo(max_seconds=0.5)
    with pytest.raises(ImageTimeoutError):
        decoder.prepare(said)
    assert decoder.prepare(answer(width=77)).width == 77


def test_more_than_one_answer_is_not_taken_for_the_next_image(echo: Callable[..., GuardedDecoder]) -> None:
    decoder = echo()
    assert decoder.prepare(answer(width=1) + answer(width=2)).width == 1
    assert decoder.prepare(answer(width=3)).width == 3


def test_interrupted_answer_is_not_taken_for_the_next_image(echo: Callable[..., GuardedDecoder]) -> None:
    decoder = echo()
    decoder.prepare(answer())
    pid = pid_of(decoder)
    os.kill(pid, signal.SIGSTOP)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            decoder.prepare(answer(width=1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert decoder.prepare(answer(width=2)).width == 2


UNKNOWN_CLASSES = [
    "SystemExit",
    "KeyboardInterrupt",
    "NsnetError",
    "StorageError",
    "__doc__",
    "",
    7,
    None,
    ["ImageError"],
]


@pytest.mark.parametrize("kind", UNKNOWN_CLASSES)
def test_unknown_error_class_is_a_corrupt_image(kind: Any, echo: Callable[..., GuardedDecoder]) -> None:
    with pytest.raises(ImageCorruptError, match="^so it said$"):
        echo().prepare(error(error_class=kind, error_message="so it said"))


def test_error_classes_of_images_are_looked_up_by_name(echo: Callable[..., GuardedDecoder]) -> None:
    decoder = echo()
    for kind in (ImageError, ImageEmptyError, ImageTimeoutError, DecoderCrashError, FetchError):
        with pytest.raises(kind) as caught:
            decoder.prepare(error(error_class=kind.__name__, error_message="m"))
        assert type(caught.value) is kind


def test_text_that_no_table_can_hold_is_replaced(echo: Callable[..., GuardedDecoder]) -> None:
    decoder = echo()
    assert decoder.prepare(answer(format="P\ud800G")).format == "P?G"
    with pytest.raises(ImageCorruptError, match=r"^bad \?$"):
        decoder.prepare(error(error_class="ImageCorruptError", error_message="bad \udcff"))


def test_hundred_crashes_leave_no_descriptor_and_no_process(echo: Callable[..., GuardedDecoder]) -> None:
    decoder = echo()

    def crash() -> None:
        with pytest.raises(DecoderCrashError):
            decoder.prepare(message(b"7"))

    crash()
    before, processes = descriptors(), len(children())
    for _ in range(100):
        crash()
    # Whatever else this process does in the meantime opens and closes a few; a leak would be a hundred of them.
    assert descriptors() < before + 50 and len(children()) < processes + 50


def test_descriptors_above_1023_can_be_waited_for(echo: Callable[..., GuardedDecoder]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"only {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        decoder = echo()
        assert decoder.prepare(answer(width=7)).width == 7
        assert decoder._child is not None and decoder._child._answers > 1023
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_nothing_is_unpickled() -> None:
    modules = (decoding, frames, guard, sandbox, zygote)
    tree = ast.parse("\n".join(Path(module.__file__).read_text() for module in modules))
    used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {"json", "read_into", "struct"} <= used
    assert not used & {"pickle", "marshal", "dill", "cloudpickle", "shelve", "eval", "exec"}
