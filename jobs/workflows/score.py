"""Publish verdicts of detectors on a source's images, exactly once per image version and detector."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from jobs.cluster.address import check_address
from jobs.console import output
from jobs.dataset.plan import Selection
from jobs.dataset.source import Source
from jobs.pipeline.models import Models
from jobs.runs import products
from jobs.runs.execution import Planned, Request, Work, carry_out_together
from jobs.storage import bundles, probes
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.trust import read_trust_list
from jobs.storage.uris import Uri
from nsnet import bundle
from nsnet.config import to_dict
from nsnet.configuration import DetectorConfig, Precision, config_of
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits

MAX_DETECTORS: Final = 16
"""Each holds its models in every actor."""


def score(source: Uri, *, detector: Uri, pin: str | None = None, **settings: Any) -> dict[str, Any]:
    """As `score_together`, with one detector; returns its record."""
    (record,) = score_together(source, detectors=[detector], pins=[pin] if pin is not None else [], **settings)
    return record


def score_together(
    source: Uri,
    *,
    detectors: Sequence[Uri],
    pins: Sequence[str] = (),
    out: Uri,
    selection: Selection | None = None,
    batch_size: int | None = None,
    precision: Precision = "auto",
    reuse: bool = True,
    wait: bool = False,
    outage_seconds: float = OUTAGE_SECONDS,
    clip_weights: Uri | None = None,
    text_weights: Uri | None = None,
    captioner: Uri | None = None,
    weights: Uri | None = None,
    limits: DecodeLimits | None = None,
    trust_list: Uri | None = None,
    views: int | None = None,
    transforms: Sequence[str] = (),
    separate_models: bool = False,
    address: str | None = None,
) -> list[dict[str, Any]]:
    """Score a source in one pass and publish a run per detector; returns their records, which have no rows if there was
    nothing to do.

    `batch_size`: images per model call; None: more on a GPU than on a CPU. `precision`: arithmetic of the models.
    `trust_list`: file of certificates in PEM, whose content credentials are valid. `views`: mosaics to judge per
    image; None: one. `pins`: SHA-256 of each detector's description, none to take what is there. `weights`: mirror that
    replaces the hub. `transforms`: chains of `nsnet.transforms`; each adds a row per image. `separate_models`: the
    captioner and the detectors have pools of actors of their own. Continues an unpublished run with the same settings.
    Checks the request before it starts Ray or a model; imports torch only if there is work.
    """
    if (batch_size is not None and batch_size < 1) or outage_seconds < 0:
        raise ConfigError(
            f"--batch-size must be at least 1 and --outage-seconds 0, got {batch_size} and {outage_seconds:g}"
        )
    selection, limits = selection or Selection(), limits or DecodeLimits()
    for detector in detectors:
        probes.reachable(detector)
    probes.check_output(out)
    check_address(address)
    by_id = _identified(detectors, pins)
    anchors = read_trust_list(trust_list)
    Source(source).check()
    requests = [
        Request(
            source=source, out=out, product=products.VERDICTS, maker=detector_id, selection=selection,
            transforms=("", *transforms) if transforms else (), wait=wait, address=address,
            settings={
                "limits": to_dict(limits), "clip_weights": clip_weights, "captioner": captioner,
                # unknown to unfinished runs of older releases
                **({"text_weights": text_weights} if text_weights is not None else {}),
                **({"precision": precision} if precision != "auto" else {}),
                **({"trust_list": hashlib.sha256(anchors.encode()).hexdigest()} if anchors else {}),
                **({"views": views} if views else {}),
            },
        )
        for detector_id in by_id
    ]  # fmt: skip
    models = Models(
        clip_weights=clip_weights,
        text_weights=text_weights,
        captioner=captioner,
        weights=weights,
        reuse=reuse,
        precision=precision,
    )

    def work(planned: Sequence[Planned]) -> Work:
        from jobs.workflows.streams import scoring  # it imports Ray and torch, which take seconds

        detectors = []
        for one in planned:
            uri, pin, config = by_id[one.request.maker]
            own = replace(
                models, detector=uri, detector_sha256=pin, detector_id=one.request.maker, run_id=one.run.run_id
            )
            detectors.append((own, config))
        return scoring(
            requests[0], detectors,
            limits=limits, batch_size=batch_size, outage_seconds=outage_seconds, anchors=anchors, views=views or 1,
            separate=separate_models,
        )  # fmt: skip

    return carry_out_together(requests, work)


def _identified(detectors: Sequence[Uri], pins: Sequence[str]) -> dict[str, tuple[Uri, str | None, DetectorConfig]]:
    """Detector id -> URI, pin and configuration.

    Raises `BundleError`, and `ConfigError` for too many or equal detectors, or another number of pins.
    """
    if not 1 <= len(detectors) <= MAX_DETECTORS:
        raise ConfigError(f"a pass takes 1 to {MAX_DETECTORS} detectors, got {len(detectors)}: score in several passes")
    if pins and len(pins) != len(detectors):
        raise ConfigError(
            f"--detector-sha256 was given {len(pins)} times for {len(detectors)} detectors: give one for each "
            "--detector, in the same order"
        )
    by_id: dict[str, tuple[Uri, str | None, DetectorConfig]] = {}
    for detector, pin in zip(detectors, pins or (None,) * len(detectors), strict=True):
        description = bundle.read(bundles.fetch_bundle(detector, bundle.DESCRIPTION, pin), pin)
        if description.note:
            output.say(description.note)
        if description.detector_id in by_id:
            other, *_ = by_id[description.detector_id]
            raise ConfigError(f"--detector {detector} and {other} are the same detector: leave one out")
        by_id[description.detector_id] = detector, pin, config_of(description)
    return by_id
