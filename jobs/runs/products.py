"""Products of runs: three kinds of rows, and the folders of their files."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

import pyarrow as pa

from jobs.dataset import schema


@dataclass(frozen=True, kw_only=True)
class Product:
    """A kind of rows that runs publish."""

    name: str
    """Folder below an output."""
    columns: pa.Schema
    maker: str
    """Record key that names the maker of the rows; a maker does not do an image again."""
    rows_per_file: int
    """Makes files of about 100 MB, a good size for query engines."""


VERDICTS: Final = Product(name="verdicts", columns=schema.VERDICTS, maker="detector_id", rows_per_file=500_000)
CAPTIONS: Final = Product(name="captions", columns=schema.CAPTIONS, maker="features_id", rows_per_file=40_000)
FACTS: Final = Product(name="facts", columns=schema.FACTS, maker="facts_id", rows_per_file=500_000)
PRODUCTS: Final = {product.name: product for product in (VERDICTS, CAPTIONS, FACTS)}


def final_folder(product: str, run_id: str) -> str:
    """Folder of a run's published files, as the path below its output."""
    date = datetime.strptime(run_id[:8], "%Y%m%d").date()
    return f"{product}/run_date={date.isoformat()}/run_id={run_id}"
