"""Names of files at the place of a training."""

from typing import Final

PREDICTIONS_FILE: Final = "predictions.parquet"
RESULT_FILE: Final = "result.json"
SETTINGS_FILE: Final = "settings.json"
"""Where a training's place says what it is of; from then on the place belongs to it."""
SPLIT_FILE: Final = "split.parquet"
UNREADABLE_FILE: Final = "unreadable.json"
FITTED_FILE: Final = "fitted.safetensors"
