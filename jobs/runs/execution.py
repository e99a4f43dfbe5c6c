"""A run from the request to the record, whatever it publishes: locked, planned, continued, worked, verified, published.

`score`, `caption` and `facts` differ in what an image becomes; how no image is lost or done twice is here once.
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

if TYPE_CHECKING:  # Ray takes seconds to import, and a run with nothing to do needs none
    from jobs.pipeline.stream import Stream

RECORDED_PACKAGES: Final = (
    "nsnet", "ray", "torch", "open_clip_torch", "transformers", "peft", "pillow", "numpy", "scipy"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command was asked for."""

    source: Uri
    out: Uri
    product: Product
    maker: str
    """Who makes the rows, such as a detector's id: what it has published is not done again."""
    settings: dict[str, Any]
    """What makes it the same run: one with equal settings that was not published is continued."""
    selection: Selection = field(default_factory=Selection)
    transforms: tuple[str, ...] = ()
    """Chains of `nsnet.transforms` under which each image is done, "" for as it is; none: as it is."""
    wait: bool = False
    """Wait while another run writes to the output."""
    address: str | None = None
    """The Ray cluster."""

    def identity(self) -> dict[str, Any]:
        """The settings as JSON gives them back."""
        settings = {
            "source": self.source,
            self.product.maker: self.maker,
            # settings of older runs have no columns: an unfinished one is to be found again
            "selection": {name: value for name, value in to_dict(self.selection).items() if value or name != "columns"},
            **({"transforms": self.transforms} if self.transforms else {}),
            **self.settings,
        }
        values: dict[str, Any] = json.loads(json.dumps(settings))
        return values


@dataclass(frozen=True, kw_only=True)
class Work:
    """How images become rows; made once there is something to do, since its models take seconds to import."""

    title: str
    """Verb of the progress line."""
    stages: tuple[str, ...]
    """What the progress line counts, in the order of the stream."""
    stream: Callable[[attempts.Attempt], "Stream"]
    """The pipeline over what is left; called on a connected cluster."""
    known: Iterable[pa.RecordBatch] = ()
    """Captions that were published before (`schema.CAPTIONED`)."""
    captioner_id: str = ""
    """Whose of them are taken over."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the record says besides."""


def carry_out(request: Request, work: Callable[[Run], Work]) -> dict[str, Any]:
    """Do what is to be done and publish it; returns the record, which has no files where there was nothing to do."""
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
            way = work(run)
            held.check()
            attempt = attempts.begin(run.staging, held.number, way.known, way.captioner_id)
            _do(request, run, way, attempt, plan["count"])
            number, files, details = attempt.number, attempt.files(), way.details
        record = run.publish(
            uris.join(run.staging, attempts.MANIFEST_FILE),
            files,
            check=held.check,
            planned_after=planned["published"],
            details={
                **_known(request, plan),
                "attempts": number,
                "seconds": round(time.monotonic() - started, 1),  # of the last attempt
                **details,
                "settings": {**request.identity(), **details.get("settings", {})},
            },
        )
        if plan["count"]:
            say(catalog.summary(record))
            say(f"{request.product.name}: {run.final}")
        say(f"record: {run.record}")
    return record


def _known(request: Request, plan: dict[str, Any]) -> dict[str, Any]:
    """What a record says whatever was done: the source, what of it was left out, and by whom its rows were made."""
    return {
        "source": request.source,
        "left_out": plan["left_out"],
        "unread": plan["unread"],
        "unread_count": plan["unread_count"],
        "listing": plan["states"],
        request.product.maker: request.maker,
        "versions": {name: version(name) for name in RECORDED_PACKAGES} | {"python": platform.python_version()},
    }


def _do(request: Request, run: Run, way: Work, attempt: attempts.Attempt, count: int) -> None:
    """Make the rows that an attempt has left."""
    if attempt.accepted:
        say(f"continuing run {run.run_id}: {attempt.count:,} of {count:,} images are left")
    if attempt.count:
        from jobs.cluster import resources

        resources.connect(request.address)
        rows_per_file = attempts.commit_rows(attempt.count)
        way.stream(attempt).write(attempt.rows, way.title, attempt.count, way.stages, rows_per_file)


def _unfinished(request: Request) -> Run | None:
    """A run with these settings that was planned and not published; remains of published and of dead ones are removed.

    One that another run has overtaken is given up: what it planned may have been published since.
    """
    found = None
    out, product, wanted = request.out, request.product, request.identity()
    every = catalog.records(out)
    records = {record["run_id"]: record for record in every}
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
            found = run
    if orphans := publication.remove_orphans(out, every, unfinished):
        say(f"removed: {len(orphans)} files of publications that were cut or overtaken, such as {orphans[0]}")
    return found


def _plan(request: Request, held: lock.Lock) -> tuple[Run, dict[str, Any]]:
    """Plan a new run; returns it with its `run.json`, which is not written where there is nothing to do."""
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
    if plan.count:  # else nothing is to be continued, and a run that is cut here counts as not planned
        writing.write_json(uris.join(run.staging, attempts.RUN_FILE), planned)
    return run, planned
