"""File names in a training's folder."""

from typing import Final

PREDICTIONS_FILE: Final = "predictions.parquet"
RESULT_FILE: Final = "result.json"
LEAKAGE_FILE: Final = "leakage.json"
SETTINGS_FILE: Final = "settings.json"
"""Settings of the training that the folder belongs to."""
SPLIT_FILE: Final = "split.parquet"
UNREADABLE_FILE: Final = "unreadable.json"
FITTED_FILE: Final = "fitted.safetensors"
