"""Reads what a file says about its origin: content credentials, IPTC's digital source type, traces of generators.

These are claims of the file, not estimates: they never change a score. Only a signature (`c2pa_state` valid) is more
than a claim; metadata can be removed and forged by anyone.

Sources: content credentials are C2PA 2.2 (https://spec.c2pa.org); digital source types are IPTC NewsCodes; XMP packets
are found by scanning, as XMP specification part 3 allows. Input may be hostile: nothing is fetched, and no XML entity
is expanded.
"""

import functools
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from xml.parsers import expat

from PIL import Image

from nsnet import png, samples
from nsnet.errors import ConfigError, ImageError

NONE, VALID, UNTRUSTED, INVALID, ERROR = "none", "valid", "untrusted", "invalid", "error"
STATES: Final = {"Trusted": VALID, "Valid": UNTRUSTED, "Invalid": INVALID}
"""States of the C2PA library -> `c2pa_state`."""
ALL_STATES: Final = (NONE, *STATES.values(), ERROR)
MEANINGS: Final[Mapping[str, str]] = {
    VALID: "signed by a trusted signer, and the content is unaltered",
    UNTRUSTED: "signed, and the content is unaltered, but the signer is on no trust list that was given",
    INVALID: "altered after it was signed, expired, or wrongly signed",
    ERROR: "unreadable",
}
MARKS: Final = (b"jumb", b"c2pa")
"""Every embedded C2PA store contains both: type of its outer box, and label of that box."""
MAX_TEXT: Final = 100
"""Longest text of a claim in characters; the rest is cut."""
MAX_PACKET_BYTES: Final = 1 << 20
MAX_PACKETS: Final = 4
"""XMP packets that are read, and the most bytes of each."""
MAX_TEXTS: Final = 64
MAX_TEXT_BYTES: Final = 1 << 16
"""Texts of PNG chunks that are read, and the most bytes of each."""
MAX_INGREDIENTS: Final = 16
"""Manifests that are followed from an image to what it was made from."""
PACKET: Final = (b"<x:xmpmeta", b"</x:xmpmeta>")
SOURCE_TYPE: Final = re.compile(r"https?://cv\.iptc\.org/newscodes/digitalsourcetype/(\w+)/?")
SOURCE_TYPES: Final = frozenset(
    "algorithmicMedia algorithmicallyEnhanced composite compositeCapture compositeSynthetic "
    "compositeWithTrainedAlgorithmicMedia computationalCapture dataDrivenMedia digitalArt digitalCapture "
    "digitalCreation humanEdits minorHumanEdits multiFrameComputationalCapture negativeFilm positiveFilm print "
    "screenCapture softwareImage trainedAlgorithmicMedia virtualRecording".split()
)  # fmt: skip
"""IPTC's terms, including retired ones."""
IPTC: Final = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/ DigitalSourceType"
TOOL: Final = "http://ns.adobe.com/xap/1.0/ CreatorTool"
CREDIT: Final = "http://ns.adobe.com/photoshop/1.0/ Credit"
RESOURCE: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns# resource"
SOFTWARE, DESCRIPTION, EXIF_IFD, COMMENT = 0x0131, 0x010E, 0x8769, 0x9286
"""Tags of EXIF."""

KEYS: Final[Mapping[str, str]] = {
    "invokeai_metadata": "InvokeAI", "invokeai_graph": "InvokeAI", "sd-metadata": "InvokeAI", "Dream": "InvokeAI",
    "fooocus_scheme": "Fooocus", "sui_image_params": "SwarmUI", "workflow": "ComfyUI",
}  # fmt: skip
"""Keyword of a PNG text -> the generator that writes it."""
WORDS: Final[tuple[tuple[str, str], ...]] = (
    (r"\bsui_image_params\b", "SwarmUI"),
    (r"\bComfyUI\b|\"class_type\"\s*:\s*\"", "ComfyUI"),
    (r"\bInvokeAI\b", "InvokeAI"),
    (r"\bFooocus\b", "Fooocus"),
    (r"\bNovelAI\b", "NovelAI"),
    (r"\bSteps: \d+, Sampler: ", "Stable Diffusion web UI"),
    (r"\bMidjourney\b|\bJob ID: [0-9a-f]{8}-", "Midjourney"),
    (r"\bDALL[-·]?E\b", "DALL-E"),
    (r"\bOpenAI\b|\bChatGPT\b", "OpenAI"),
    (r"\bAdobe Firefly\b", "Adobe Firefly"),
    (r"\bMade with Google AI\b", "Google AI"),
    (r"\bStable ?Diffusion\b", "Stable Diffusion"),
    (r"\bLeonardo\.?AI\b", "Leonardo AI"),
    (r"\bIdeogram\b", "Ideogram"),
)
"""Pattern in a text that a generator writes -> its name. The first that matches counts."""
GENERATORS: Final = frozenset({*KEYS.values(), *(name for _, name in WORDS)})
PATTERNS: Final = tuple((re.compile(pattern), name) for pattern, name in WORDS)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a file says about its origin."""

    c2pa_state: str | None = NONE
    """Content credentials: none; valid (signature and content agree, the signer is on the trust list); untrusted (as
    valid, but the signer is not on the list); invalid (altered content, expired or wrong signature); error
    (unreadable). None: there are some, and they have not been read."""
    c2pa_generator: str | None = None
    """Software that the signed manifest names; None: none, or `c2pa_state` is invalid or error."""
    digital_source_type: str | None = None
    """IPTC's term, such as `trainedAlgorithmicMedia`, of the signed manifest, else of XMP."""
    metadata_generator: str | None = None
    """Generator that wrote PNG texts, EXIF or XMP."""

    @property
    def names_generator(self) -> bool:
        """Whether the file itself says that it was generated."""
        return self.metadata_generator is not None or self.digital_source_type in GENERATED


GENERATED: Final = frozenset({"trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "algorithmicMedia"})
"""Digital source types of media that a model made, in whole or in part."""


def exif_texts(image: Image.Image) -> tuple[str, ...]:
    """Texts of an opened image's EXIF in which generators leave traces; empty if EXIF is damaged."""
    try:
        exif = image.getexif()
        found = [exif.get(SOFTWARE), exif.get(DESCRIPTION)]
        if EXIF_IFD in exif:
            found.append(exif.get_ifd(EXIF_IFD).get(COMMENT))
    except Exception:  # EXIF parsers raise struct.error, SyntaxError, ValueError and more
        return ()
    return tuple(_decoded(text) for text in found if isinstance(text, str | bytes))


def read(data: bytes, texts: tuple[str, ...] = ()) -> Provenance:
    """Read metadata, without content credentials. `texts`: from `exif_texts`."""
    source_type = None
    for packet in _packets(data):
        for name, value in _properties(packet):
            if name == IPTC:
                source_type = source_type or _term(value)
            elif name in (TOOL, CREDIT):
                texts = (*texts, value)
    keywords: tuple[str, ...] = ()
    if data.startswith(png.SIGNATURE):
        pairs = tuple(_png_texts(data))
        keywords, texts = tuple(key for key, _ in pairs), (*texts, *(text for _, text in pairs))
    has_credentials = all(mark in data for mark in MARKS)
    return Provenance(
        c2pa_state=None if has_credentials else NONE,
        digital_source_type=source_type,
        metadata_generator=_generator(keywords, texts),
    )


def with_credentials(provenance: Provenance, data: bytes, anchors: str = "") -> Provenance:
    """Add the content credentials of a file that has some. Makes no request.

    `anchors`: certificates of the trust list, in PEM; empty: no signer is trusted.
    """
    import c2pa  # takes 60 ms, and most processes read no credentials

    try:
        reader = c2pa.Reader.try_create(None, io.BytesIO(data), context=_context(anchors))
        if reader is None:  # the marks are something else's
            return replace(provenance, c2pa_state=NONE)
        with reader:
            state = STATES.get(str(reader.get_validation_state()), ERROR)
            store = json.loads(reader.json())
    except Exception:  # the library raises errors of many classes about damaged stores
        return replace(provenance, c2pa_state=ERROR)
    if state not in (VALID, UNTRUSTED):
        return replace(provenance, c2pa_state=state)
    generator, source_type = _signed(store)
    return replace(
        provenance,
        c2pa_state=state,
        c2pa_generator=generator,
        digital_source_type=source_type or provenance.digital_source_type,
    )


def completed(provenance: Provenance | None, data: bytes, anchors: str = "") -> Provenance | None:
    """The same, with content credentials if there are some that have not been read."""
    if provenance is None or provenance.c2pa_state is not None:
        return provenance
    return with_credentials(provenance, data, anchors)


def preload() -> None:
    """Load what `with_credentials` needs, for processes that may not open files afterwards."""
    with_credentials(Provenance(c2pa_state=None), next(iter(samples.samples()))[1])
    _context.cache_clear()  # the library's objects do not survive a fork


def check_anchors(anchors: str, name: str) -> None:
    """Raise `ConfigError` if a trust list, from the file of this name, cannot be used."""
    import ssl

    if "-----BEGIN CERTIFICATE-----" not in anchors:
        raise ConfigError(f"{name} holds no certificate in PEM: a trust list is a file of certificates")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=anchors)
        _context(anchors)
    except Exception as error:  # the C2PA library raises errors of many classes
        raise ConfigError(f"{name} is not a usable trust list: {' '.join(str(error).split())[:200]}") from error


@functools.lru_cache(maxsize=2)
def _context(anchors: str) -> Any:
    import c2pa

    trust = {"trust": {"trust_anchors": anchors}} if anchors else {}
    verify = {"verify_trust": True, "remote_manifest_fetch": False, "ocsp_fetch": False}
    return c2pa.Context.from_dict({**trust, "verify": verify})


def _signed(store: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Generator and digital source type of the active manifest, or of what its image was made from."""
    manifests, label = _mapping(store.get("manifests")), store.get("active_manifest")
    generator = source_type = None
    seen: set[Any] = set()
    while isinstance(label, str) and label in manifests and label not in seen and len(seen) < MAX_INGREDIENTS:
        seen.add(label)
        manifest = _mapping(manifests[label])
        generator = generator or _claim_generator(manifest)
        source_type = source_type or _created_as(manifest)
        parents = [_mapping(one) for one in _list(manifest.get("ingredients"))]
        label = next((one.get("active_manifest") for one in parents if one.get("relationship") == "parentOf"), None)
    return generator, source_type


def _claim_generator(manifest: Mapping[str, Any]) -> str | None:
    for info in _list(manifest.get("claim_generator_info")):
        name, version = (_mapping(info).get(key) for key in ("name", "version"))
        if isinstance(name, str) and name.strip():
            return _short(f"{name} {version}" if isinstance(version, str) else name)
    name = manifest.get("claim_generator")
    return _short(name) if isinstance(name, str) and name.strip() else None


def _created_as(manifest: Mapping[str, Any]) -> str | None:
    for assertion in _list(manifest.get("assertions")):
        if not str(_mapping(assertion).get("label")).startswith("c2pa.actions"):
            continue
        for action in _list(_mapping(_mapping(assertion).get("data")).get("actions")):
            if term := _term(str(_mapping(action).get("digitalSourceType"))):
                return term
    return None


def _term(value: str) -> str | None:
    term = SOURCE_TYPE.fullmatch(value.strip())
    return term[1] if term and term[1] in SOURCE_TYPES else None


def _generator(keywords: tuple[str, ...], texts: tuple[str, ...]) -> str | None:
    for keyword in keywords:
        if keyword in KEYS:
            return KEYS[keyword]
    for pattern, name in PATTERNS:
        if any(pattern.search(text[:MAX_TEXT_BYTES]) for text in texts):
            return name
    return None


def _packets(data: bytes) -> Iterator[bytes]:
    """XMP packets that are stored as they are."""
    at = 0
    for _ in range(MAX_PACKETS):
        start = data.find(PACKET[0], at)
        at = data.find(PACKET[1], start, start + MAX_PACKET_BYTES) if start >= 0 else -1
        if at < 0:
            return
        at += len(PACKET[1])
        yield data[start:at]


def _properties(packet: bytes) -> list[tuple[str, str]]:
    """Names and values of a packet's properties, as attributes, elements or references; empty if it is damaged."""
    found: list[tuple[str, str]] = []
    text: list[str] = []
    parser = expat.ParserCreate(namespace_separator=" ")

    def start(name: str, attributes: dict[str, str]) -> None:
        text.clear()
        found.extend(attributes.items())
        if RESOURCE in attributes:
            found.append((name, attributes[RESOURCE]))

    def end(name: str) -> None:
        found.append((name, "".join(text)))
        text.clear()

    def refuse(*_: object) -> None:
        raise ValueError("XMP has no document type")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(packet, True)
    except (expat.ExpatError, ValueError):
        return []
    return found


def _png_texts(data: bytes) -> Iterator[tuple[str, str]]:
    """Keyword and text of a PNG's text chunks."""
    try:
        chunks = [chunk for chunk in png.read_chunks(data) if chunk.kind in png.TEXTS][:MAX_TEXTS]
    except ImageError:
        return
    for chunk in chunks:
        keyword, _, rest = data[chunk.start + 8 : chunk.end - 4].partition(b"\0")
        compressed = chunk.kind == b"zTXt"
        if chunk.kind == b"iTXt":  # compression flag, method, language, 0, translated keyword, 0, text
            compressed = rest[:1] == b"\1"
            rest = (
                rest[1:2] + rest[2:].partition(b"\0")[2].partition(b"\0")[2]
                if compressed
                else (rest[2:].partition(b"\0")[2].partition(b"\0")[2])
            )
        if compressed:
            try:
                rest = zlib.decompressobj().decompress(rest[1:], MAX_TEXT_BYTES)
            except zlib.error:
                continue
        yield keyword[:80].decode("latin-1"), _decoded(rest[:MAX_TEXT_BYTES])


def _decoded(text: str | bytes) -> str:
    """Text of metadata. EXIF's comments start with the name of their encoding."""
    if isinstance(text, str):
        return text
    if text.startswith(b"UNICODE\0"):
        body = text[8:]
        return max((body.decode(name, "ignore") for name in ("utf-16-be", "utf-16-le")), key=_ascii_letters)
    return text.removeprefix(b"ASCII\0\0\0").decode("utf-8", "replace")


def _ascii_letters(text: str) -> int:
    return sum(letter.isascii() for letter in text[:1000])


def _short(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * MAX_TEXT])
    return " ".join(printable.split())[:MAX_TEXT]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
