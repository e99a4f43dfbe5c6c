"""Scoring: a source of images to published verdicts, exactly once per version of an image and detector."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jobs.cluster.address import check_address
from jobs.console import output
from jobs.dataset import schema
from jobs.dataset.plan import Selection
from jobs.dataset.source import Source
from jobs.runs import catalog, failures, products
from jobs.runs.attempts import Attempt
from jobs.runs.execution import Request, Work, carry_out
from jobs.runs.publication import Run
from jobs.storage import bundles, probes
from jobs.storage.errors import OUTAGE_SECONDS
from jobs.storage.uris import Uri
from nsnet import bundle
from nsnet.config import to_dict
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits


def score(
    source: Uri,
    *,
    detector: Uri,
    out: Uri,
    selection: Selection | None = None,
    batch_size: int = 32,
    reuse: bool = True,
    wait: bool = False,
    outage_seconds: float = OUTAGE_SECONDS,
    clip_weights: Uri | None = None,
    captioner: Uri | None = None,
    limits: DecodeLimits | None = None,
    transforms: Sequence[str] = (),
    address: str | None = None,
) -> dict[str, Any]:
    """Score a source and publish; returns the run's record, which has no rows where there was nothing to do.

    `transforms`: chains of `nsnet.transforms` under which each image is judged as well, as rows of their own. A run
    with the same settings that was not published is continued. Whatever is wrong with the request is found
    before Ray or a model is started; before torch is, where there is nothing to do.
    """
    if batch_size < 1 or outage_seconds < 0:
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
    Source(source).check()
    request = Request(
        source=source, out=out, product=products.VERDICTS, maker=description.detector_id, selection=selection,
        transforms=("", *transforms) if transforms else (), wait=wait, address=address,
        settings={"limits": to_dict(limits), "clip_weights": clip_weights, "captioner": captioner},
    )  # fmt: skip

    def work(run: Run) -> Work:
        from jobs.pipeline.actors import Score
        from jobs.pipeline.models import Models
        from jobs.pipeline.stream import (  # Ray and torch take seconds to import
            SCORING_COLUMNS,
            Stream,
            prepared,
            with_pixels,
        )
        from nsnet.captions import captioner_id, thumbnail_px
        from nsnet.clip import find_weights
        from nsnet.detector import config_of
        from nsnet.preparation import PreparationConfig

        config = config_of(description)
        models = Models(
            detector=detector, clip_weights=clip_weights, captioner=captioner,
            run_id=run.run_id, detector_id=description.detector_id, reuse=reuse,
        )  # fmt: skip
        if not (models.bundle_folder() / bundle.CLIP).is_dir():
            find_weights(config.clip, models.clip_path())
        captioned = config.projection.needs_captions
        if captioned:
            folder = models.captioner_folder(config.captioner)
            models = replace(models, captioner_id=captioner_id(config.captioner, folder))
        preparation = PreparationConfig(
            thumbnail_px=thumbnail_px(folder) if captioned else 0, patches=config.patches, limits=limits
        )

        known = reuse and captioned

        def stream(attempt: Attempt) -> Stream:
            images = prepared(
                attempt.todo, source, preparation, models, keep=SCORING_COLUMNS, batch_size=batch_size,
                checkpoint=attempt.checkpoint, outage_seconds=outage_seconds,
                remembered=failures.remembered(request),
            )  # fmt: skip
            if captioned:
                keep = replace(preparation, thumbnail_px=0)
                images = images.captioned(config.captioner, with_pixels(SCORING_COLUMNS, keep))
            return images.through(Score, images.shares.scorers, images.models, batch_size, images.report)

        return Work(
            title="score",
            stages=("prepared", "captioned", "scored") if captioned else ("prepared", "scored"),
            stream=stream,
            known=catalog.published(out, schema.CAPTIONED, captioner_id=models.captioner_id) if known else (),
            captioner_id=models.captioner_id,
            details={
                "captioner_id": models.captioner_id,
                "settings": {"batch_size": batch_size, "reuse": reuse, "detector": to_dict(config)},
            },
        )

    return carry_out(request, work)
