"""A plan as text for a terminal: the answer, the stages, what was assumed, and where the rates come from."""

import textwrap
from collections.abc import Iterable
from typing import Final

from jobs.console.tables import aligned
from jobs.planning.plan import Plan
from jobs.planning.rates import RatesFile

WIDTH: Final = 100
"""Characters of a line."""


def as_text(plan: Plan) -> str:
    """The whole plan."""
    blocks = [_answer(plan), _stages(plan), _assumptions(plan), _sources(plan.rates)]
    return "\n\n".join("\n".join(block) for block in blocks)


def _answer(plan: Plan) -> list[str]:
    cluster, memory = plan.cluster, plan.memory
    deadline = "" if plan.deadline_hours is None else f" (deadline: {plan.deadline_hours:g})"
    others = cluster.cpus - cluster.gpu_node_cpus
    lines = [
        f"{_count(cluster.gpus, 'GPU')}, {_count(cluster.cpus, 'CPU')}, {_gib(memory.total)} of memory: "
        f"{plan.workload.images:,} images in {plan.hours:,.2f} hours{deadline}",
        f"CPUs: {cluster.gpu_node_cpus:,} on nodes with GPUs, {others:,} on other nodes",
        f"memory: {_gib(memory.per_gpu)} for each GPU and {_gib(memory.per_cpu)} for each CPU; "
        f"{_gib(memory.object_store)} of all is Ray's object store",
    ]
    if plan.cost is not None:
        lines.append(f"cost: {plan.cost.total:,.2f}, or {plan.cost.per_million:,.2f} per million images")
    if not plan.rates.gpu_was_measured:
        lines.append("The rates of GPUs are estimates, not measurements. Measure one GPU before you rely on this plan.")
    return lines


def _stages(plan: Plan) -> list[str]:
    rows = [("stage", "runs on", "images/s of one", "busy", "slack")]
    for stage in plan.stages:
        rows.append(
            (
                stage.name,
                _count(stage.units, stage.unit),
                f"{stage.images_per_s:,.0f}" if stage.images_per_s >= 100 else f"{stage.images_per_s:.3g}",
                f"{stage.busy:.0%}",
                _slack(stage.slack),
            )
        )
    limit = f"The bottleneck is {plan.bottleneck}: the stream makes {plan.images_per_s:,.0f} images/s."
    if plan.serial_hours > 0.5 * plan.hours:
        limit += " But most of the time is listing and publishing, which no cluster shortens."
    return [*aligned(rows, left=2), "", *_wrapped(limit, "")]


def _assumptions(plan: Plan) -> list[str]:
    workload, rates = plan.workload, plan.rates.rates
    known = f"; {workload.known_captions:.0%} of the captions are known" if workload.known_captions else ""
    stated = [
        f"An image has {workload.megapixels:.3g} megapixels and {workload.image_bytes:,} bytes{known}.",
        f"The hours hold {plan.startup_hours:.2f} for start-up and {plan.serial_hours:.2f} for listing and publishing "
        "by one process. They hold no time for getting machines.",
        f"The stream makes {rates.efficiency:.0%} of what its slowest stage alone would.",
        "Fetching and decoding share the CPUs that actors do not hold; captioning and scoring share the GPUs. Slack: "
        "how much faster these units could work.",
        "A node has one GPU, or no GPU and at least as many CPUs as a node with one. Memory is without the operating "
        "system and Ray's own processes.",
        "Nothing is reserved for lost nodes, an outage of the store, or rates that prove wrong.",
    ]
    return ["assumptions", *_list(stated)]


def _sources(file: RatesFile) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(file.versions.items()))
    return [
        "rates",
        *_list(
            [
                f"machine: {file.machine}",
                f"{file.date}, {file.precision}; {versions or 'no versions given'}",
                f"measured: {', '.join(file.measured) or 'none'}",
                f"estimates: {', '.join(file.estimated) or 'none'}",
            ]
        ),
    ]


def _list(sentences: Iterable[str]) -> list[str]:
    return [line for sentence in sentences for line in _wrapped(sentence, "  ")]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + indent)


def _count(number: float, unit: str) -> str:
    shown = f"{number:,.1f}".removesuffix(".0")
    return f"{shown} {unit}" if shown == "1" else f"{shown} {unit}s"


def _slack(slack: float) -> str:
    if slack < 0.005:
        return "none"
    return f"+{slack:.0%}" if slack < 10.0 else f"×{slack + 1.0:,.0f}"


def _gib(size_bytes: int) -> str:
    gib = size_bytes / 2**30
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:.1f} GiB"
