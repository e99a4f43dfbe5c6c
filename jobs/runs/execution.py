"""Carry out a run of any product: lock the output, plan or continue, make rows, verify, publish, write the record.

`score`, `caption` and `examine` differ in the rows they make; this module ensures that no image is lost or done twice.
"""

import json
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from jobs.console.output import lines_of_run, say
from jobs.dataset import schema
from jobs.dataset.plan import Selection, write_manifest
from jobs.runs import attempts, catalog, lock, products, publication
from jobs.runs.products import Product
from jobs.runs.publication import Run
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
            # settings of older runs lack columns: their unfinished runs must still match
            "selection": {name: value for name, value in to_dict(self.selection).items() if value or name != "columns"},
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
    details: dict[str, Any] = field(default_factory=dict)
    """Further keys of the record."""


def carry_out(request: Request, make_work: Callable[[Run], Work]) -> dict[str, Any]:
    """Make the missing rows and publish them; returns the record, which has no files if there was nothing to do."""
    started = time.monotonic()
    with ExitStack() as context:
        held = context.enter_context(lock.hold(request.out, wait=request.wait))
        run = _unfinished(request)
        if run is not None:
            planned = attempts.planned(run.staging)
        else:
            run, planned = _plan(request, held)
        context.enter_context(lines_of_run(run.run_id))
        plan = planned["plan"]
        number, files, details = 0, [], {}
        if plan["count"]:
            work = make_work(run)
            held.check()
            attempt = attempts.begin(run.staging, held.number, work.known, work.captioner_id)
            arithmetic = _make_rows(request, run, work, attempt, plan["count"])
            number, files, details = attempt.number, attempt.files(), {**work.details, **arithmetic}
        record = run.publish(
            uris.join(run.staging, attempts.MANIFEST_FILE),
            files,
            check=held.check,
            planned_after=planned["published"],
            details={
                **_common_details(request, plan),
                "attempts": number,
                "seconds": round(time.monotonic() - started, 1),  # the last attempt only
                **details,
                "settings": {**request.identity(), **details.get("settings", {})},
            },
        )
        if plan["count"]:
            say(catalog.summary(record))
            say(f"{request.product.name}: {run.final}")
        say(f"record: {run.record}")
    return record


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


def _make_rows(request: Request, run: Run, work: Work, attempt: attempts.Attempt, count: int) -> dict[str, Any]:
    """Make the rows of an attempt's images. Returns `arithmetic` for the record; empty if no row was left to make."""
    if attempt.accepted:
        say(f"continuing run {run.run_id}: {attempt.count:,} of {count:,} images are left")
    if attempt.count:
        from jobs.cluster import resources

        resources.connect(request.address)
        rows_per_file = attempts.commit_rows(attempt.count)
        stream = work.stream(attempt)
        stream.write(attempt.rows, work.title, attempt.count, work.stages, rows_per_file)
        return {"arithmetic": stream.arithmetic()} if work.uses_models else {}
    return {}


def _unfinished(request: Request) -> Run | None:
    """The unfinished run with these settings, if any. Removes leftovers of published and interrupted runs.

    Gives up an unfinished run if another run was published after its planning, since that may hold the same images.
    """
    resumable = None
    out, product, wanted = request.out, request.product, request.identity()
    all_records = catalog.records(out)
    records = {record["run_id"]: record for record in all_records}
    published = catalog.run_ids(out, product, request.maker)
    unfinished = attempts.unfinished(out)
    for run_id, planned in unfinished.items():
        if planned.get("product", products.VERDICTS.name) != product.name:
            continue
        run = Run(out=out, run_id=run_id, product=product)
        if run_id in records:
            run.tidy(records[run_id])
        elif planned["settings"] != wanted:
            keys = wanted.keys() | planned["settings"].keys()
            differing = sorted(name for name in keys if planned["settings"].get(name) != wanted.get(name))
            say(f"left alone: the unfinished run {run_id} has other settings ({', '.join(differing)}): {run.staging}")
        elif published - set(planned["published"]):
            say(f"given up: the unfinished run {run_id}, since other runs were published after it was planned")
            run.abandon()
        else:
            resumable = run
    if orphans := publication.remove_orphans(out, all_records, unfinished):
        say(f"removed: {len(orphans)} files of interrupted or overtaken publications, such as {orphans[0]}")
    return resumable


def _plan(request: Request, held: lock.Lock) -> tuple[Run, dict[str, Any]]:
    """Plan a new run; returns it with its `run.json`, which is written only if there is work."""
    product, run = request.product, Run(out=request.out, product=request.product)
    published = sorted(catalog.run_ids(request.out, product, request.maker))
    done = catalog.published(request.out, schema.DONE, product, **{product.maker: request.maker})
    plan = write_manifest(
        request.source, uris.join(run.staging, attempts.MANIFEST_FILE), request.selection, done,
        transforms=request.transforms,
    )  # fmt: skip
    say(f"source: {plan.describe()}")
    planned = {
        "product": product.name,
        "settings": request.identity(),
        "published": published,
        "plan": {
            "count": plan.count,
            "left_out": plan.left_out,
            "unread": list(plan.unread_named),
            "unread_count": plan.unread,
            "states": plan.states,
        },
    }
    held.check()
    if plan.count:  # without work there is nothing to continue, and an interruption here counts as not planned
        writing.write_json(uris.join(run.staging, attempts.RUN_FILE), planned)
    return run, planned
