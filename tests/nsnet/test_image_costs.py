"""What an image costs: bounded before it is paid, whatever its headers claim."""

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nsnet import jpeg, rasters
from nsnet.errors import ImageCorruptError, ImageError, ImageTooLargeError
from nsnet.images import FORMATS, DecodeLimits, decode, decode_image
from nsnet.samples import samples
from tests.support import poisons
from tests.support.poisons import POISONS, marker, png, progressive_jpeg, saved, tiff

REPO_ROOT = Path(__file__).parents[2]
MAX_SECONDS = 2.5
"""Most CPU seconds for a poison of a hundredth of its size: the slowest takes 1.2 s for a million pixels."""


@pytest.mark.parametrize("name", POISONS)
def test_cost_of_the_dearest_files_grows_with_their_pixels_only(name: str) -> None:
    build, (width, height) = POISONS[name]
    data = build(width // 10, height // 10)
    started = time.process_time()
    try:
        decode(data)
    except ImageError as error:
        assert "\n" not in str(error)
    assert time.process_time() - started < MAX_SECONDS


@pytest.mark.parametrize(
    ("scans", "max_pixels", "is_decoded"),
    [(100, 10**8, True), (101, 10**8, False), (16, 4096, True), (17, 4096, False)],
)
def test_scans_of_a_progressive_jpeg_are_bounded(scans: int, max_pixels: int, is_decoded: bool) -> None:
    data, limits = progressive_jpeg(64, 64, scans), DecodeLimits(max_pixels=max_pixels)
    if is_decoded:
        assert decode(data, limits).shape == (64, 64, 3)
        return
    with pytest.raises(ImageTooLargeError, match=f"more than {scans - 1} scans"):
        decode(data, limits)


def test_end_marker_within_a_segment_hides_no_scans() -> None:
    data = progressive_jpeg(64, 64, 150)
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    with pytest.raises(ImageTooLargeError, match="scans"):
        decode(data[:second] + marker(0xFE, b"\xff\xd9") + data[second:])


def test_letters_of_scans_after_the_end_of_a_jpeg_count_nothing() -> None:
    data = progressive_jpeg(64, 64, 10)
    np.testing.assert_array_equal(decode(data + b"\xff\xda\0\0" * 10_000), decode(data))


def test_thumbnail_in_the_metadata_of_a_jpeg_is_not_taken_for_its_image() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 0, 0)).save(buffer, "JPEG")
    data = buffer.getvalue()
    whole = data[:2] + marker(0xE1, b"Exif\0\0" + saved("RGB", "JPEG")(8, 8)) + data[2:]
    decoded = decode_image(whole)
    assert decoded.remark is None and decoded.pixels.shape == (30, 40, 3)
    assert decode_image(whole[:-2]).remark is not None


def test_megabytes_of_metadata_cost_a_jpeg_neither_its_orientation_nor_time() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    profile = marker(0xE2, b"ICC_PROFILE\0\1\x40" + bytes(60_000)) * 60
    data = buffer.getvalue()
    scan = data.index(b"\xff\xdb")
    started = time.process_time()
    assert decode(data[:scan] + profile + data[scan:]).shape == (40, 30, 3)
    assert time.process_time() - started < MAX_SECONDS


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + bytes(100_000) + saved("RGB", "JPEG")(8, 8)[2:],
        b"\xff\xd8" + marker(0xFE, b"") * 20_000 + saved("RGB", "JPEG")(8, 8)[2:],
    ],
    ids=["junk", "segments"],
)
def test_junk_before_the_image_of_a_jpeg_is_bounded(data: bytes) -> None:
    with pytest.raises(ImageCorruptError, match="junk or 10,000 segments"):
        decode(data)


@pytest.mark.parametrize(
    "build",
    [
        lambda: poisons.png_of_chunks(120, 120), lambda: poisons.gif_of_blocks(400, 400),
        lambda: tiff(1, 8, 1, 1)(8, 150_000), lambda: poisons.qoi_of_steps(2049, 2048),
        lambda: poisons.bmp_of_runs(b"\1\5\0\0")(2049, 2048),
        lambda: saved("L", "JPEG2000", codeblock_size=(4, 4))(64, 64),
        lambda: saved("L", "JPEG2000", precinct_size=(4, 4))(512, 512),
        lambda: b"icns" + struct.pack(">I", 1 << 20) + (b"junk" + struct.pack(">I", 8)) * 2000,
    ],
    ids=["chunks", "blocks", "strips", "qoi", "runs", "code blocks", "precincts", "icons"],
)  # fmt: skip
def test_file_of_more_parts_than_its_pixels_justify_is_too_large(build: Callable[[], bytes]) -> None:
    with pytest.raises(ImageTooLargeError):
        decode(build())


def test_tiff_of_progressive_jpeg_is_refused() -> None:
    data = saved("RGB", "TIFF", compression="jpeg")(64, 64)
    decode(data)
    at = data.index(b"\xff\xc0\0\x11\x08")
    with pytest.raises(ImageCorruptError, match="progressive"):
        decode(data[: at + 1] + b"\xc2" + data[at + 2 :])


def test_comments_among_digits_are_bounded() -> None:
    with pytest.raises(ImageCorruptError, match="comments"):
        decode(poisons.comments_in_ppm(64, 64))


def test_portable_map_that_is_cut_shows_no_memory_that_nobody_wrote() -> None:
    with pytest.raises(ImageCorruptError, match="cut"):
        decode(b"P2 100 100 255\n1 2 3 ")


def test_image_in_an_icon_is_bounded_before_it_is_decoded() -> None:
    inner = png(8, 2)(3000, 3000)
    directory = struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(inner), 22)
    block = b"ic07" + struct.pack(">I", len(inner) + 8) + inner
    apple = b"icns" + struct.pack(">I", len(block) + 8) + block
    for data in (directory + inner, apple):
        with pytest.raises(ImageTooLargeError, match="3000 × 3000"):
            decode(data, DecodeLimits(max_pixels=8_000_000))


def test_frames_are_counted_as_far_as_they_go() -> None:
    assert decode_image(poisons.pages(30, 30)).frames == 901
    assert decode_image(poisons.pages(400, 400)).frames == 100_000


def test_pages_in_a_circle_are_counted_once() -> None:
    data = bytearray(poisons.pages(3, 3))
    struct.pack_into("<I", data, len(data) - 4, len(data) - 6 * 9)  # the last leads to the first of the nine
    assert decode_image(bytes(data)).frames == 10


def test_frames_that_an_animation_claims_are_not_believed() -> None:
    claim = poisons.png_chunk(b"acTL", struct.pack(">II", 0x80000000, 0))
    assert decode_image(png(8, 2, extra=claim)(8, 8)).frames == 1


def test_frames_of_a_gif_are_counted_although_its_later_ones_are_damaged() -> None:
    frames = [Image.new("P", (9, 9), at) for at in range(5)]
    for at, frame in enumerate(frames):
        frame.putpalette(bytes((40 * at, 9, 9)) * 256)
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], optimize=False)
    data = bytearray(buffer.getvalue())
    assert decode_image(bytes(data)).frames == 5
    data[len(data) * 3 // 4 :] = bytes(len(data) - len(data) * 3 // 4)
    assert 1 <= decode_image(bytes(data)).frames <= 5


@pytest.mark.parametrize("size", [1, 7, 64])
def test_text_that_inflates_within_its_bound_costs_no_image(size: int) -> None:
    note = zlib.compress(bytes((4 << 20) + 16 * size * size - 1))
    data = png(8, 2, extra=poisons.png_chunk(b"zTXt", b"a\0\0" + note))(size, size)
    assert decode(data).shape == (size, size, 3)
    more = zlib.compress(bytes((4 << 20) + 16 * size * size + 1))
    with pytest.raises(ImageCorruptError, match="too large"):
        decode(png(8, 2, extra=poisons.png_chunk(b"zTXt", b"a\0\0" + more))(size, size))


def test_inspectors_read_any_bytes_without_another_error() -> None:
    rng = np.random.default_rng(0)
    limits = DecodeLimits(max_pixels=10**6)
    for name, data in samples():
        for _ in range(150):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            cut = damaged.tobytes()[: rng.integers(1, len(data) + 1)]
            try:
                decode(cut, limits)
            except ImageError as error:
                assert str(error) and "\n" not in str(error), name


def test_samples_are_of_every_format() -> None:
    assert {name for name, _ in samples()} - {"MPO"} == set(FORMATS)
    for name, data in samples():
        assert decode_image(data).format == name


def test_after_preload_decoding_imports_and_opens_nothing() -> None:
    """In a process of its own: here much is loaded already."""
    code = """
import sys
from nsnet import preparation
from nsnet.samples import samples
config = preparation.PreparationConfig(thumbnail_px=32, fingerprint=True)
preparation.preload(config)
files, modules, seen = list(samples()), set(sys.modules), []
watched = "open", "import", "_thread.start_new_thread", "socket.__new__", "ctypes.dlopen", "os.fork", "subprocess.Popen"
sys.addaudithook(lambda event, arguments: seen.append((event, str(arguments))) if event in watched else None)
for name, data in files:
    preparation.prepare(data, config, "jpeg:80+blur:1")
done, loaded = list(seen), set(sys.modules) - modules
print(len(files), done, loaded)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split(maxsplit=1)[1].strip() == "[] set()"


def test_tails_of_a_jpeg_begin_with_different_bits_and_hold_no_marker() -> None:
    first, second = (tail[:-2] for tail in jpeg.TAILS)
    assert first[0] >> 7 != second[0] >> 7 and b"\xff" not in first + second


def test_slow_formats_are_bounded_by_their_pixels() -> None:
    assert DecodeLimits().max_seconds / 5 > rasters.MAX_SLOW_PIXELS * 1.2e-6
