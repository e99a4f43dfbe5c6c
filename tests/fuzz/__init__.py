"""Mutated files by the thousand: nothing in them runs, stops the program, or takes memory or time without bound.

    make fuzz                             all of them: 5,000 images, 3,000 tars, 1,000 Parquet files, 500 bundles
    python -m tests.fuzz tars             all of one kind
    python -m tests.fuzz tars:1234        one case again, for which its input is kept
    python -m tests.fuzz images:0-999     some

A case is a function of its kind and number alone, with one release of the libraries that encode the whole files. What
once failed is in `seeds.json`, with a line on why, and is always tried; as long as the mutations are what they are. Each
such case has a test of its own beside the code it is about, which does not depend on them.

Each kind is a module with `write(seed, folder)`, which makes the input, `run(folder)`, which uses it as the program does
and returns the outcome in words, or raises, and `close()`. They run in processes of their own (`driver`), which stand
for the program's driver: `campaign` watches them from outside.
"""

from typing import Final

KINDS: Final = {"images": 5000, "tars": 3000, "tables": 1000, "bundles": 500}
"""Kind -> number of cases."""
ESCAPE: Final = "/tmp/nsnet-fuzz-escape"
"""Folder that payloads make. Never there."""
