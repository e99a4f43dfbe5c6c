"""Publish captions and text features of a source's images, once for all trainings."""

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.cluster.address import check_address
from jobs.dataset.plan import Selection
from jobs.dataset.source import Source
from jobs.pipeline.models import Models
from jobs.runs import products
from jobs.runs.execution import Request, Work, carry_out
from jobs.runs.publication import Run
from jobs.storage import probes
from jobs.storage.uris import Uri
from nsnet.config import to_dict
from nsnet.configuration import Precision
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits

if TYPE_CHECKING:
    from nsnet.configuration import DetectorConfig


def caption(
    source: Uri,
    *,
    out: Uri,
    recipe: str = "tiny",
    selection: Selection | None = None,
    batch_size: int | None = None,
    precision: Precision = "auto",
    wait: bool = False,
    clip_weights: Uri | None = None,
    text_weights: Uri | None = None,
    captioner: Uri | None = None,
    weights: Uri | None = None,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Caption a source and publish; returns the run's record, which has no rows if there was nothing to do.

    `weights`: mirror that replaces the hub.
    """
    from nsnet import recipes

    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    limits = limits or DecodeLimits()
    probes.check_output(out)
    check_address(address)
    Source(source).check()
    config = recipes.get(recipe).detector
    models = Models(
        clip_weights=clip_weights, text_weights=text_weights, captioner=captioner, weights=weights, precision=precision
    )
    models = replace(models, captioner_id=_captioner_id(config, models))
    request = Request(
        source=source, out=out, product=products.CAPTIONS, maker=features_id(config, models),
        selection=selection or Selection(), wait=wait, address=address,
        settings={"limits": to_dict(limits), **({"precision": precision} if precision != "auto" else {})},
    )  # fmt: skip

    def work(run: Run) -> Work:
        from jobs.workflows.streams import captioning  # it imports Ray, which takes seconds

        return captioning(request, replace(models, run_id=run.run_id), config, limits=limits, batch_size=batch_size)

    return carry_out(request, work)


def features_id(config: "DetectorConfig", models: Models) -> str:
    """Identity of captions and their features, 16 hexadecimal digits, from the captioner and the text tower."""
    from nsnet.clip_weights import text_tower_id

    tower = text_tower_id(*models.text_tower(config))
    return hashlib.sha256(json.dumps([_captioner_id(config, models), tower]).encode()).hexdigest()[:16]


def _captioner_id(config: "DetectorConfig", models: Models) -> str:
    from nsnet.captions import captioner_id

    return captioner_id(config.captioner, models.captioner_folder(config.captioner))
