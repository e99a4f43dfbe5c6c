"""Published runs of given rows, without a cluster: many nights of an output in seconds."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from jobs.dataset.manifest import image_id
from jobs.runs import publication
from jobs.runs.products import VERDICTS, Product
from jobs.runs.publication import Run
from jobs.storage import writing
from tests.support.tables import batches, verdict_row

CAPTIONER = "c" * 16


def run_id(night: int, maker: int = 0) -> str:
    """The id of a maker's run of a night, in the order of both."""
    time = datetime(2026, 1, 1, 1, tzinfo=UTC) + timedelta(days=night, seconds=maker)
    return f"{time:%Y%m%dT%H%M%SZ}-{maker:06x}"


def publish(
    out: str, name: str, rows: Sequence[dict[str, Any]], product: Product = VERDICTS, **details: Any
) -> dict[str, Any]:
    """Write the files and the record of a run of this id, as `Run.publish` does after it has verified the rows.

    `details`: keys of the record, such as the maker.
    """
    run, counts = Run(out=out, run_id=name, product=product), publication.Counts()
    own = ({**row, "run_id": name} for row in rows)
    written = publication.write_parts(counts.watch(batches(own, product.columns)), product, run.final)
    files = [{**file, "path": file["path"].removeprefix(out + "/")} for file in written]
    given = {"source": "s3://in", "seconds": 10.0, "left_out": {}, "captioner_id": CAPTIONER, **details}
    record = run._describe(counts, files, given)
    writing.write_json(run.record, record)
    return record


def night_rows(night: int, count: int, detector_id: str = "d" * 16, **values: Any) -> list[dict[str, Any]]:
    """Verdicts on a night's new images; the first of every 20 failed."""
    return [
        verdict_row(
            f"s3://in/{night:04d}/{i}.jpg",
            None if i % 20 == 0 else (i * 7919 + night * 104729) % 1000 / 1000,
            image_id=image_id(f"s3://in/{night:04d}/{i}.jpg", ""),
            detector_id=detector_id,
            caption=f"image {i} of night {night}",
            caption_id=f"{CAPTIONER}-{night}-{i}",
            caption_run_id=run_id(night),
            content_hash=f"{night:032x}{i:032x}",
            size_bytes=1000 + i,
            requests=1,
            residual_energy=0.5,
            **values,
        )
        for i in range(count)
    ]
