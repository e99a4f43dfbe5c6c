"""Layouts of samples: what is decoded has the right pixels, and what is not known to have them is refused by name."""

import io
import itertools
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nsnet.errors import ImageCorruptError, ImageError, ImageUnidentifiedError
from nsnet.images import FORMATS, decode, decode_image
from tests.support.tiffs import DEFLATE, NONE, PACKBITS, compressed, file, packed, tiff

REPORTS = Path(__file__).parents[3] / "shared/data/reports/images"
RGB, CMYK = 2, 5
SIZES = {0: 1, 1: 1, RGB: 3, 3: 1, CMYK: 4, 6: 3}


def drawn(channels: int, bits: int, seed: int = 0) -> NDArray[Any]:
    samples = np.random.default_rng(seed).integers(0, 1 << bits, (21, 37, channels))
    samples[0, 0] = (1 << bits) - 1
    return samples


def shown(samples: NDArray[Any], photometric: int, bits: int, extra: Sequence[int], palette: NDArray[Any]) -> Any:
    """What a viewer shows, by the formulas of the specification."""
    levels = samples / ((1 << bits) - 1) * 255.0
    colours, alpha = levels[..., : SIZES[photometric]], levels[..., SIZES[photometric] :][..., :1]
    if photometric == 0:
        colours = 255 - colours
    elif photometric == 3:
        colours = (palette.reshape(3, -1).T // 256)[samples[..., 0]].astype(float)
    elif photometric == CMYK:
        colours = (255 - colours[..., :3]) * (255 - colours[..., 3:]) / 255
    elif photometric == 6:
        y, blue, red = colours[..., 0], colours[..., 1] - 128, colours[..., 2] - 128
        colours = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=-1)
    colours = np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours
    if tuple(extra[:1]) == (1,):
        colours = colours + 255 - alpha
    elif tuple(extra[:1]) == (2,):
        colours = colours * (alpha / 255) + 255 - alpha
    return np.clip(colours, 0, 255)


@pytest.mark.parametrize("photometric", SIZES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_tiff_of_any_layout_has_the_samples_of_its_strips_or_is_refused(photometric: int, bits: int) -> None:
    decoded = 0
    rng = np.random.default_rng(1)
    for planar, compression, order, extra, tile in itertools.product(
        (1, 2), (NONE, DEFLATE, PACKBITS), "<>", ((), (0,), (1,), (2,)), (0, 16)
    ):
        samples = drawn(SIZES[photometric] + len(extra), bits)
        if extra == (1,):
            samples[..., :-1] = np.minimum(samples[..., :-1], samples[..., -1:])
        palette = rng.integers(0, 65536, 3 << min(bits, 8))
        tags: dict[int, tuple[int, Sequence[int]]] = {530: (3, [1, 1])} if photometric == 6 else {}
        if photometric == 3:
            tags[320] = (3, palette.tolist())
        layout = {"planar": planar, "compression": compression, "order": order, "extra": extra, "tile": tile}
        try:
            pixels = decode(tiff(samples, photometric, bits, tags=tags, **layout))  # type: ignore[arg-type]
        except ImageCorruptError as error:
            assert f"{samples.shape[2]} × {bits} bits" in str(error)
            continue
        decoded += 1
        difference = np.abs(pixels - shown(samples, photometric, bits, extra, palette)).max()
        assert difference <= (3 if extra or photometric in (CMYK, 6) or bits > 8 else 1), (layout, difference)
    known = {(0, 1), (0, 2), (0, 4), (1, 12), (1, 16), (RGB, 16), (CMYK, 16)}
    known |= {(1, 1), (1, 2), (1, 4), (3, 1), (3, 2), (3, 4)} | {(photometric, 8) for photometric in SIZES}
    assert (decoded >= 2) == ((photometric, bits) in known), f"{decoded} layouts are decoded"


@pytest.mark.parametrize(
    ("sample_format", "bits", "said"),
    [(2, 8, "signed"), (2, 16, "signed"), (2, 32, "signed"), (3, 16, "floating-point"), (3, 64, "floating-point"),
     (1, 64, "64 bits")],
)  # fmt: skip
def test_tiff_of_samples_without_a_known_range_is_refused(sample_format: int, bits: int, said: str) -> None:
    samples = drawn(1, 7)
    with pytest.raises(ImageCorruptError, match=said):
        decode(tiff(samples, 1, bits, sample_format=sample_format))


@pytest.mark.parametrize("photometric", [4, 9, 10, 32844, 32845])
def test_tiff_of_colours_that_pillow_does_not_know_is_refused(photometric: int) -> None:
    with pytest.raises(ImageCorruptError):
        decode(tiff(drawn(3, 8), photometric, 8))


def test_tiff_palette_of_8_bits_is_refused_rather_than_shown_black() -> None:
    tags: dict[int, tuple[int, Sequence[int]]] = {320: (3, [*range(256)] * 3)}
    with pytest.raises(ImageCorruptError, match="palette"):
        decode(tiff(drawn(1, 8), 3, 8, tags=tags))


def with_field(data: bytes, tag: int, kind: int | None = None, content: bytes = b"", count: int = 1) -> bytes:
    """A small-endian TIFF with one field in the place of what it has of this tag; `kind` None: with none."""
    (at,) = struct.unpack_from("<I", data, 4)
    (number,) = struct.unpack_from("<H", data, at)
    fields = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(number)]
    fields = [one for one in fields if struct.unpack_from("<H", one)[0] != tag]
    beyond = content if len(content) > 4 else b""
    if kind is not None:
        where = struct.pack("<I", len(data)) if beyond else content.ljust(4, b"\0")
        fields.append(struct.pack("<HHI", tag, kind, count) + where)
    fields.sort(key=lambda one: struct.unpack_from("<H", one))
    start = struct.pack("<I", len(data) + len(beyond))
    return data[:4] + start + data[8:] + beyond + struct.pack("<H", len(fields)) + b"".join(fields) + bytes(4)


@pytest.mark.parametrize(
    ("tag", "kind", "content"),
    [(266, 11, struct.pack("<f", 2)), (262, 11, struct.pack("<f", 0)), (339, 7, b"\2"), (317, 2, b"2")],
)
def test_tiff_whose_deciding_tag_is_no_whole_number_is_refused(tag: int, kind: int, content: bytes) -> None:
    data = tiff(drawn(1, 8), 1, 8)
    assert np.array_equal(decode(with_field(data, 33000, kind, content)), decode(data))
    with pytest.raises(ImageCorruptError, match=f"tag {tag} is not an integer"):
        decode(with_field(data, tag, kind, content))


def test_tiff_without_photometric_interpretation_is_refused_rather_than_inverted() -> None:
    with pytest.raises(ImageCorruptError, match="photometric interpretation is missing"):
        decode(with_field(tiff(drawn(1, 8), 1, 8), 262))


@pytest.mark.parametrize(("compression", "is_decoded"), [(NONE, False), (PACKBITS, False), (DEFLATE, True)])
def test_predictor_is_decoded_where_the_compression_has_one(compression: int, is_decoded: bool) -> None:
    samples = drawn(1, 8)
    data = tiff(np.diff(samples, axis=1, prepend=0) % 256, 1, 8, compression=compression, tags={317: (3, [2])})
    if is_decoded:
        np.testing.assert_array_equal(decode(data), np.repeat(samples, 3, axis=2))
    else:
        with pytest.raises(ImageCorruptError, match="predictor"):
            decode(data)


@pytest.mark.parametrize(
    ("tag", "numbers", "is_decoded"),
    [(532, [0, 255, 128, 255, 128, 255], True), (532, [16, 235, 128, 240, 128, 240], False),
     (529, [299, 587, 114], True), (529, [213, 715, 72], False), (529, [299, 587], False)],
)  # fmt: skip
def test_ycbcr_of_another_range_or_other_coefficients_is_refused(
    tag: int, numbers: list[int], is_decoded: bool
) -> None:
    below = 1000 if tag == 529 else 1
    content = b"".join(struct.pack("<II", number, below) for number in numbers)
    data = tiff(drawn(3, 8), 6, 8, tags={530: (3, [1, 1])})
    data, expected = with_field(data, tag, 5, content, len(numbers)), decode(data)
    if is_decoded:
        np.testing.assert_array_equal(decode(data), expected)
    else:
        with pytest.raises(ImageCorruptError, match="full range"):
            decode(data)


def test_unsigned_tiff_of_32_bits_is_scaled_by_its_type() -> None:
    samples = np.linspace(0, 2**32 - 1, 21 * 37).reshape(21, 37, 1).astype(np.uint32)
    assert np.abs(decode(tiff(samples, 1, 32)) - samples / (2**32 - 1) * 255).max() <= 0.51
    with pytest.raises(ImageCorruptError, match="32 bits"):
        decode(tiff(samples, 1, 32, order=">"))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.5), (0.0, 100.0), (-5.0, 250.0)])
def test_float_tiff_whose_black_or_white_is_open_is_refused(low: float, high: float) -> None:
    samples = np.linspace(low, high, 21 * 37).reshape(21, 37, 1)
    with pytest.raises(ImageCorruptError, match="the value of (black|white) is unknown"):
        decode(tiff(samples, 1, 32, sample_format=3))


def test_big_tiff_is_decoded() -> None:
    samples = drawn(3, 8)
    np.testing.assert_array_equal(decode(tiff(samples, RGB, 8, big=True)), samples)
    with pytest.raises(ImageCorruptError, match="big-endian"):
        decode(tiff(samples, RGB, 8, big=True, order=">"))


def page(samples: NDArray[Any], photometric: int = RGB, **tags: tuple[int, Sequence[int]]) -> Any:
    """A page for `tiffs.file`; keywords are tags, as `t254=(4, [1])`."""
    height, width, channels = samples.shape
    fields = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8] * channels), 259: (3, [1]), 262: (3, [photometric]),
        277: (3, [channels]),
    }  # fmt: skip
    blocks = [samples[y : y + 8].astype(np.uint8).tobytes() for y in range(0, height, 8)]
    return fields | {int(tag[1:]): value for tag, value in tags.items()}, blocks, 273


LARGE, MIDDLE = drawn(3, 8), drawn(3, 8, seed=2)[:16, :16]
SMALL = drawn(3, 8, seed=1)[:8, :8]
REDUCED = (4, [1])


@pytest.mark.parametrize(
    "pages",
    [
        [page(SMALL, t254=REDUCED), page(LARGE)],
        [page(SMALL, t255=(3, [2])), page(LARGE, t255=(3, [1]))],
        [page(SMALL, t254=REDUCED), page(MIDDLE), page(LARGE)],
        [page(SMALL[..., :1], 4, t254=(4, [4])), page(LARGE)],
        [page(LARGE), page(SMALL, t254=REDUCED)],
        [page(LARGE, t254=(4, [2])), page(MIDDLE, t254=(4, [2]))],
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_shows_its_page_of_full_resolution(pages: Any, order: str) -> None:
    decoded = decode_image(file(pages, order=order))
    np.testing.assert_array_equal(decoded.pixels, LARGE)
    assert decoded.frames == len(pages)


def test_tiff_whose_image_hangs_on_its_preview_shows_the_image() -> None:
    pages = [page(SMALL, t254=REDUCED), page(LARGE, t254=(4, [0]))]
    decoded = decode_image(file(pages, inner=[1]))
    np.testing.assert_array_equal(decoded.pixels, LARGE)
    assert decoded.frames == 1


def test_lonely_page_that_calls_itself_reduced_is_the_image() -> None:
    np.testing.assert_array_equal(decode(file([page(LARGE, t254=REDUCED)])), LARGE)


@pytest.mark.parametrize(
    "data",
    [
        file([page(SMALL, t50706=(1, [1, 4, 0, 0]))]),
        file([page(SMALL, t254=REDUCED), page(LARGE[..., :1], 32803)], inner=[1]),
        file([page(SMALL, t254=REDUCED), page(LARGE, 34892)], inner=[1]),
        file([page(SMALL, t254=REDUCED), page(LARGE[..., :1], 32803)]),
        file([page(SMALL), page(LARGE[..., :1], 32803)], inner=[1]),
        file([page(SMALL, t254=REDUCED, t271=(2, b"Maker\0"))]),
        file([page(LARGE[..., :1], 1, t33422=(1, [0, 1, 1, 2]))]),
        file([page(LARGE[..., :1], 32803, t259=(3, [65535]))]),
    ],
    ids=["dng", "sub-directory", "linear", "second page", "preview not marked", "previews only", "cfa", "pentax"],
)
def test_camera_raw_in_a_tiff_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(ImageCorruptError, match="camera raw"):
        decode(data)


@pytest.mark.parametrize("start", [b"II*\0\x10\0\0\0CR\x02\0", b"II*\0\x10\0\0\0IIII"])
def test_camera_raw_that_marks_its_tiff_is_refused_by_name(start: bytes) -> None:
    with pytest.raises(ImageCorruptError, match="camera raw"):
        decode(start + bytes(100))


@pytest.mark.parametrize(
    "start", [b"IIRO\x08\0\0\0", b"IIU\0\x18\0\0\0", b"FUJIFILMCCD-RAW 0201", b"\0\0\0\x18ftypcrx "]
)
def test_camera_raw_of_its_own_format_is_refused_by_name(start: bytes) -> None:
    with pytest.raises(ImageUnidentifiedError, match="camera raw"):
        decode(start + bytes(100))


def test_targa_is_not_called_a_cursor() -> None:
    for options in ({}, {"compression": "tga_rle"}):
        with pytest.raises(ImageUnidentifiedError, match="Targa"):
            decode(saved(Image.new("RGB", (16, 16)), "TGA", **options))


def saved(image: Image.Image | NDArray[Any], file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg(**options: Any) -> bytes:
    return saved(np.ascontiguousarray(drawn(3, 8)[:16, :32].astype(np.uint8)), "JPEG", quality=95, **options)


def header_at(data: bytes) -> int:
    """Where the body of a JPEG's frame header begins."""
    return next(data.index(bytes((0xFF, kind)) + b"\0") for kind in (0xC0, 0xC2) if bytes((0xFF, kind)) in data) + 4


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [(0, 12, "a JPEG of 12 bits"), (-3, 0xC3, "lossless"), (-3, 0xC9, "arithmetic"), (-3, 0xC5, "hierarchical"),
     (5, 2, "a JPEG of 2 components"), (5, 4, "header is truncated")],
)  # fmt: skip
def test_jpeg_of_a_process_that_is_not_decoded_is_refused_by_name(at: int, value: int, said: str) -> None:
    data = bytearray(jpeg())
    data[header_at(bytes(data)) + at] = value
    with pytest.raises(ImageCorruptError, match=said):
        decode(bytes(data))


def test_cmyk_jpeg_without_an_adobe_marker_is_refused() -> None:
    data = saved(Image.new("CMYK", (16, 16), (200, 10, 30, 5)), "JPEG")
    decode(data)
    with pytest.raises(ImageCorruptError, match="Adobe"):
        decode(data.replace(b"Adobe", b"Other"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_without_its_end_marker_decodes_with_a_remark(options: dict[str, Any]) -> None:
    data = jpeg(**options)
    assert data[-2:] == b"\xff\xd9" and decode_image(data).remark is None
    decoded = decode_image(data[:-2])
    np.testing.assert_array_equal(decoded.pixels, decode(data))
    assert decoded.remark == "the end marker is missing"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("missing", [1, 4, 5, 8, 30, 200])
def test_jpeg_cut_in_its_image_data_is_refused(missing: int, options: dict[str, Any]) -> None:
    with pytest.raises(ImageCorruptError):
        decode(jpeg(**options)[:-missing])


def test_progressive_jpeg_that_ends_between_scans_is_refused() -> None:
    data = jpeg(progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    tables = data.rindex(b"\xff\xc4", 0, scans[-1])
    assert tables > scans[-2]
    with pytest.raises(ImageCorruptError, match="scans are missing"):
        decode(data[:tables])


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_whose_end_marker_comes_early_is_refused_and_not_filled_with_grey(mode: str, options: Any) -> None:
    image = Image.fromarray(drawn(3, 8)[:16, :32].astype(np.uint8)).resize((64, 64)).convert(mode)
    data = saved(image, "JPEG", **options)
    decode(data)
    for cut in (data[: len(data) * 3 // 4] + b"\xff\xd9", data[: len(data) * 3 // 4] + b"\xff\xd9" + data[-100:]):
        with pytest.raises(ImageCorruptError, match="truncated in its image data"):
            decode(cut)


def test_progressive_jpeg_without_its_last_scans_is_refused_although_it_has_an_end() -> None:
    data = jpeg(progressive=True)
    with pytest.raises(ImageCorruptError, match="scans are missing"):
        decode(data[: data.rindex(b"\xff\xc4")] + b"\xff\xd9")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("behind", [b"", b"more", jpeg()])
def test_grey_jpeg_is_whole(mode: str, behind: bytes) -> None:
    data = saved(Image.new(mode, (40, 24), 128 if mode == "L" else (128,) * len(mode)), "JPEG")
    np.testing.assert_array_equal(decode(data + behind), decode(data))


def with_chunks(*chunks: bytes, after: bytes = b"") -> bytes:
    data = saved(drawn(3, 8).astype(np.uint8), "PNG")
    end = data.index(b"IEND") - 4
    return data[:33] + b"".join(chunks) + data[33:end] + after + data[end:]


def chunk(kind: bytes, body: bytes, *, sound: bool = True) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ (not sound))


LONG = zlib.compress(b"text " * 400_000)
ODD_CHUNKS = {
    "large zTXt": chunk(b"zTXt", b"note\0\0" + LONG), "large iTXt": chunk(b"iTXt", b"note\0\1\0en\0\0" + LONG),
    "large iCCP": chunk(b"iCCP", b"icc\0\0" + LONG),
    "long tEXt": chunk(b"tEXt", b"note\0" + b"x" * 3_000_000),
    "many": chunk(b"zTXt", b"a\0\0" + zlib.compress(b"t" * 900_000)) * 4,
    "checksum of text": chunk(b"tEXt", b"note\0x", sound=False),
    "checksum of time": chunk(b"tIME", bytes(7), sound=False),
    "checksum of EXIF": chunk(b"eXIf", b"II*\0", sound=False), "cut pHYs": chunk(b"pHYs", b"\0"),
    "cut gAMA": chunk(b"gAMA", b""), "damaged zTXt": chunk(b"zTXt", b"a\0\0nothing"),
    "text without key": chunk(b"tEXt", b""),
    "unknown": chunk(b"quRk", b"?", sound=False), "cut acTL": chunk(b"acTL", b"\0"), "cut fcTL": chunk(b"fcTL", b"\0"),
    "frames out of order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", struct.pack(">I", 7) + bytes(22)),
    "two billion frames": chunk(b"acTL", struct.pack(">II", 0x80000000, 0)),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_CHUNKS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_odd_metadata_does_not_cost_a_good_png(odd: str, place: str) -> None:
    data = with_chunks(ODD_CHUNKS[odd]) if place == "before" else with_chunks(after=ODD_CHUNKS[odd])
    decoded = decode_image(data)
    np.testing.assert_array_equal(decoded.pixels, drawn(3, 8))
    assert decoded.frames <= 2


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"PLTE", b"tRNS"])
def test_wrong_checksum_of_a_chunk_that_pixels_need_is_refused(kind: bytes) -> None:
    image = Image.fromarray(drawn(1, 2)[..., 0].astype(np.uint8)).convert("P")
    image.putpalette(bytes(range(12)))
    data = bytearray(saved(image, "PNG", transparency=1))
    at = data.index(kind)
    data[at + 4 + int.from_bytes(data[at - 4 : at], "big")] ^= 1
    with pytest.raises(ImageCorruptError, match=f"checksum in {kind.decode()}"):
        decode(bytes(data))


def png_of_palette(*chunks: bytes, rows: int = 4, interlaced: bool = False) -> bytes:
    """4 × 4 px of the second of four colours, with only so many rows of image data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 2, 3, 0, 0, interlaced))
    names = {b"image": chunk(b"IDAT", zlib.compress(b"\0\x55" * rows)), b"end": chunk(b"IEND", b"")}
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(names.get(one, one) for one in chunks)


PLTE, TRNS = chunk(b"PLTE", bytes(range(12))), chunk(b"tRNS", b"\0\0\0\0")


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ((b"image", b"end"), "without its palette"),
        ((PLTE, chunk(b"PLTE", bytes(12)), b"image", b"end"), "PLTE twice"),
        ((b"image", PLTE, b"end"), "after its image data"),
        ((PLTE, b"image", TRNS, b"end"), "tRNS twice, or after"),
        ((TRNS, PLTE, b"image", b"end"), "tRNS before its palette"),
    ],
)
def test_png_whose_palette_or_transparency_is_out_of_place_is_refused(chunks: tuple[bytes, ...], said: str) -> None:
    assert decode(png_of_palette(PLTE, b"image", b"end"))[0, 0].tolist() == [3, 4, 5]
    with pytest.raises(ImageCorruptError, match=said):
        decode(png_of_palette(*chunks))


@pytest.mark.parametrize("end", [chunk(b"IEND", b"", sound=False), chunk(b"IEND", b"")[:-2], b""])
def test_damaged_end_does_not_cost_a_good_png(end: bytes) -> None:
    np.testing.assert_array_equal(decode(png_of_palette(PLTE, b"image", end)), np.full((4, 4, 3), (3, 4, 5)))


@pytest.mark.parametrize(("interlaced", "whole"), [(False, 4), (True, 7)])
def test_png_whose_image_data_end_early_is_refused_and_not_filled_with_black(interlaced: bool, whole: int) -> None:
    decode(png_of_palette(PLTE, b"image", b"end", rows=whole, interlaced=interlaced))
    with pytest.raises(ImageCorruptError):
        decode(png_of_palette(PLTE, b"image", b"end", rows=whole - 1, interlaced=interlaced))
    np.testing.assert_array_equal(decode(saved(Image.new("L", (37, 21)), "PNG")), np.zeros((21, 37, 3)))


@pytest.mark.parametrize(("depth", "colour"), [(3, 0), (4, 2), (16, 3), (8, 1)])
def test_png_of_a_depth_that_the_format_does_not_have_is_refused_by_name(depth: int, colour: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, colour, 0, 0, 0))
    with pytest.raises(ImageCorruptError, match=f"colour type {colour} with {depth} bits"):
        decode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [2, 4])
def test_transparent_grey_of_few_bits_is_the_one_that_is_named(bits: int) -> None:
    samples = np.tile(np.arange(1 << bits), (1 << bits, 1))[..., None]
    rows = b"".join(b"\0" + packed(row[None], bits, 1, "<") for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1 << bits, 1 << bits, bits, 0, 0, 0, 0))
    trns = chunk(b"tRNS", struct.pack(">H", 1))
    data = b"\x89PNG\r\n\x1a\n" + header + trns + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    expected = samples * 255 // ((1 << bits) - 1)
    expected[samples == 1] = 255
    np.testing.assert_array_equal(decode(data), np.repeat(expected, 3, axis=2))


@pytest.mark.parametrize(
    ("mode", "options", "said"),
    [("L", {"signed": True}, "signed"), ("CMYK", {}, "colour space 12")],
)
def test_jpeg_2000_of_signed_samples_or_other_colours_is_refused(mode: str, options: Any, said: str) -> None:
    with pytest.raises(ImageCorruptError, match=said):
        decode(saved(Image.new(mode, (32, 32)), "JPEG2000", **options))


@pytest.mark.parametrize("steps", [b"\2\1", b"\1\2"])
def test_jpeg_2000_of_subsampled_components_is_refused(steps: bytes) -> None:
    data = bytearray(saved(Image.new("RGB", (32, 32)), "JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51") + 42 + 4
    data[at : at + 2] = steps
    with pytest.raises(ImageCorruptError, match="subsampled"):
        decode(bytes(data))


def test_first_frame_smaller_than_its_gif_lies_on_white() -> None:
    frame = Image.fromarray(drawn(1, 4)[..., 0].astype(np.uint8)).convert("P")
    frame.putpalette(bytes(range(48)))
    data = bytearray(saved(frame, "GIF"))
    struct.pack_into("<HH", data, 6, 60, 50)
    at = data.index(b",", 13 + (3 << (data[10] & 7) + 1))
    struct.pack_into("<HH", data, at + 1, 10, 5)
    pixels = decode(bytes(data))
    assert pixels.shape == (50, 60, 3)
    np.testing.assert_array_equal(pixels[5:26, 10:47], np.asarray(frame.convert("RGB")))
    pixels[5:26, 10:47] = 255
    assert (pixels == 255).all()


def test_first_frame_smaller_than_its_webp_lies_on_white() -> None:
    whole = Image.new("RGB", (40, 40), (10, 200, 30))
    data = bytearray(saved(whole, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 40))], lossless=True))
    data[24:27], data[27:30] = (59).to_bytes(3, "little"), (49).to_bytes(3, "little")
    at = data.index(b"ANMF") + 8
    data[at : at + 6] = (5).to_bytes(3, "little") + (3).to_bytes(3, "little")
    pixels = decode(bytes(data))
    assert pixels.shape == (50, 60, 3) and (pixels[6:46, 10:50] == (10, 200, 30)).all()
    pixels[6:46, 10:50] = 255
    assert (pixels == 255).all()


def dds(
    width: int, height: int, *, flags: int, code: bytes = bytes(4), bits: int = 0, caps: int = 0, more: bytes = b""
) -> bytes:
    head = struct.pack("<7I", 124, 0x1007, height, width, 0, 0, 0) + bytes(44)
    masks = {16: (0xF800, 0x7E0, 0x1F, 0), 32: (0x3FF00000, 0xFFC00, 0x3FF, 0)}.get(bits, (0, 0, 0, 0))
    return (
        b"DDS "
        + head
        + struct.pack("<II4s5I", 32, flags, code, bits, *masks)
        + struct.pack("<5I", 0x1000, caps, 0, 0, 0)
        + more
    )


@pytest.mark.parametrize("bits", [16, 32])
def test_dds_of_masks_has_the_samples_that_they_leave(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (6, 9), dtype=np.uint64)
    shares = {16: ((11, 31), (5, 63), (0, 31)), 32: ((20, 1023), (10, 1023), (0, 1023))}[bits]
    expected = np.stack([(values >> shift & top) / top * 255 for shift, top in shares], axis=2)
    data = dds(9, 6, flags=0x40, bits=bits, more=values.astype(f"<u{bits // 8}").tobytes())
    assert np.abs(decode(data) - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [({"flags": 4, "code": b"ATI2"}, "two channels"), ({"flags": 0x40, "bits": 16, "caps": 0xFE00}, "faces"),
     ({"flags": 4, "code": b"DX10", "more": struct.pack("<5I", 95, 3, 0, 1, 0)}, "floating-point"),
     ({"flags": 4, "code": b"DX10", "more": struct.pack("<5I", 98, 3, 4, 1, 0)}, "faces"),
     ({"flags": 0x40, "bits": 16}, "truncated"), ({"flags": 0x40, "bits": 0}, "0 bits")],
)  # fmt: skip
def test_dds_that_is_no_flat_image_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ImageCorruptError, match=said):
        decode(dds(64, 64, **options))


def bits_of(block: bytes, at: int, count: int) -> int:
    return int.from_bytes(block, "little") >> at & (1 << count) - 1


def colours_of_bc1(block: bytes, always_four: bool) -> NDArray[Any]:
    """16 × RGBA of a block: two colours of 5, 6 and 5 bits, and what lies between them."""
    first, last, _ = struct.unpack("<HHI", block)
    one, two = (np.array([c >> 11, c >> 5 & 63, c & 31, 1]) / (31, 63, 31, 1) * 255 for c in (first, last))
    between = [(2 * one + two) / 3, (one + 2 * two) / 3] if always_four or first > last else [(one + two) / 2, 0 * one]
    return np.stack([one, two, *between])[[bits_of(block, 32 + 2 * at, 2) for at in range(16)]]


def levels_of_bc4(block: bytes) -> NDArray[Any]:
    """16 levels of a block: two levels, and what lies between them."""
    one, two, steps = block[0], block[1], 7 if block[0] > block[1] else 5
    between = [(one * (steps - at) + two * at) / steps for at in range(1, steps)]
    table = [one, two, *between, *([] if steps == 7 else [0, 255])]
    return np.array([table[bits_of(block, 16 + 3 * at, 3)] for at in range(16)])


def colours_of_bc7(block: bytes) -> NDArray[Any]:
    """16 × RGBA of a block of mode 6: two colours of 4 × 7 bits and one that they share, 16 weights of 4 bits."""
    weights = (0, 4, 9, 13, 17, 21, 26, 30, 34, 38, 43, 47, 51, 55, 60, 64)
    one, two = (
        np.array([bits_of(block, 7 + 7 * (2 * c + end), 7) * 2 + bits_of(block, 63 + end, 1) for c in range(4)])
        for end in (0, 1)
    )
    places = [(65, 3), *((68 + 4 * at, 4) for at in range(15))]
    return np.stack([(one * (64 - w) + two * w + 32) >> 6 for w in (weights[bits_of(block, *at)] for at in places)])


@pytest.mark.parametrize("kind", ["DXT1", "DXT3", "DXT5", "ATI1", "BC7"])
def test_dds_of_blocks_has_the_colours_that_they_stand_for(kind: str) -> None:
    pixels, blocks = np.empty((8, 12, 3)), []
    for at, block in enumerate(np.random.default_rng(0).bytes(16) for _ in range(6)):
        rgba = np.full((16, 4), 255.0)
        if kind == "DXT1":
            block = block[:8]
            rgba = colours_of_bc1(block, always_four=False)
        elif kind == "ATI1":
            block = block[:8]
            rgba[:, :3] = levels_of_bc4(block)[:, None]
        elif kind == "BC7":
            block = bytes([block[0] & 0x80 | 0x40]) + block[1:]
            rgba = colours_of_bc7(block)
        else:
            rgba = colours_of_bc1(block[8:], always_four=True)
            four_bits = np.array([bits_of(block, 4 * at, 4) for at in range(16)]) * 17
            rgba[:, 3] = four_bits if kind == "DXT3" else levels_of_bc4(block[:8])
        alpha = rgba[:, 3:] / 255
        y, x = divmod(at, 3)
        pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = (rgba[:, :3] * alpha + 255 * (1 - alpha)).reshape(4, 4, 3)
        blocks.append(block)
    if kind == "BC7":
        blocks.insert(0, struct.pack("<5I", 98, 3, 0, 1, 0))
    code = b"DX10" if kind == "BC7" else kind.encode()
    assert np.abs(decode(dds(12, 8, flags=4, code=code, more=b"".join(blocks))) - pixels).max() <= 1.5


def psd(samples: NDArray[Any], mode: int, bits: int = 8, *, packbits: bool = False) -> bytes:
    height, width, channels = samples.shape
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, channels, height, width, bits, mode) + bytes(12)
    rows = [samples[y, :, at].astype(np.uint8).tobytes() for at in range(channels) for y in range(height)]
    if not packbits:
        return head + b"\0\0" + b"".join(rows)
    short = [compressed(row, PACKBITS) for row in rows]
    return head + b"\0\1" + struct.pack(f">{len(rows)}H", *map(len, short)) + b"".join(short)


@pytest.mark.parametrize("packbits", [False, True])
def test_photoshop_file_shows_its_merged_colours(packbits: bool) -> None:
    samples = drawn(4, 8)
    np.testing.assert_array_equal(decode(psd(samples[..., :3], 3, packbits=packbits)), samples[..., :3])
    np.testing.assert_array_equal(decode(psd(samples, 3, packbits=packbits)), samples[..., :3])  # on white already
    light = samples / 255 * samples[..., 3:]
    assert np.abs(decode(psd(samples, 4, packbits=packbits)) - light[..., :3]).max() <= 1
    grey = np.repeat(samples[..., :1], 3, axis=2)
    np.testing.assert_array_equal(decode(psd(samples[..., :1], 1, packbits=packbits)), grey)


def lab(colours: NDArray[Any]) -> NDArray[Any]:
    """sRGB in 0 to 255 as L*a*b* of D50, by the formulas of ICC and the matrix of sRGB adapted to D50."""
    share = colours / 255
    linear = np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    matrix = [[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
    x, y, z = np.moveaxis(np.cbrt(linear @ np.transpose(matrix) / (0.9642, 1.0, 0.8249)), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def test_lab_has_the_colours_that_its_numbers_mean() -> None:
    colours = np.random.default_rng(0).integers(60, 200, (8, 8, 3))  # light enough for the cube root's part
    values = lab(colours)
    lightness, both = np.round(values[..., :1] * 2.55).astype(int), np.round(values[..., 1:]).astype(int)
    photoshop = psd(np.concatenate([lightness, both + 128], axis=2), 9)
    page = tiff(np.concatenate([lightness, both & 255], axis=2), 8, 8)
    for data in (photoshop, page):
        assert np.abs(decode(data) - colours).max() <= 4


@pytest.mark.parametrize(("mode", "bits"), [(0, 1), (7, 8), (3, 16), (3, 32), (1, 16)])
def test_photoshop_file_of_other_depths_or_modes_is_refused(mode: int, bits: int) -> None:
    with pytest.raises(ImageCorruptError, match=f"{bits} bits"):
        decode(psd(drawn(3, 8), mode, bits))


def test_icon_shows_its_largest_image_of_most_colours() -> None:
    images = [Image.new("RGBA", (side, side), (side, 0, 0, 255)) for side in (16, 48, 32)]
    data = saved(images[1], "ICO", sizes=[(16, 16), (48, 48), (32, 32)], append_images=images)
    assert (decode(data) == (48, 0, 0)).all() and decode(data).shape == (48, 48, 3)
    poor, rich = (saved(Image.new(mode, (16, 16), colour), "PNG") for mode, colour in (("1", 1), ("RGB", (9, 8, 7))))
    head = struct.pack("<HHH", 0, 1, 2)
    for bits, inner in ((1, poor), (32, rich)):
        head += struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, bits, len(inner), 38 + (len(poor) if inner is rich else 0))
    assert (decode(head + poor + rich) == (9, 8, 7)).all()


def test_bitmap_whose_alpha_is_empty_is_opaque() -> None:
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 56, 2, 1, 1, 32, 3, 0, 0, 0, 0, 0) + masks
    start = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(header)) + header
    np.testing.assert_array_equal(decode(start + b"\1\2\3\0" * 2), [[[3, 2, 1]] * 2])
    np.testing.assert_array_equal(decode(start + b"\1\2\3\0\1\2\3\xff"), [[[255] * 3, [3, 2, 1]]])


def test_run_length_coded_bitmap_has_the_pixels_of_its_commands() -> None:
    palette = b"".join(bytes((level, level * 2 % 256, 7, 0)) for level in range(256))
    body = b"\3\x05\0\0" + b"\0\3abc\0" + b"\1\x09\0\0" + b"\0\2\1\0" + b"\3\x06" + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, 4, 3, 1, 8, 1, len(body), 0, 0, 256, 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + palette + body
    indices = np.array([[0, 6, 6, 6], [97, 98, 99, 9], [5, 5, 5, 0]])
    expected = np.stack([np.full((3, 4), 7), indices * 2 % 256, indices], axis=2)
    np.testing.assert_array_equal(decode(data), expected)
    with pytest.raises(ImageCorruptError):
        decode(data[:-4])


@pytest.mark.parametrize(("top", "bits"), [(100, 8), (254, 8), (1000, 16), (65535, 16)])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("colour", [False, True])
def test_portable_map_is_scaled_by_its_greatest_sample(top: int, bits: int, plain: bool, colour: bool) -> None:
    samples = np.random.default_rng(0).integers(0, top + 1, (5, 7, 3 if colour else 1))
    kind = {(False, False): 5, (False, True): 6, (True, False): 2, (True, True): 3}[plain, colour]
    head = b"P%d # made by hand\n7 5\n%d\n" % (kind, top)
    body = (
        " ".join(map(str, samples.ravel())).encode()
        if plain
        else samples.astype(">u2" if bits == 16 else "u1").tobytes()
    )
    expected = samples / top * 255 if colour else np.repeat(samples, 3, axis=2) / top * 255
    assert np.abs(decode(head + body) - expected).max() <= 1
    with pytest.raises(ImageError):
        decode(head + body[: len(body) // 2])


@pytest.mark.parametrize("body", [b"0110\n1001", b"0 1 1 0 1 0 0 1", b"01#ink\n101001"])
def test_bitmap_in_digits_is_black_where_it_is_inked(body: bytes) -> None:
    ink = np.array([[0, 1, 1, 0], [1, 0, 0, 1]]) if b"#" not in body else np.array([[0, 1, 1, 0], [1, 0, 0, 1]])
    np.testing.assert_array_equal(decode(b"P1 4 2\n" + body), np.repeat((1 - ink[..., None]) * 255, 3, axis=2))


def test_qoi_of_every_code_has_its_pixels() -> None:
    down = np.arange(64)[:, None]
    right = np.arange(64)[None, :]
    smooth = np.stack([down + right, (down * 2 + right) % 256, 255 - right + 0 * down, 255 - down + 0 * right], axis=2)
    noisy = drawn(4, 8)
    flat = np.zeros((40, 40, 4))
    flat[10:20, 5:] = (200, 100, 50, 255)
    for samples in (smooth, noisy, flat):
        samples = samples.astype(np.uint8)
        alpha = samples[..., 3:] / 255
        pixels = decode(saved(samples, "QOI"))
        assert np.abs(pixels - (samples[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
        opaque = np.ascontiguousarray(samples[..., :3])
        np.testing.assert_array_equal(decode(saved(opaque, "QOI")), opaque)


def test_sgi_image_of_16_bits_keeps_its_high_bytes() -> None:
    samples = drawn(3, 8).astype(np.uint8)
    np.testing.assert_array_equal(decode(saved(samples, "SGI", bpc=2)), samples)


@pytest.mark.parametrize("bits", [8, 16])
def test_sgi_image_of_runs_has_the_samples_that_they_stand_for(bits: int) -> None:
    samples = drawn(3, bits)
    samples[:, 10:20] = samples[:, 10:11]
    height, width, _ = samples.shape
    kind = f">u{bits // 8}"
    rows = []
    for channel, y in itertools.product(range(3), range(height - 1, -1, -1)):  # from the bottom to the top
        row = samples[y, :, channel]
        runs = [[0x80 | 10, *row[:10]], [10, row[10]], [0x80 | width - 20, *row[20:]], [0]]
        rows.append(b"".join(np.array(run, kind).tobytes() for run in runs))
    starts = np.cumsum([512 + 8 * len(rows), *map(len, rows)])[:-1]
    head = struct.pack(">HBBHHHHII", 474, 1, bits // 8, 3, width, height, 3, 0, (1 << bits) - 1).ljust(512, b"\0")
    tables = np.array([starts, [len(row) for row in rows]], ">u4").tobytes()
    np.testing.assert_array_equal(decode(head + tables + b"".join(rows)), samples >> bits - 8)


def test_formats_of_the_table_in_the_docs_are_those_that_are_decoded() -> None:
    table = (Path(__file__).parents[2] / "docs/reference/images.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert {name for row in rows for name in row.split(", ") if name in FORMATS} == set(FORMATS)


REPORTED = {
    "jpeg12.jpg": "a JPEG of 12 bits", "raw.dng": "camera raw", "tif_16rgb_planar.tif": "planes",
    "tif_float_neg.tif": "the value of black is unknown",
}  # fmt: skip


def test_reported_files_have_the_outcome_of_their_table() -> None:
    if not REPORTS.is_dir():
        pytest.skip(f"{REPORTS} is not here")
    reference = decode((REPORTS / "reference.png").read_bytes()).astype(int)
    grey = np.asarray(Image.fromarray(reference.astype(np.uint8)).convert("L")).astype(int)
    for path in REPORTS.iterdir():
        if path.name in REPORTED:
            with pytest.raises(ImageCorruptError, match=REPORTED[path.name]):
                decode(path.read_bytes())
            continue
        decoded = decode_image(path.read_bytes())
        assert (decoded.remark is not None) == (path.name == "jpeg_no_eoi.jpg")
        if path.name == "gif_small_first_frame.gif":
            assert (decoded.pixels[:30] == 255).all() and (decoded.pixels[100:] == 255).all()
        elif path.name == "tif_u32.tif":
            assert np.abs(decoded.pixels[..., 0] - grey).max() == 0
        else:
            assert np.abs(decoded.pixels - reference).mean() <= (6 if path.suffix == ".jpg" else 0), path.name
