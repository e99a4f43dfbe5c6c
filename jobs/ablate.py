"""`nsnet ablate`: variants of a recipe, trained and tested on one split with the same seeds, in one table."""

import re
from dataclasses import replace
from typing import Any, Final

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import console, parquet, results, storage
from jobs.console import say
from jobs.request import TrainRequest
from jobs.train import PREDICTIONS, RESULT, WorkersType, train
from nsnet import metrics
from nsnet.errors import ConfigError, NullSpaceError
from nsnet.images import DecodeLimits

VARIANTS: Final = (
    "linear", "no-projection", "original:energy=0.5", "original:energy=0.9", "original:energy=0.99", "advanced",
    "no-mapper", "no-alignment", "constant-caption", "shuffled-captions",
)  # fmt: skip
"""What is compared unless it is said otherwise: ranks of `original` by energy, so that they suit any embedding."""
SHOWN: Final = ("ap", "auroc", "acc")


@click.command()
@click.argument("source")
@click.option("--out", required=True, help="Folder or s3:// URI for trainings and table.")
@click.option("--recipe", default="tiny", show_default=True, help="tiny, vit-l-14, or an open_clip MODEL[:TAG].")
@click.option("--variant", "variants", multiple=True, help=f"Of the recipe; several. Default: {', '.join(VARIANTS)}.")
@click.option("--seeds", default="0", show_default=True, help="Seeds of weights and order, such as 0,1,2.")
@click.option("--split-seed", type=int, default=0, show_default=True, help="Seed of the split, the same for all.")
@click.option("--workers", type=WorkersType(), default="1", show_default=True, help="Training processes: N, or 2-8.")
@click.option("--epochs", type=int, default=None, help="Passes over the pictures; default: the recipe's.")
@click.option("--batch-size", type=int, default=None, help="Images per step over all workers; default: the recipe's.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other setting of TrainingConfig.")
@click.option("--captions", default=None, help="Where nsnet caption published; default: captions are made below OUT.")
@click.option("--leave-out", default=None, metavar="GENERATOR", help="Test on this generator, train on the others.")
@console.weights_options
@console.limit_options
@console.address_option
def command(source: str, variants: tuple[str, ...], seeds: str, **options: Any) -> int:
    """Train variants of a recipe on SOURCE, test them on the same pictures, and print one table with intervals.

    What was finished is kept: the same command continues.
    """
    limits = console.limits_from(options)
    try:
        numbers = tuple(int(part) for part in seeds.split(","))
    except ValueError:
        raise ConfigError(f"--seeds {seeds}: give numbers such as 0,1,2") from None
    ablate(source, variants=variants or VARIANTS, seeds=numbers, limits=limits, **options)
    return 0


def ablate(
    source: str,
    *,
    out: str,
    variants: tuple[str, ...] = VARIANTS,
    seeds: tuple[int, ...] = (0,),
    split_seed: int = 0,
    limits: DecodeLimits | None = None,
    captions: str | None = None,
    leave_out: str | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Train and test each variant with each seed; returns the table. What is wrong with a request is found first."""
    from jobs.groundwork import share_split

    out = storage.absolute(out)
    shared = TrainRequest(
        source=source, out=storage.join(out, "shared"), captions=captions or storage.join(out, "captions"),
        caption_missing=captions is None, seed=split_seed, leave_out=leave_out, limits=limits or DecodeLimits(),
        **training,
    ).absolute()  # fmt: skip
    requests = [
        replace(shared, out=storage.join(out, _name(variant, seed)), variant=variant, seed=seed, leave_out=None)
        for variant in variants
        for seed in seeds
    ]
    for request in requests:
        request.resolved()
    split = share_split(shared)
    failed: dict[str, str] = {}
    for number, request in enumerate(requests, start=1):
        say(f"ablate: {number} of {len(requests)}: {request.variant}, seed {request.seed}")
        if storage.exists(storage.join(request.work, RESULT)):
            continue
        try:
            train(replace(request, split=split, caption_missing=False))
        except NullSpaceError as error:  # of this variant alone; anything else ends the command
            say(f"  {error}")
            failed[request.variant] = str(error)
    rows = [_row(variant, [r for r in requests if r.variant == variant], failed) for variant in variants]
    result = {"source": shared.source, "recipe": shared.recipe, "seeds": list(seeds), "split": split, "variants": rows}
    text = as_text(rows)
    storage.write_json(storage.join(out, "ablation.json"), result)
    storage.write_bytes(storage.join(out, "ablation.txt"), (text + "\n").encode())
    click.echo(text)
    say(f"table: {storage.join(out, 'ablation.json')}")
    return result


def _name(variant: str, seed: int) -> str:
    return f"{re.sub(r'[^0-9A-Za-z.-]+', '-', variant)}-seed{seed}"


def _row(variant: str, requests: list[TrainRequest], failed: dict[str, str]) -> dict[str, Any]:
    """What is known of a variant: the mean over its seeds, with intervals over the test pictures."""
    if variant in failed:
        return {"variant": variant, "error": failed[variant]}
    told = [storage.read_json(storage.join(request.work, RESULT)) for request in requests]
    tested = [_tested(storage.join(request.work, PREDICTIONS)) for request in requests]
    return {
        "variant": variant,
        "residual_energy": float(np.mean([one["best_epoch"]["residual_energy"] for one in told])),
        "validation_ap": float(np.mean([one["best_epoch"]["val_ap"] for one in told])),
        "best_epochs": [one["best_epoch"]["epoch"] for one in told],
        "test": _intervals(tested),
    }


def _tested(uri: str) -> pa.Table:
    """Predictions on the test pictures, ordered by picture."""
    table = pa.Table.from_batches(parquet.read(uri, results.PREDICTIONS), results.PREDICTIONS)
    return table.filter(pc.equal(table.column("split"), "test")).sort_by("image_id")


def _intervals(tables: list[pa.Table]) -> dict[str, Any] | None:
    """Metric -> value, low and high, over pictures that all seeds have judged; None where nothing was kept for testing.

    The interval is over test pictures, not over seeds: the same pictures are drawn for all seeds and all variants.
    """
    ids = pa.array(sorted(set.intersection(*(set(table.column("image_id").to_pylist()) for table in tables))))
    tables = [table.filter(pc.is_in(table.column("image_id"), value_set=ids)) for table in tables]
    if not len(ids):
        return None
    labels = tables[0].column("label").to_numpy()
    probabilities = np.stack([table.column("prob_fake").to_numpy() for table in tables])
    said = np.stack([pc.equal(table.column("verdict"), "fake").to_numpy() for table in tables])
    values = metrics.summary(labels, probabilities, said)
    bounds = metrics.intervals(metrics.bootstrap(labels, probabilities, said))
    return {"pictures": len(ids)} | {
        name: {"value": values[name], "low": bound and bound[0], "high": bound and bound[1]}
        for name, bound in bounds.items()
    }


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table for people, in the order of the variants."""
    heading = ["variant", "residual energy", "validation AP", *(f"test {name}" for name in SHOWN)]
    cells = [[row["variant"], *_cells(row)] for row in rows]
    widths = [max(len(line[i]) for line in [heading, *cells]) for i in range(len(heading))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in
             [heading, *cells]]  # fmt: skip
    lines.insert(1, "-" * max(map(len, lines)))
    lines += [f"{row['variant']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return ["failed", *[""] * (len(SHOWN) + 1)]
    told = [f"{row['residual_energy']:.3f}", f"{row['validation_ap']:.4f}"]
    for name in SHOWN:
        found = (row["test"] or {}).get(name) or {"value": None, "low": None}
        if found["value"] is None or found["low"] is None:
            told.append("undefined")
        else:
            told.append(f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]")
    return told


if __name__ == "__main__":
    console.run(command, "nsnet ablate")
