"""What a file says about its origin: signed, altered, hostile and plain files, made here. Cost: 6 s."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest
from PIL import Image, PngImagePlugin

from nsnet import provenance
from nsnet.errors import ConfigError
from nsnet.preparation import PreparationConfig, prepare
from nsnet.provenance import Provenance, completed, read
from tests.support import credentials
from tests.support.credentials import GENERATED, edited, expired, picture, signed, signer, transplanted

MEDIA: Final = "trainedAlgorithmicMedia"


def changed(data: bytes, at: int) -> bytes:
    """The file with one bit of a byte changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def xmp(properties: str, before: str = "") -> bytes:
    return (
        f'{before}<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:I="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        f' xmlns:p="http://ns.adobe.com/photoshop/1.0/" {properties}</rdf:RDF></x:xmpmeta>'
    ).encode()


def with_text(**texts: str) -> bytes:
    """A PNG with these texts."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    return picture("PNG", pnginfo=info)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG with this chunk before its image data."""
    data = picture("PNG")
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk(kind, body) + data[at:]


def store(size: int) -> bytes:
    """A C2PA store of this many bytes whose boxes are right and whose content is none."""
    label = bytes.fromhex("6332706100110010800000AA00389B71") + b"\x03c2pa\0"
    description = struct.pack(">I", 8 + len(label)) + b"jumd" + label
    free = size - 16 - len(description)
    return struct.pack(">I", size) + b"jumb" + description + struct.pack(">I", free + 8) + b"free" + bytes(free)


def exif_comment(text: str) -> bytes:
    """A JPEG whose EXIF comment is this text, as generators write it."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    return picture(exif=exif)


def software(name: str) -> bytes:
    exif = Image.Exif()
    exif[0x0131] = name
    return picture(exif=exif)


# 1. Content credentials.

SIGNED: Final[dict[str, tuple[Callable[[], bytes], Provenance]]] = {
    "none": (picture, Provenance()),
    "valid": (lambda: signed(picture()), Provenance(c2pa_state="valid")),
    "valid PNG": (lambda: signed(picture("PNG"), "image/png"), Provenance(c2pa_state="valid")),
    "valid WebP": (lambda: signed(picture("WEBP"), "image/webp"), Provenance(c2pa_state="valid")),
    "valid AVIF": (lambda: signed(picture("AVIF"), "image/avif"), Provenance(c2pa_state="valid")),
    "untrusted": (lambda: signed(picture(), by=signer("stranger")), Provenance(c2pa_state="untrusted")),
    "other bytes": (lambda: changed(signed(picture()), -40), Provenance(c2pa_state="invalid")),
    "of another image": (
        lambda: transplanted(signed(picture()), picture(quality=50)),
        Provenance(c2pa_state="invalid"),
    ),
    "expired": (lambda: expired(picture()), Provenance(c2pa_state="invalid")),
    "forged signature": (
        lambda: changed(made := signed(picture()), credentials.end_of_store(made) - 20),
        Provenance(c2pa_state="invalid"),
    ),
    "damaged box of the signature": (
        lambda: changed(made := signed(picture()), made.index(b"c2pa.signature") + 400),
        Provenance(c2pa_state="error"),
    ),
    "cut store": (lambda: with_chunk(b"caBX", store(4000)[:1000]), Provenance(c2pa_state="error")),
    "empty store": (lambda: with_chunk(b"caBX", store(4000)), Provenance(c2pa_state="error")),
    "store of 50 MB": (lambda: with_chunk(b"caBX", store(50_000_000)), Provenance(c2pa_state="error")),
    "marks alone": (lambda: picture() + b"jumb c2pa", Provenance()),
}
"""File -> its credentials, with the first signer trusted; signed files name Painter and their digital source type."""


@pytest.mark.parametrize("name", SIGNED)
def test_state_of_credentials(name: str) -> None:
    make, expected = SIGNED[name]
    data = make()
    found = completed(read(data), data, signer().anchors)
    if expected.c2pa_state in ("valid", "untrusted"):
        expected = replace(expected, c2pa_generator="Painter 3", digital_source_type=MEDIA)
    assert found == expected


def test_without_a_trust_list_no_signer_is_trusted() -> None:
    data = signed(picture())
    assert completed(read(data), data).c2pa_state == "untrusted"  # type: ignore[union-attr]


def test_edited_image_has_the_source_type_of_what_it_was_made_from() -> None:
    data = edited(picture(quality=60), signed(picture()))
    found = completed(read(data), data, signer().anchors)
    assert found == Provenance(c2pa_state="valid", c2pa_generator="Editor", digital_source_type=MEDIA)


def test_generator_of_a_manifest_is_short_and_printable() -> None:
    data = signed(picture(), claim_generator_info=[{"name": "\x1b[31mEvil\n" + 500 * "x", "version": "1"}])
    found = completed(read(data), data)
    assert found is not None and found.c2pa_generator is not None
    assert found.c2pa_generator.startswith("[31mEvil xxx") and len(found.c2pa_generator) == provenance.MAX_TEXT


def test_signed_source_type_counts_before_that_of_xmp() -> None:
    packet = xmp('I:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"/>')
    data = signed(picture(xmp=packet))
    assert read(data).digital_source_type == "digitalCapture"
    assert completed(read(data), data).digital_source_type == MEDIA  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no certificate", "list.pem holds no certificate in PEM"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "list.pem is not a usable trust list"),
    ],
)
def test_trust_list_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        provenance.check_anchors(text, "list.pem")
    provenance.check_anchors(signer().anchors, "list.pem")


# 2. Metadata.


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        (f'I:DigitalSourceType="{GENERATED}"/>', MEDIA),
        (f"><I:DigitalSourceType>{GENERATED}</I:DigitalSourceType></rdf:Description>", MEDIA),
        (f'><I:DigitalSourceType rdf:resource="{GENERATED}"/></rdf:Description>', MEDIA),
        (f"><!-- {GENERATED} --></rdf:Description>", None),
        ('I:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/nonsense"/>', None),
        ('I:DigitalSourceType="https://example.org/trainedAlgorithmicMedia"/>', None),
        (f'p:DigitalSourceType="{GENERATED}"/>', None),  # another namespace
    ],
)
def test_digital_source_type_of_xmp(properties: str, expected: str | None) -> None:
    for data in (picture(xmp=xmp(properties)), picture("WEBP", xmp=xmp(properties))):
        assert read(data).digital_source_type == expected


BOMB: Final = "<!DOCTYPE x [" + "".join(
    f'<!ENTITY e{i} "{10 * f"&e{i - 1};" if i else "boom"}">' for i in range(12)
) + "]>"  # fmt: skip


@pytest.mark.parametrize(
    "packet",
    [
        xmp("/>")[:-20], xmp('I:DigitalSourceType="&e11;"/>', ""), b"<x:xmpmeta>" + b"<a>" * 200_000 + b"</x:xmpmeta>",
        b"<x:xmpmeta>" + BOMB.encode() + b"<a>&e11;</a></x:xmpmeta>",
        b"<x:xmpmeta>" + b"a" * (2 << 20) + b"</x:xmpmeta>", b"<x:xmpmeta>\xff\xfe\0</x:xmpmeta>",
    ],
    ids=["cut", "entity", "deep", "bomb", "long", "no UTF-8"],
)  # fmt: skip
def test_hostile_xmp_says_nothing(packet: bytes) -> None:
    assert read(picture() + packet) == Provenance()


def test_entities_are_not_expanded() -> None:
    """A packet may not begin with a document type, but what an attacker appends need not be a packet."""
    assert provenance._properties(BOMB.encode() + b"<x>&e11;</x>") == []


GENERATORS: Final[dict[str, tuple[Callable[[], bytes], str | None]]] = {
    "web UI, PNG": (lambda: with_text(parameters="a cat\nSteps: 20, Sampler: Euler a"), "Stable Diffusion web UI"),
    "web UI, JPEG": (lambda: exif_comment("a cat\nSteps: 20, Sampler: Euler a"), "Stable Diffusion web UI"),
    "ComfyUI": (lambda: with_text(prompt='{"3": {"class_type": "KSampler"}}', workflow="{}"), "ComfyUI"),
    "InvokeAI": (lambda: with_text(invokeai_metadata="{}"), "InvokeAI"),
    "NovelAI": (lambda: with_text(Software="NovelAI", Source="NovelAI Diffusion V4"), "NovelAI"),
    "Midjourney": (lambda: with_text(Description="a cat --v 7 Job ID: 0a1b2c3d-1111-2222"), "Midjourney"),
    "Firefly": (lambda: picture(xmp=xmp('xmp:CreatorTool="Adobe Firefly"/>')), "Adobe Firefly"),
    "Google": (lambda: picture(xmp=xmp('p:Credit="Made with Google AI"/>')), "Google AI"),
    "DALL-E": (lambda: software("DALL-E 3"), "DALL-E"),
    "compressed": (
        lambda: with_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"Steps: 20, Sampler: Euler")),
        "Stable Diffusion web UI",
    ),
    "compressed iTXt": (
        lambda: with_chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(b"Steps: 20, Sampler: Euler")),
        "Stable Diffusion web UI",
    ),
    "plain iTXt": (lambda: with_chunk(b"iTXt", b"x\0\0\0\0\0Steps: 20, Sampler: Euler"), "Stable Diffusion web UI"),
    "bomb": (lambda: with_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(4_000_000))), None),
    "damaged": (lambda: with_chunk(b"zTXt", b"parameters\0\0no zlib"), None),
    "camera": (lambda: software("Adobe Photoshop 26.1"), None),
    "a word in a name": (lambda: with_text(Title="The midjourneyman, a stable diffusion of gases"), None),
}  # fmt: skip
"""File -> the generator that its metadata name."""


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_of_metadata(name: str) -> None:
    make, expected = GENERATORS[name]
    prepared = prepare(make(), PreparationConfig(provenance=True))
    assert prepared.provenance is not None and prepared.provenance.metadata_generator == expected


def test_every_name_of_a_generator_is_one_that_a_parent_accepts() -> None:
    assert {expected for _, expected in GENERATORS.values()} - {None} <= provenance.GENERATORS


def test_provenance_is_read_only_if_it_is_wanted_and_changes_no_pixel() -> None:
    data = signed(picture())
    with_it, without = (prepare(data, PreparationConfig(provenance=wanted)) for wanted in (True, False))
    assert without.provenance is None and with_it.provenance == Provenance(c2pa_state=None)
    assert (with_it.patches[0] == without.patches[0]).all()


def test_image_in_memory_has_no_file_to_tell() -> None:
    image = Image.open(io.BytesIO(credentials.picture()))
    assert prepare(image, PreparationConfig(provenance=True)).provenance is None
