"""How the images of a run become rows: the streams of scoring, captioning and examining.

Importing this module imports Ray and torch, which takes seconds; a workflow imports it only if there is work.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from jobs.dataset import schema
from jobs.pipeline.actors import Caption, Embed, MakeStage
from jobs.pipeline.models import Models
from jobs.pipeline.pixels import mosaic_column, with_pixels
from jobs.pipeline.scoring import Judge, Score
from jobs.pipeline.stream import SCORING_COLUMNS, Stream, prepared
from jobs.runs import catalog, failures, products
from jobs.runs.attempts import Attempt
from jobs.runs.execution import Request, Work
from nsnet.captions import captioner_id, thumbnail_px
from nsnet.config import to_dict
from nsnet.configuration import CaptionerConfig, DetectorConfig
from nsnet.errors import ConfigError
from nsnet.images import DecodeLimits
from nsnet.preparation import PreparationConfig

CAPTIONING_COLUMNS = schema.CAPTIONS.remove(schema.CAPTIONS.get_field_index(schema.TEXT_FEATURES.name))
"""What a row carries to the text tower."""


def scoring(
    request: Request,
    detectors: Sequence[tuple[Models, DetectorConfig]],
    *,
    limits: DecodeLimits,
    batch_size: int | None,
    outage_seconds: float,
    anchors: str,
    views: int,
    separate: bool,
) -> Work:
    """Images to verdicts of detectors, in one pass. `anchors`, `views`: see `PreparationConfig`. `separate`: captioner
    and detectors have pools of actors of their own.

    Raises `WeightsError` if weights that a bundle refers to are missing, and `ConfigError` if the detectors need
    different captioners.
    """
    for models, config in detectors:
        models.check_towers(config)
    models, captioner = _captioning_detector(detectors)
    geometries = tuple(dict.fromkeys(config.patches for _, config in detectors))
    preparation = PreparationConfig(
        thumbnail_px=thumbnail_px(models.captioner_folder(captioner)) if captioner else 0, patches=geometries,
        views=views, limits=limits, provenance=True, anchors=anchors,
    )  # fmt: skip
    judges = []
    for i, (own, config) in enumerate(detectors):
        first = geometries.index(config.patches) * views
        judges.append(
            Judge(
                detector=own.detector, detector_sha256=own.detector_sha256, detector_id=own.detector_id,
                run_id=own.run_id, wanted=1 << i,
                mosaics=tuple(mosaic_column(first + view) for view in range(views)),
                needs_captions=config.projection.needs_captions,
            )
        )  # fmt: skip
    captioned = sum(judge.wanted for judge in judges if judge.needs_captions)

    def stream(attempt: Attempt) -> Stream:
        images = prepared(
            attempt.todo, request.source, preparation, models, keep=SCORING_COLUMNS, images_todo=attempt.count,
            batch_size=batch_size,
            checkpoint=attempt.checkpoint, outage_seconds=outage_seconds, remembered=failures.remembered(request),
        )  # fmt: skip
        common = (images.batch_size, images.report)
        stages: list[MakeStage] = [partial(Score, images.models, judges, *common)]
        if captioner:
            keep = with_pixels(SCORING_COLUMNS, replace(preparation, thumbnail_px=0))
            stages.insert(0, partial(Caption, images.models, captioner, keep, *common, wanted=captioned))
        return images.through(*stages, separate=separate)

    known = catalog.published(request.out, schema.CAPTIONED, captioner_id=models.captioner_id)
    return Work(
        title="score",
        stages=("prepared", "captioned", "scored") if captioner else ("prepared", "scored"),
        stream=stream,
        known=known if models.reuse and captioner else (),
        captioner_id=models.captioner_id,
        details={
            judge.run_id: {
                "captioner_id": models.captioner_id if judge.needs_captions else "",
                "settings": {"reuse": models.reuse, "detector": to_dict(config)},
            }
            for judge, (_, config) in zip(judges, detectors, strict=True)
        },
    )


def _captioning_detector(
    detectors: Sequence[tuple[Models, DetectorConfig]],
) -> tuple[Models, CaptionerConfig | None]:
    """The first detector that needs captions, whose captioner makes those of all; without one, the first, and None.

    Bundles may hold captioners, so the captioner must be found from its own detector. Raises `ConfigError` if the
    detectors need different ones.
    """
    found: dict[str, tuple[Models, CaptionerConfig]] = {}
    for models, config in detectors:
        if config.projection.needs_captions:
            name = captioner_id(config.captioner, models.captioner_folder(config.captioner))
            found.setdefault(name, (replace(models, captioner_id=name), config.captioner))
    if len(found) > 1:
        raise ConfigError(
            f"{' and '.join(str(models.detector) for models, _ in found.values())} need different captioners, and a "
            "pass captions each image once: score them in separate runs, or give one --captioner for all"
        )
    return next(iter(found.values()), (detectors[0][0], None))


def captioning(
    request: Request, models: Models, config: DetectorConfig, *, limits: DecodeLimits, batch_size: int | None
) -> Work:
    """Images to captions and their features."""
    side = thumbnail_px(models.captioner_folder(config.captioner))
    preparation = PreparationConfig(thumbnail_px=side, patches=(), fingerprint=True, limits=limits)

    def stream(attempt: Attempt) -> Stream:
        images = prepared(
            attempt.todo, request.source, preparation, models, keep=CAPTIONING_COLUMNS, images_todo=attempt.count,
            batch_size=batch_size,
            checkpoint=attempt.checkpoint, remembered=failures.remembered(request),
        )  # fmt: skip
        common = (images.batch_size, images.report)
        return images.through(
            partial(Caption, images.models, config.captioner, CAPTIONING_COLUMNS, *common),
            partial(Embed, images.models, config, schema.CAPTIONS, *common),
        )

    return Work(
        title="caption",
        stages=("prepared", "captioned", "embedded"),
        stream=stream,
        known=catalog.published(request.out, schema.CAPTIONED, products.CAPTIONS, captioner_id=models.captioner_id),
        captioner_id=models.captioner_id,
        details={
            models.run_id: {
                "captioner_id": models.captioner_id,
                "settings": {"captioner": to_dict(config.captioner)},
            }
        },
    )


def examining(request: Request, *, limits: DecodeLimits) -> Work:
    """Images to facts, without a model; the request's transforms are alignments."""

    def stream(attempt: Attempt) -> Stream:
        preparation = PreparationConfig(patches=(), fingerprint=True, limits=limits, aligned=True)
        return prepared(
            attempt.todo, request.source, preparation, Models(), keep=schema.FACTS, images_todo=attempt.count,
            batch_size=1,
            checkpoint=attempt.checkpoint, remembered=failures.remembered(request),
        )  # fmt: skip

    return Work(title="examine", stages=("prepared",), stream=stream, uses_models=False)
