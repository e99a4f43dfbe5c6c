"""Rates with round numbers, so that plans can be computed by hand."""

from dataclasses import replace
from typing import Any

from jobs.planning.plan import Workload
from jobs.planning.rates import Rates, RatesFile

RATES = Rates(
    prepare_images_per_s=50.0,
    prepare_megapixels=1.0,
    prepare_fixed_seconds=0.005,
    fetch_images_per_s=200.0,
    fetch_bytes_per_s=1e8,
    caption_images_per_s=100.0,
    score_images_per_s=100.0,
    both_images_per_s=None,
    write_images_per_s=1000.0,
    serial_images_per_s=1000.0,
    startup_seconds=60.0,
    efficiency=0.5,
    task_bytes=1e9,
    actor_bytes=4e9,
    store_image_bytes=500_000.0,
)
"""With `WORKLOAD` an image takes 30 ms of a CPU (5 + 5 of fetching, 20 of decoding) and 20 ms of a GPU."""
WORKLOAD = Workload(images=1_000_000, megapixels=1.0, image_bytes=500_000)
FIXED_SECONDS = 1_060.0
"""Seconds of `WORKLOAD` for start-up, listing and publishing."""
HOURS = (FIXED_SECONDS + 10_000.0) / 3600.0
"""A deadline that leaves 10,000 s for the stream: 100 images/s."""


def file_of(rates: Rates = RATES, **values: Any) -> RatesFile:
    """A file of these rates."""
    file = RatesFile(
        machine="a machine", date="2026-11-29", precision="bf16", versions={"ray": "2.60.0"}, measured=(), rates=rates
    )
    return replace(file, **values)
