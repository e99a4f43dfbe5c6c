"""Files with content credentials, signed with throw-away keys."""

import io
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final

import c2pa
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

GENERATED: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
DAY: Final = timedelta(days=1)
BITS: Final = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


@dataclass(frozen=True)
class Signer:
    """A key and its certificates in PEM: the signer's and its authority's."""

    chain: bytes
    anchors: str
    key: bytes


def _certificate(
    name: str, key: Any, issuer: tuple[str, Any], usage: tuple[str, ...], valid: timedelta, is_authority: bool
) -> x509.Certificate:
    issuer_name, issuer_key = issuer
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - 100 * DAY)
        .not_valid_after(datetime.now(UTC) + valid)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{bit: bit in usage for bit in BITS}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


@cache
def signer(name: str = "first", valid: timedelta = 100 * DAY) -> Signer:
    """A signer of this name with an authority of its own, valid for so long from now on."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate(name, root_key, (name, root_key), ("key_cert_sign", "crl_sign"), 400 * DAY, True)
    leaf = _certificate(f"{name} signer", key, (name, root_key), ("digital_signature",), valid, False)
    pem = [certificate.public_bytes(serialization.Encoding.PEM) for certificate in (leaf, root)]
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Signer(chain=b"".join(pem), anchors=pem[1].decode(), key=private)


def picture(kind: str = "JPEG", **options: Any) -> bytes:
    """A small noisy picture."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def signed(data: bytes, mime: str = "image/jpeg", by: Signer | None = None, **manifest: Any) -> bytes:
    """The file with a manifest that says it was generated. `manifest`: other parts of it."""
    action = {"action": "c2pa.created", "digitalSourceType": GENERATED}
    content = {
        "claim_generator_info": [{"name": "Painter", "version": "3"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }
    return _sign(c2pa.Builder(content | manifest), data, mime, by or signer())


def edited(data: bytes, parent: bytes, mime: str = "image/jpeg", by: Signer | None = None) -> bytes:
    """The file with a manifest that says it was made from its parent."""
    builder = c2pa.Builder({"claim_generator_info": [{"name": "Editor"}]})
    builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
    builder.add_ingredient({"title": "parent", "relationship": "parentOf"}, mime, io.BytesIO(parent))
    return _sign(builder, data, mime, by or signer())


def _sign(builder: Any, data: bytes, mime: str, by: Signer) -> bytes:
    info = c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, by.chain, by.key, None)
    out = io.BytesIO()
    builder.sign(c2pa.Signer.from_info(info), mime, io.BytesIO(data), out)
    return out.getvalue()


def expired(data: bytes) -> bytes:
    """A signed JPEG whose certificate has expired since; takes three seconds."""
    made = signed(data, by=signer("late", timedelta(seconds=2)))
    time.sleep(3.1)  # times of certificates are whole seconds
    return made


def end_of_store(signed_jpeg: bytes) -> int:
    """Where the manifest of a JPEG ends; the last 64 bytes before are the signature."""
    end = signed_jpeg.index(b"\xff\xeb")
    while signed_jpeg[end : end + 2] == b"\xff\xeb":
        end += 2 + int.from_bytes(signed_jpeg[end + 2 : end + 4], "big")
    return end


def transplanted(signed_jpeg: bytes, other_jpeg: bytes) -> bytes:
    """The other file with the manifest of a signed one."""
    start = signed_jpeg.index(b"\xff\xeb")
    return other_jpeg[:2] + signed_jpeg[start : end_of_store(signed_jpeg)] + other_jpeg[2:]
