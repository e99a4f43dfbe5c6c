"""Mutated files by the thousand: nothing in them runs, stops the program, or takes memory or time without bound.

    make fuzz                             all of them: 5,000 images, 3,000 tars, 2,000 Parquet files, 500 bundles
    python -m tests.fuzz tars             all of one kind
    python -m tests.fuzz tars:1234        one case again, for which its input is kept
    python -m tests.fuzz images:0-999     some

A case is a function of its kind and number, with one release of the libraries that encode the whole files. What once
failed is in `seeds.json`, with a line on why, and is always tried. A number means another case once the mutations or
the whole files change: so each such failure has a test of its own beside the code it is about.

Each kind is a module with `write(seed, folder)`, which makes the input, `run(folder)`, which uses it as the program
does and returns the outcome in words, or raises, and `close()`. It runs in a process of its own (`driver`), which
stands for the program's driver and is watched from outside (`campaign`).
"""

import os
from typing import Any, Final

KINDS: Final = {"images": 5000, "tars": 3000, "tables": 1000, "products": 1000, "bundles": 500}
"""Kind -> number of cases."""
ESCAPE: Final = "nsnet-fuzz-escape"
"""Folder that payloads make where they run. Never there."""


class Payload:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (ESCAPE,)
