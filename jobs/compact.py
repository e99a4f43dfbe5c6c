"""`nsnet compact`: merge the small files of many runs into larger ones; readers see each row once throughout."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import click

from jobs.console import main, output, parameters
from jobs.runs.compaction import GRACE_SECONDS, Result, compact
from jobs.runs.products import PRODUCTS
from jobs.storage import probes
from jobs.storage.uris import Uri
from nsnet.errors import ConfigError

ALL = "all"


@click.command()
@click.argument("out", type=parameters.URI)
@click.option(
    "--product", type=click.Choice([ALL, *PRODUCTS]), default=ALL, show_default=True, help="The rows to compact."
)
@click.option("--before", type=click.DateTime(["%Y-%m-%d"]), help="Only runs before this day (UTC).")
@click.option("--older-than", type=parameters.DURATION, help="Only runs that are at least so old, such as 30d.")
@click.option(
    "--target-rows", type=parameters.COUNT,
    help="Largest number of rows of a merged file. Default: 500,000; of captions 40,000.",
)  # fmt: skip
@click.option(
    "--grace", type=parameters.DURATION, default=f"{GRACE_SECONDS / 3600:.0f}h", show_default=True,
    help="How long records and files stay after they were merged, for readers that began before.",
)  # fmt: skip
@click.option("--wait", is_flag=True, help="Wait while a run writes to OUT.")
@click.option("--dry-run", is_flag=True, help="Only print what would be merged.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@parameters.debug_option
def command(
    out: Uri, product: str, before: datetime | None, older_than: float | None, target_rows: int | None, grace: float,
    wait: bool, dry_run: bool, as_json: bool,
) -> int:  # fmt: skip
    """Merge the records and files of many small runs in OUT, an output of `nsnet score`, `caption` or `audit`.

    All rows and the history of all runs stay. The first `nsnet compact` after the grace removes what was merged.
    """
    if before is not None and older_than is not None:
        raise ConfigError("--before and --older-than both name a day: give one of them")
    if older_than is not None:
        before = datetime.now(UTC) - timedelta(seconds=older_than)
    probes.reachable(out)
    result = compact(
        out,
        products=[*PRODUCTS.values()] if product == ALL else [PRODUCTS[product]],
        before=None if before is None else f"{before:%Y%m%dT%H%M%SZ}",
        target_rows=target_rows,
        grace_seconds=grace,
        wait=wait,
        dry_run=dry_run,
    )
    output.show_json(asdict(result)) if as_json else output.show(_as_text(result, dry_run))
    return 0


def _as_text(result: Result, dry_run: bool) -> str:
    """The result for the console."""
    lines = [
        f"{'would merge' if dry_run else 'merged'} {merge['runs']:,} runs of {merge['product']} "
        f"({merge['first_run']} to {merge['last_run']}, {merge['rows']:,} rows): {merge['records']:,} records and "
        f"{merge['files']:,} files" + ("" if dry_run else f" into {merge['run_id']}, {merge['files_after']} file")
        for merge in result.merged
    ]
    lines = lines or ["nothing to merge"]
    if result.removed_records:
        lines.append(f"removed {result.removed_records:,} records and {result.removed_files:,} files merged earlier")
    if result.waiting_records:
        lines.append(f"{result.waiting_records:,} merged records and their files stay until their grace is over")
    return "\n".join(lines)


if __name__ == "__main__":
    main.program(command, "nsnet compact")
