"""Judge single images in this process, without Ray."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.console import output
from jobs.pipeline.models import Models
from jobs.storage import errors, listing, probes, reading, uris
from jobs.storage.trust import read_trust_list
from jobs.storage.uris import Uri
from nsnet.configuration import Precision, config_of
from nsnet.errors import FetchError, ImageError, ImageTooLargeError, UsageError
from nsnet.images import DecodeLimits
from nsnet.preparation import Prepared
from nsnet.provenance import MEANINGS, NONE


def predict(
    images: Sequence[str],
    *,
    detector: Uri,
    detector_sha256: str | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    clip_weights: Uri | None = None,
    text_weights: Uri | None = None,
    captioner: Uri | None = None,
    weights: Uri | None = None,
    limits: DecodeLimits | None = None,
    trust_list: Uri | None = None,
    views: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the fields of `nsnet.detector.Verdict` for each image, with `image` and `detector_id`.

    `images`: paths or s3:// URIs. `device`: cpu, cuda, or None for a GPU if there is one. `trust_list`, `views`: as in
    `score`. An image that cannot be read or decoded gives a failed verdict.
    """
    import torch

    from jobs.pipeline.decoding import GuardedDecoder
    from nsnet.detector import Detector

    limits = limits or DecodeLimits()
    anchors = read_trust_list(trust_list)
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UsageError("--device cuda: this machine has no usable GPU; leave it out to compute on the CPU")
    probes.reachable(detector)
    models = Models(
        detector=detector, detector_sha256=detector_sha256, clip_weights=clip_weights, text_weights=text_weights,
        captioner=captioner, weights=weights, device=device or ("cuda" if gpu else "cpu"),
    )  # fmt: skip
    loaded = Detector.load(
        models.bundle_folder(),
        device=models.device,
        precision=precision,
        captioner=_captioner(models),
        sha256=detector_sha256,
        **models.tower_paths(),
    )
    if loaded.description and loaded.description.note:
        output.say(loaded.description.note)
    preparation = loaded.preparation(limits, anchors, views or 1)
    decoder = GuardedDecoder(preparation)
    try:
        for image in images:
            try:
                prepared: Prepared | ImageError = decoder.prepare(_read(image, limits.max_bytes))
            except ImageError as error:
                prepared = error
            verdict = loaded.predict_prepared([prepared], preparation)[0]
            yield {"image": image, **dataclasses.asdict(verdict), "detector_id": loaded.detector_id}
    finally:
        decoder.close()


def _captioner(models: Models) -> Path | None:
    """The given captioner, or the mirror's for a detector that needs captions; None: the bundle's or the hub's."""
    if models.weights is None or models.captioner is not None:
        return Path(models.captioner) if models.captioner else None
    config = config_of(models.description())
    return models.captioner_folder(config.captioner) if config.projection.needs_captions else None


def _read(image: str, max_bytes: int) -> bytes:
    uri = uris.located(image)
    try:
        size = listing.describe(uri).size_bytes
        if size > max_bytes:
            raise ImageTooLargeError(f"{size:,} bytes, the limit is {max_bytes:,} (--max-bytes)")
        return reading.read_bytes(uri)
    except FileNotFoundError as error:
        raise FetchError(f"there is no file {image}") from error
    except ImageError:
        raise
    except Exception as error:  # stores raise many classes; only this image fails
        raise FetchError(f"{image}: {errors.reason(error)}") from error


def as_text(values: dict[str, Any]) -> str:
    """A verdict as text for the console, without control characters from the file."""
    values = {key: output.printable(value) if isinstance(value, str) else value for key, value in values.items()}
    name = values["image"]
    if values["status"] == "failed":
        return f"{name}: not judged: {values['error_class']}: {values['error_message']}"
    text = (
        f"{name}: {values['verdict']}, P(fake) = {values['prob_fake']:.3f} (threshold {values['threshold']:.3f})\n"
        f"  {values['width']} × {values['height']} px {values['format']}"
    )
    if values["caption"] is not None:
        text += (
            f"; caption whose meaning was removed: “{values['caption']}”, which left "
            f"{values['residual_energy']:.0%} of the image feature to judge"
        )
    if values["views_agree"] is not None:
        agree = "agree" if values["views_agree"] else "disagree: the verdict flips under mild changes of the file"
        text += f"\n  views {agree}; P(fake) differs by {values['prob_spread']:.3f} between them"
    return "\n".join([text, *(f"  {claim}" for claim in _claims(values))])


def _claims(values: dict[str, Any]) -> list[str]:
    """What the file says about its origin, apart from the verdict, which does not depend on it."""
    lines = []
    if (state := values["c2pa_state"]) not in (None, NONE):
        signer = f", made by {values['c2pa_generator']}" if values["c2pa_generator"] else ""
        lines.append(f"content credentials: {state} ({MEANINGS[state]}){signer}")
    if values["digital_source_type"]:
        lines.append(f"stated source: {values['digital_source_type']}")
    if values["metadata_generator"]:
        lines.append(f"metadata of {values['metadata_generator']}")
    return lines
