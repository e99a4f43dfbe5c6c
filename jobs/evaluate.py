"""`nsnet evaluate`: verdicts against labels, per generator and as the unweighted mean over generators."""

from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import console, storage
from jobs.console import say
from nsnet import metrics
from nsnet.errors import ConfigError, SourceError

COLUMNS: Final = ("acc", "real_acc", "fake_acc", "ap", "auroc", "tpr_at_fpr_1")
NEEDED: Final = ("label", "generator", "prob_fake", "verdict", "status", "detector_id")
NO_GENERATOR: Final = "(none)"


@click.command()
@click.argument("verdicts_or_source", metavar="VERDICTS_OR_SOURCE")
@click.option("--out", required=True, help="Folder for evaluation.json and evaluation.txt.")
@click.option("--detector", default=None, help="Bundle that scores the pictures, when a labelled source is given.")
@click.option("--detector-id", default=None, help="Only verdicts of this detector, where several have scored.")
@console.weights_options
@console.address_option
def command(verdicts_or_source: str, out: str, **options: Any) -> int:
    """Compare published verdicts (an output of `nsnet score`, or a Parquet file of it) with their labels.

    Given a labelled source of pictures instead, with --detector, scores it first, below OUT.
    """
    evaluate(verdicts_or_source, out=out, **options)
    return 0


def evaluate(
    verdicts_or_source: str,
    *,
    out: str,
    detector: str | None = None,
    detector_id: str | None = None,
    clip_weights: str | None = None,
    captioner: str | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Evaluate and write the result; returns it. Raises `SourceError` where there is nothing to compare."""
    uri, out = storage.absolute(verdicts_or_source), storage.absolute(out)
    storage.reachable(uri)
    storage.check_output(out)
    table = _verdicts(uri)
    if table is None:
        if detector is None:
            raise SourceError(f"{uri} holds no published verdicts; to score its pictures first, give --detector")
        from jobs.score import score

        scored = storage.join(out, "scored")
        score(uri, detector=detector, out=scored, clip_weights=clip_weights, captioner=captioner, address=address)
        table = _verdicts(scored)
        assert table is not None
    if detector_id is not None:
        table = table.filter(pc.equal(table.column("detector_id"), detector_id))
        if table.num_rows == 0:
            raise ConfigError(f"{uri} holds no verdict of detector {detector_id}")
    detectors = sorted(set(table.column("detector_id").to_pylist()))
    if len(detectors) > 1:
        raise ConfigError(f"verdicts of several detectors ({', '.join(detectors)}): choose one with --detector-id")
    result = {"verdicts": uri, "detector_id": detectors[0] if detectors else None, **compare(table)}
    text = as_text(result)
    storage.write_json(storage.join(out, "evaluation.json"), result)
    storage.write_bytes(storage.join(out, "evaluation.txt"), (text + "\n").encode())
    click.echo(text)
    say(f"table: {storage.join(out, 'evaluation.json')}")
    return result


def compare(table: pa.Table) -> dict[str, Any]:
    """Metrics of verdict rows (`schema.VERDICTS`) per generator, and their unweighted mean."""
    labelled = table.filter(pc.is_valid(table.column("label")))
    if labelled.num_rows == 0:
        raise SourceError("no verdict has a label: nothing can be compared")
    scored = labelled.filter(pc.equal(labelled.column("status"), "scored"))
    labels = scored.column("label").to_numpy().astype(np.int64)
    probabilities = scored.column("prob_fake").to_numpy()
    said_fake = np.array([verdict == "fake" for verdict in scored.column("verdict").to_pylist()])
    generators = np.array([name or NO_GENERATOR for name in scored.column("generator").to_pylist()])
    groups = {
        name: _metrics(labels[generators == name], probabilities[generators == name], said_fake[generators == name])
        for name in sorted(set(generators))
    }
    return {
        "generators": groups,
        "macro_mean": {column: _mean([group[column] for group in groups.values()]) for column in COLUMNS},
        "all": _metrics(labels, probabilities, said_fake),
        "failed": labelled.num_rows - scored.num_rows,
        "without_label": table.num_rows - labelled.num_rows,
    }


def _metrics(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], said_fake: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Accuracies are of the verdicts, that is at the detector's own threshold; the rest is of the probabilities."""
    acc, real_acc, fake_acc = metrics.accuracies(labels, said_fake.astype(np.float64))
    return {
        "real": int((labels == 0).sum()),
        "fake": int((labels == 1).sum()),
        "acc": acc,
        "real_acc": real_acc,
        "fake_acc": fake_acc,
        "ap": metrics.average_precision(labels, probabilities),
        "auroc": metrics.auroc(labels, probabilities),
        "tpr_at_fpr_1": metrics.tpr_at_fpr(labels, probabilities, 0.01),
    }


def _mean(values: list[float | None]) -> float | None:
    """Mean over the generators for which the metric is defined."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def as_text(result: dict[str, Any]) -> str:
    """The table for people, worst accuracy first."""
    heading = ["generator", "real", "fake", "acc", "real_acc", "fake_acc", "AP", "AUROC", "TPR@1%FPR"]
    groups = sorted(result["generators"].items(), key=lambda item: (item[1]["acc"] is None, item[1]["acc"], item[0]))
    rows = [[console.printable(name), str(group["real"]), str(group["fake"]), *_cells(group)] for name, group in groups]
    rows.append(["macro mean", "", "", *_cells(result["macro_mean"])])
    widths = [max(len(row[i]) for row in [heading, *rows]) for i in range(len(heading))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [heading, *rows]
    ]
    lines.insert(1, "-" * len(lines[0]))
    if result["failed"]:
        lines.append(f"{result['failed']} labelled pictures failed and are in no number above")
    if result["without_label"]:
        lines.append(f"{result['without_label']} pictures have no label and are in no number above")
    if any(cell == UNDEFINED for row in rows for cell in row):
        lines.append(f"{UNDEFINED}: undefined, one class only")
    return "\n".join(lines)


UNDEFINED: Final = "–"


def _cells(group: dict[str, Any]) -> list[str]:
    return [UNDEFINED if group[column] is None else f"{group[column]:.4f}" for column in COLUMNS]


def _verdicts(uri: str) -> pa.Table | None:
    """Verdict rows of a published output or a Parquet file; None if it holds none.

    A picture that several runs have judged counts once, as the newest run has it.
    """
    from jobs import ledger

    if uri.lower().endswith(".parquet"):
        system, path = storage.arrow_filesystem(uri)
        if not storage.exists(uri):
            raise SourceError(f"there is no {uri}")
        try:
            names = set(pq.read_schema(path, filesystem=system).names)
        except (OSError, ValueError) as error:
            raise SourceError(f"{uri} is no Parquet file: {error}") from error
        if not set(NEEDED) <= names:
            return None
        return pq.read_table(path, columns=list(NEEDED), filesystem=system)
    if not storage.is_folder(uri):
        raise SourceError(f"there is no {uri}")
    if not ledger.runs(uri):
        return None
    table = ledger.verdicts(uri).to_table(columns=[*NEEDED, "image_id"])
    pictures = zip(table.column("image_id").to_pylist(), table.column("detector_id").to_pylist(), strict=True)
    newest = {picture: row for row, picture in enumerate(pictures)}  # the oldest run comes first
    return table.take(list(newest.values()))


if __name__ == "__main__":
    console.run(command, "nsnet evaluate")
