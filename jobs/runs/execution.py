"""Carry out runs of any product: lock the output, plan or continue, make rows, verify, publish, write the record.

`score`, `caption` and `examine` differ in the rows they make; this module ensures that no image is lost or done twice.
Several detectors that score a source in one pass have a run each, with its own plan, rows and record; they share the
listing, the lock and the attempts.
"""

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from jobs.console.output import lines_of_run, mark, say
from jobs.dataset import schema
from jobs.dataset.plan import Selection, Target, write_manifests
from jobs.runs import attempts, catalog, lock, products, publication, reporting
from jobs.runs.products import Product
from jobs.runs.publication import Run
from jobs.runs.records import stored
from jobs.runs.retirement import remove_broken
from jobs.storage import uris, writing
from jobs.storage.uris import Uri
from nsnet.config import to_dict

if TYPE_CHECKING:  # importing Ray takes seconds, and a run with nothing to do does not need it
    from jobs.pipeline.stream import Stream

RECORDED_PACKAGES: Final = (
    "nsnet", "ray", "torch", "open_clip_torch", "transformers", "peft", "pillow", "numpy", "scipy"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of a run."""

    source: Uri
    out: Uri
    product: Product
    maker: str
    """Maker of the rows, such as a detector's id: images that it has published are not done again."""
    settings: dict[str, Any]
    """Identity of the run: an unpublished run with equal settings is continued."""
    selection: Selection = field(default_factory=Selection)
    transforms: tuple[str, ...] = ()
    """Chains of `nsnet.transforms` to process each image under; "" is no transform. Empty: no transforms."""
    wait: bool = False
    """Wait while another run writes to the output."""
    address: str | None = None
    """The Ray cluster."""

    def identity(self) -> dict[str, Any]:
        """The settings as they read back from JSON."""
        settings = {
            "source": self.source,
            self.product.maker: self.maker,
            "selection": to_dict(self.selection),
            **({"transforms": self.transforms} if self.transforms else {}),
            **self.settings,
        }
        values: dict[str, Any] = json.loads(json.dumps(settings))
        return values


@dataclass(frozen=True, kw_only=True)
class Work:
    """The pipeline that turns images into rows; created only if there is work, since its imports take seconds."""

    title: str
    """Verb of the progress line."""
    stages: tuple[str, ...]
    """Counts of the progress line, in the order of the pipeline."""
    stream: Callable[[attempts.Attempt], "Stream"]
    """Makes the pipeline over an attempt's images; called when the cluster is connected."""
    uses_models: bool = True
    """Whether the rows depend on models and their arithmetic."""
    known: Iterable[pa.RecordBatch] = ()
    """Published captions (`schema.CAPTIONED`)."""
    captioner_id: str = ""
    """Captioner whose captions are reused."""
    details: Mapping[str | None, dict[str, Any]] = field(default_factory=dict)
    """Further keys of the record, by run id."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run of a request, with its plan."""

    request: Request
    run: Run
    published: list[str]
    """Runs of its maker that were published before it was planned."""
    plan: dict[str, Any]

    @property
    def count(self) -> int:
        """Number of planned images."""
        return int(self.plan["count"])


def carry_out(request: Request, make_work: Callable[[Run], Work]) -> dict[str, Any]:
    """Make the missing rows and publish them; returns the record, which has no files if there was nothing to do."""
    (record,) = carry_out_together([request], lambda planned: make_work(planned[0].run))
    return record


def carry_out_together(
    requests: Sequence[Request], make_work: Callable[[Sequence[Planned]], Work]
) -> list[dict[str, Any]]:
    """Carry out requests that differ only in their maker in one pass; returns the record of each.

    `make_work` gets the runs with images to do, the leader of their attempts first.
    """
    started, shared = time.monotonic(), requests[0]
    with ExitStack() as context:
        mark(stage="planning")
        held = context.enter_context(lock.hold(shared.out, wait=shared.wait))
        by_maker = {planned.request.maker: planned for planned in _unfinished(requests, held.check)}
        by_maker |= _plan([request for request in requests if request.maker not in by_maker], held)
        at_work = {planned.run.staging: planned for planned in by_maker.values() if planned.count}
        at_work = {staging: at_work[staging] for staging in attempts.led(at_work)}
        context.enter_context(lines_of_run([*at_work.values(), *by_maker.values()][0].run.run_id))
        number, files, work, arithmetic = 0, [], None, {}
        if at_work:
            work = make_work([*at_work.values()])
            held.check()
            attempt = attempts.begin([*at_work], held.number, work.known, work.captioner_id)
            mark(attempt=attempt.number, stage=work.title)
            arithmetic = _make_rows(shared, work, attempt, [*at_work.values()])
            number, files = attempt.number, attempt.files()
        records = {}
        mark(stage="publishing")
        # the leader last: publishing a run removes its staging, and the leader's holds the rows of all
        for planned in [*(planned for planned in by_maker.values() if not planned.count), *reversed(at_work.values())]:
            run, details = planned.run, {}
            if work is not None and planned.count:
                details = {**work.details.get(run.run_id, {}), **arithmetic}
            records[planned.request.maker] = record = run.publish(
                uris.join(run.staging, attempts.MANIFEST_FILE),
                files if planned.count else [],
                check=held.check,
                planned_after=planned.published,
                details={
                    **_common_details(planned.request, planned.plan),
                    "attempts": number if planned.count else 0,
                    "seconds": round(time.monotonic() - started, 1),  # the last attempt only
                    **details,
                    "settings": {**planned.request.identity(), **details.get("settings", {})},
                },
            )
            if len(requests) > 1:
                say(f"{shared.product.maker} {planned.request.maker}:")
            if planned.count:
                say(catalog.summary(record))
                say(f"{shared.product.name}: {run.final}")
            say(f"record: {run.record}")
    # without the lock: the runs are published, so its loss means nothing any more, and others may wait for it
    reporting.report(shared.out, shared.product, [*records.values()], shared.address)
    return [records[request.maker] for request in requests]


def _common_details(request: Request, plan: dict[str, Any]) -> dict[str, Any]:
    """Keys of every record: the source, what was left out of it, the maker of the rows, and package versions."""
    return {
        "source": request.source,
        "left_out": plan["left_out"],
        "unread": plan["unread"],
        "unread_count": plan["unread_count"],
        "listing": plan["states"],
        request.product.maker: request.maker,
        "versions": {name: version(name) for name in RECORDED_PACKAGES} | {"python": platform.python_version()},
    }


def _make_rows(request: Request, work: Work, attempt: attempts.Attempt, planned: Sequence[Planned]) -> dict[str, Any]:
    """Make the rows of an attempt's images. Returns `arithmetic` for the record; empty if no row was left to make."""
    if attempt.accepted:
        most = max(run.count for run in planned)
        say(f"continuing run {', '.join(attempt.runs)}: {attempt.count:,} of {most:,} images are left")
    if attempt.count:
        from jobs.cluster import resources

        resources.connect(request.address)
        lock.export_leases()
        rows_per_file = attempts.commit_rows(attempt.count)
        stream = work.stream(attempt)
        stream.write(attempt.rows, work.title, attempt.count, work.stages, rows_per_file)
        return {"arithmetic": stream.arithmetic()} if work.uses_models else {}
    return {}


def _unfinished(requests: Sequence[Request], check: Callable[[], None] = lambda: None) -> list[Planned]:
    """The unfinished runs with these settings. Removes leftovers of published and interrupted runs. `check` raises if
    the lock is lost.

    Gives up an unfinished run if another run was published after its planning, since that may hold the same images.
    """
    resumable: list[Planned] = []
    out, product = requests[0].out, requests[0].product
    stored_records = remove_broken(out, stored(out), check)
    own_files = {record["run_id"]: record["files"] for record in stored_records}
    published = {run["run_id"] for run in catalog.runs_in(stored_records)}
    unfinished = attempts.unfinished(out)
    for run_id, planned in unfinished.items():
        if planned.get("product", products.VERDICTS.name) != product.name:
            continue
        run = Run(out=out, run_id=run_id, product=product)
        differing = min((_differing(planned["settings"], request.identity()) for request in requests), key=len)
        request = next((one for one in requests if one.identity() == planned["settings"]), None)
        if run_id in published:
            run.tidy(own_files.get(run_id, []))
        elif request is None:
            say(f"left alone: the unfinished run {run_id} has other settings ({', '.join(differing)}): {run.staging}")
        elif catalog.run_ids(out, product, request.maker) - set(planned["published"]):
            say(f"given up: the unfinished run {run_id}, since other runs were published after it was planned")
            run.abandon()
        else:
            resumable.append(Planned(request=request, run=run, published=planned["published"], plan=planned["plan"]))
    if orphans := publication.remove_orphans(out, stored_records, unfinished):
        say(f"removed: {len(orphans)} files of interrupted or overtaken publications, such as {orphans[0]}")
    return resumable


def _differing(settings: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(name for name in wanted.keys() | settings.keys() if settings.get(name) != wanted.get(name))


def _plan(requests: Sequence[Request], held: lock.Lock) -> dict[str, Planned]:
    """Plan new runs with one listing; returns them by maker. Writes `run.json` of those with work."""
    if not requests:
        return {}
    shared, product = requests[0], requests[0].product
    runs = [Run(out=shared.out, product=product) for _ in requests]
    published = [sorted(catalog.run_ids(shared.out, product, request.maker)) for request in requests]
    targets = [
        Target(
            uri=uris.join(run.staging, attempts.MANIFEST_FILE),
            published=catalog.published(shared.out, schema.DONE, product, **{product.maker: request.maker}),
        )
        for run, request in zip(runs, requests, strict=True)
    ]
    plans = write_manifests(shared.source, targets, shared.selection, shared.transforms)
    held.check()
    planned_runs = {}
    for request, run, before, plan in zip(requests, runs, published, plans, strict=True):
        say(f"source: {plan.describe()}" + (f", for {request.maker}" if len(requests) > 1 else ""))
        planned = Planned(
            request=request, run=run, published=before,
            plan={
                "count": plan.count,
                "left_out": plan.left_out,
                "unread": list(plan.unread_named),
                "unread_count": plan.unread,
                "states": plan.states,
            },
        )  # fmt: skip
        if plan.count:  # without work there is nothing to continue, and an interruption here counts as not planned
            values = {"product": product.name, "settings": request.identity(), "published": before}
            writing.write_json(uris.join(run.staging, attempts.RUN_FILE), {**values, "plan": planned.plan})
        planned_runs[request.maker] = planned
    return planned_runs
