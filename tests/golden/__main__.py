"""`make golden`: write the golden files anew, after a change that is meant to move the numbers."""

import json

from tests.golden.compute import FOLDER, computed


def text(value: object) -> str:
    """JSON with one step, or one image, per line."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[arg-type]
    lines = [(f"{json.dumps(key)}: " if isinstance(value, dict) else "") + json.dumps(row) for key, row in pairs]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(lines) + f"\n{closing}\n"


for name, value in computed().items():
    (FOLDER / name).write_text(text(value), encoding="utf-8")
    print(f"written: {FOLDER / name}")
