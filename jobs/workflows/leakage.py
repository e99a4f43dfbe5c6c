"""Measure by a sample of scored images what a detector's features say of their content.

Dimensions: n images of the sample, B images of a model call, M mosaic side, D embedding.

Published verdicts hold no features, so the images of the sample are read and encoded a second time, in this process.
An image costs what decoding and scoring it cost, on a GPU if this machine has one.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.dataset import schema
from jobs.dataset.path_labels import object_class
from jobs.evaluation.groups import UNTRANSFORMED, transforms_of
from jobs.pipeline.models import Models
from jobs.runs import catalog
from jobs.storage import parquet
from jobs.storage.uris import Uri

if TYPE_CHECKING:
    from jobs.pipeline.preparing import Prepare

BATCH: Final = 32
PUBLISHED: Final = pa.schema([schema.VERDICTS.field(name) for name in ("image_id", "caption", "content_hash")])


def draw(table: pa.Table, count: int, seed: int = 0) -> set[str]:
    """Ids of at most `count` labelled, untransformed images of these verdicts that were scored."""
    usable = pc.and_(pc.is_valid(table.column("label")), pc.equal(transforms_of(table), UNTRANSFORMED))
    usable = pc.and_(usable, pc.equal(table.column("status"), "scored"))
    ids = sorted(table.column("image_id").filter(usable).to_pylist())
    return set(np.random.default_rng(seed).permutation(np.array(ids, dtype=object))[:count].tolist())


def measure(
    manifest: str, wanted: set[str], source: Uri, published: Uri, detector_id: str, models: Models
) -> dict[str, Any]:
    """`nsnet.leakage.leakage` of the wanted images of a manifest, with the captions of their published verdicts.

    Files with the same bytes are in one fold. Images that cannot be read now are left out.
    """
    rows = _only(parquet.read(manifest, schema.MANIFEST), schema.MANIFEST, wanted)
    found = _only(catalog.newest(published, PUBLISHED, detector_id=detector_id), PUBLISHED, wanted).to_pylist()
    known = {row["image_id"]: row for row in found}
    names = [
        object_class(row["uri"].removeprefix(source.rstrip("/"))[1:], row["generator"]) for row in rows.to_pylist()
    ]
    return _probed(rows, names, known, source, models)


def _only(batches: Any, columns: pa.Schema, wanted: set[str]) -> pa.Table:
    ids = pa.array(sorted(wanted), pa.string())
    kept = [batch.filter(pc.is_in(batch.column("image_id"), value_set=ids)) for batch in batches]
    return pa.Table.from_batches(kept, columns).sort_by("image_id")


def _closing(prepare: "Prepare", rows: pa.Table) -> Iterator[pa.Table]:
    try:
        yield from prepare.in_blocks(rows)
    finally:
        prepare.close()


def _probed(
    rows: pa.Table, names: list[str | None], known: Mapping[str, Mapping[str, Any]], source: Uri, models: Models
) -> dict[str, Any]:
    import torch

    from jobs.pipeline.pixels import MOSAIC, gather
    from jobs.pipeline.preparing import Prepare
    from nsnet.detector import Detector
    from nsnet.leakage import leakage, object_classes
    from nsnet.preparation import PreparationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    detector = Detector.load(
        models.bundle_folder(), device=device, captioner=False, sha256=models.detector_sha256, **models.tower_paths(),
    )  # fmt: skip
    config = PreparationConfig(patches=(detector.config.patches,))
    columns = pa.schema([schema.IDS.field(0), *schema.OUTCOME, pa.field(MOSAIC, pa.binary())])
    prepare = Prepare(config=config, schema=columns, source=source)
    side = detector.config.patches.mosaic_px
    text_tower = detector.text_clip if detector.config.text_tower is not None else None
    text_dim = text_tower.embed_dim if text_tower is not None else 0
    kept: list[str] = []
    parts: dict[str, list[Any]] = {"image": [], "projected": [], "text": []}
    for block in _closing(prepare, rows):
        ids, status = block.column("image_id").to_pylist(), block.column("status").to_pylist()
        needs = detector.config.projection.needs_captions
        good = [
            i for i, name in enumerate(ids)
            if status[i] != "failed" and name in known and (known[name]["caption"] is not None or not needs)
        ]  # fmt: skip
        for start in range(0, len(good), BATCH):
            batch = good[start : start + BATCH]
            captions = [known[ids[i]]["caption"] for i in batch]
            out = detector.features(gather(block, MOSAIC, batch, (len(batch), side, side, 3)), captions)
            text = np.full((len(batch), text_dim), np.nan)
            if text_tower is not None and None not in captions:
                text = detector.text_features.of(captions).cpu().numpy()
            for name, values in (("image", out.image.cpu().numpy()), ("projected", out.projected.cpu().numpy())):
                parts[name].append(values)
            parts["text"].append(text)
            kept += [ids[i] for i in batch]
    places = {name: place for place, name in enumerate(rows.column("image_id").to_pylist())}
    chosen = [places[name] for name in kept]
    features = {name: np.concatenate(values or [np.zeros((0, 0))]) for name, values in parts.items()}
    return leakage(
        features["image"], features["projected"], features["text"], labels=rows.column("label").take(chosen).to_numpy(),
        classes=object_classes([names[i] for i in chosen]), groups=[known[name]["content_hash"] for name in kept],
    )  # fmt: skip
