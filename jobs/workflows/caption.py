"""Captioning: a source of images to captions and their text features, once for all trainings."""

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.cluster.address import check_address
from jobs.dataset import schema
from jobs.dataset.plan import Selection
from jobs.dataset.source import Source
from jobs.runs import catalog, failures, products
from jobs.runs.attempts import Attempt
from jobs.runs.execution import Request, Work, carry_out
from jobs.runs.publication import Run
from jobs.storage import probes
from jobs.storage.uris import Uri
from nsnet.config import to_dict
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits

if TYPE_CHECKING:
    from jobs.pipeline.models import Models
    from nsnet.detector import DetectorConfig


def caption(
    source: Uri,
    *,
    out: Uri,
    recipe: str = "tiny",
    selection: Selection | None = None,
    batch_size: int = 32,
    wait: bool = False,
    clip_weights: Uri | None = None,
    captioner: Uri | None = None,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Caption a source and publish; returns the run's record, which has no rows where there was nothing to do."""
    from jobs.pipeline.models import Models
    from nsnet import recipes

    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    limits = limits or DecodeLimits()
    probes.check_output(out)
    check_address(address)
    Source(source).check()
    config = recipes.get(recipe).detector
    models = Models(clip_weights=clip_weights, captioner=captioner)
    models = replace(models, captioner_id=_captioner_id(config, models))
    request = Request(
        source=source, out=out, product=products.CAPTIONS, maker=features_id(config, models),
        selection=selection or Selection(), wait=wait, address=address, settings={"limits": to_dict(limits)},
    )  # fmt: skip

    def work(run: Run) -> Work:
        from jobs.pipeline.actors import Embed
        from jobs.pipeline.stream import Stream, prepared
        from nsnet.captions import thumbnail_px
        from nsnet.preparation import PreparationConfig

        asked = replace(models, run_id=run.run_id)
        side = thumbnail_px(models.captioner_folder(config.captioner))
        preparation = PreparationConfig(thumbnail_px=side, patches=None, fingerprint=True, limits=limits)

        def stream(attempt: Attempt) -> Stream:
            images = prepared(
                attempt.todo, source, preparation, asked, keep=CAPTIONING_COLUMNS, batch_size=batch_size,
                checkpoint=attempt.checkpoint, remembered=failures.remembered(request),
            ).captioned(config.captioner, CAPTIONING_COLUMNS)  # fmt: skip
            return images.through(
                Embed, images.shares.scorers, images.models, config.clip, schema.CAPTIONS, batch_size,
                images.report,
            )  # fmt: skip

        return Work(
            title="caption",
            stages=("prepared", "captioned", "embedded"),
            stream=stream,
            known=catalog.published(out, schema.CAPTIONED, products.CAPTIONS, captioner_id=models.captioner_id),
            captioner_id=models.captioner_id,
            details={
                "captioner_id": models.captioner_id,
                "settings": {"batch_size": batch_size, "captioner": to_dict(config.captioner)},
            },
        )

    return carry_out(request, work)


CAPTIONING_COLUMNS = schema.CAPTIONS.remove(schema.CAPTIONS.get_field_index(schema.TEXT_FEATURES.name))


def features_id(config: "DetectorConfig", models: "Models") -> str:
    """Identity of captions and their features, 16 hexadecimal digits: of the captioner and the text tower."""
    from nsnet.clip import find_weights, text_tower_id

    tower = text_tower_id(config.clip, find_weights(config.clip, models.clip_path()))
    return hashlib.sha256(json.dumps([_captioner_id(config, models), tower]).encode()).hexdigest()[:16]


def _captioner_id(config: "DetectorConfig", models: "Models") -> str:
    from nsnet.captions import captioner_id

    return captioner_id(config.captioner, models.captioner_folder(config.captioner))
