"""`make fuzz`, or one case again."""

import sys
import tempfile
from pathlib import Path

from tests.fuzz import KINDS, campaign


def main() -> int:
    """Run what the arguments name; the exit code says whether all was as it must be."""
    folder = Path(tempfile.mkdtemp(prefix="nsnet-fuzz-"))
    failed = False
    for name in sys.argv[1:] or KINDS:
        kind, _, part = name.partition(":")
        first, _, last = part.partition("-")
        seeds = (
            range(int(first), int(last or first) + 1) if part else sorted({*range(KINDS[kind]), *campaign.kept(kind)})
        )
        summary = campaign.run(
            kind, seeds, folder / name, say=lambda line: print(line, flush=True), keep=len(seeds) == 1
        )
        print(*summary.notable, *(f"{case}: {what}" for case, what in summary.failures.items()), summary, sep="\n")
        failed |= bool(summary.failures)
    print(f"inputs of failures are in {folder}" if failed else "nothing failed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
