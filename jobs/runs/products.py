"""What runs publish: rows of three kinds, and the folders of their files."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

import pyarrow as pa

from jobs.dataset import schema


@dataclass(frozen=True, kw_only=True)
class Product:
    """Rows of one kind, which runs publish."""

    name: str
    """Folder below an output."""
    columns: pa.Schema
    maker: str
    """Key of a record that says who made its rows: what one maker has done is not done again."""
    rows_per_file: int
    """About 100 MB: what query engines like to read."""


VERDICTS: Final = Product(name="verdicts", columns=schema.VERDICTS, maker="detector_id", rows_per_file=500_000)
CAPTIONS: Final = Product(name="captions", columns=schema.CAPTIONS, maker="features_id", rows_per_file=40_000)
FACTS: Final = Product(name="facts", columns=schema.FACTS, maker="facts_id", rows_per_file=500_000)
PRODUCTS: Final = {product.name: product for product in (VERDICTS, CAPTIONS, FACTS)}


def final_folder(product: str, run_id: str) -> str:
    """Folder of a run's published files, as the path below its output."""
    date = datetime.strptime(run_id[:8], "%Y%m%d").date()
    return f"{product}/run_date={date.isoformat()}/run_id={run_id}"
