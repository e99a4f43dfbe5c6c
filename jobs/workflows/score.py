"""Publish verdicts on a source's images, exactly once per image version and detector."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jobs.cluster.address import check_address
from jobs.console import output
from jobs.dataset.plan import Selection
from jobs.dataset.source import Source
from jobs.pipeline.models import Models
from jobs.runs import products
from jobs.runs.execution import Request, Work, carry_out
from jobs.runs.publication import Run
from jobs.storage import bundles, probes
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.trust import read_trust_list
from jobs.storage.uris import Uri
from nsnet import bundle
from nsnet.config import to_dict
from nsnet.configuration import Precision
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits


def score(
    source: Uri,
    *,
    detector: Uri,
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
    limits: DecodeLimits | None = None,
    trust_list: Uri | None = None,
    transforms: Sequence[str] = (),
    address: str | None = None,
) -> dict[str, Any]:
    """Score a source and publish; returns the run's record, which has no rows if there was nothing to do.

    `batch_size`: images per model call; None: more on a GPU than on a CPU. `precision`: arithmetic of the models.
    `trust_list`: file of certificates in PEM, whose content credentials are valid. `transforms`: chains of
    `nsnet.transforms`; each adds a row per image. Continues an unpublished run with the same settings. Checks the
    request before it starts Ray or a model; imports torch only if there is work.
    """
    if (batch_size is not None and batch_size < 1) or outage_seconds < 0:
        raise ConfigError(
            f"--batch-size must be at least 1 and --outage-seconds 0, got {batch_size} and {outage_seconds:g}"
        )
    selection, limits = selection or Selection(), limits or DecodeLimits()
    probes.reachable(detector)
    probes.check_output(out)
    check_address(address)
    description = bundle.read(bundles.fetch_bundle(detector, bundle.DESCRIPTION))
    if description.note:
        output.say(description.note)
    anchors = read_trust_list(trust_list)
    Source(source).check()
    request = Request(
        source=source, out=out, product=products.VERDICTS, maker=description.detector_id, selection=selection,
        transforms=("", *transforms) if transforms else (), wait=wait, address=address,
        settings={
            "limits": to_dict(limits), "clip_weights": clip_weights, "captioner": captioner,
            # unknown to unfinished runs of older releases
            **({"text_weights": text_weights} if text_weights is not None else {}),
            **({"precision": precision} if precision != "auto" else {}),
            **({"trust_list": hashlib.sha256(anchors.encode()).hexdigest()} if anchors else {}),
        },
    )  # fmt: skip

    models = Models(
        detector=detector,
        clip_weights=clip_weights,
        text_weights=text_weights,
        captioner=captioner,
        detector_id=description.detector_id,
        reuse=reuse,
        precision=precision,
    )

    def work(run: Run) -> Work:
        from jobs.workflows.streams import scoring  # it imports Ray and torch, which take seconds

        return scoring(
            request, replace(models, run_id=run.run_id), description,
            limits=limits, batch_size=batch_size, outage_seconds=outage_seconds, anchors=anchors,
        )  # fmt: skip

    return carry_out(request, work)
