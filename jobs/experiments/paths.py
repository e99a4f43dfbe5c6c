"""Names of files at the place of a training."""

from typing import Final

PREDICTIONS: Final = "predictions.parquet"
RESULT: Final = "result.json"
SETTINGS: Final = "settings.json"
"""Where a training's place says what it is of; from then on the place belongs to it."""
SPLIT: Final = "split.parquet"
UNREADABLE: Final = "unreadable.json"
FITTED: Final = "fitted.safetensors"
