"""The values file: each value arrives where it belongs, nothing else changes, and none may be missing."""

import ipaddress
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest

from tests.support.manifests import CLUSTER, ENTRIES, OPTIONS, VALUES, Document, job_spec, render, rendered, values

MAY_BE_EMPTY = {"WEIGHTS"}
DIGEST = r"[\w./-]+(:\d+/[\w./-]+)?@sha256:[0-9a-f]{64}"
NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"
URI = r"s3://[a-z0-9.-]+(/[\w.=@,-]+)*"
OPTION_WORDS = r"--[\w./:=%,@+ -]+"
SIZE, COUNT, RANGE = r"[1-9]\d*Gi", r"[1-9]\d*", r"([1-9]\d*)-([1-9]\d*)"
SHAPES = {
    "NAMESPACE|.*_NAMESPACE|QUEUE|TRAINING|SPOT_TAINT": NAME,
    "IMAGE|KUBECTL_IMAGE": DIGEST,
    ".*_CIDR": r"[\d.]+/\d+",
    ".*_PORT|.*_CPU|.*_GPUS|QUOTA_PODS": COUNT,
    ".*_MEMORY": SIZE,
    "DECODING|MODELS|TRAIN_WORKERS|TRAIN_DECODING": RANGE,
    "SOURCE|DETECTOR|OUT|TRAIN_SOURCE|TRAIN_CAPTIONS|TRAIN_OUT": URI,
    "WEIGHTS": f"({URI})?",
    "HF_HUB_OFFLINE": "[01]",
    "SCHEDULE": r"[0-5]?\d ([01]?\d|2[0-3]) \* \* \*",
    "COMPACT_SCHEDULE": r"[0-5]?\d ([01]?\d|2[0-3]) \* \* [0-6]",
    ".*_OPTIONS": OPTION_WORDS,
}
"""What values look like, by their names: without what a shell would change, since some become words of a command."""

PLACES = {
    "NAMESPACE": ["* metadata.namespace", "Namespace metadata.name", "RoleBinding subjects.0.namespace"],
    "OPERATOR_NAMESPACE": ["nsnet-operator ingress.0.from.0.namespaceSelector.matchLabels.kubernetes.io/metadata.name"],
    "IMAGE": [
        "head containers.0.image", "submitter containers.0.image", "group-* containers.0.image",
        "nsnet-compact containers.0.image",
    ],
    "KUBECTL_IMAGE": ["nsnet-night containers.0.image"],
    "SPOT_TAINT": ["group-* tolerations.0.key"],
    "STORE_CIDR": ["nsnet-store egress.0.to.0.ipBlock.cidr"],
    "STORE_PORT": ["nsnet-store egress.0.ports.0.port"],
    "API_SERVER_CIDR": ["nsnet-api-server egress.0.to.0.ipBlock.cidr"],
    "API_SERVER_PORT": ["nsnet-api-server egress.0.ports.0.port"],
    "WEIGHTS": [
        "head containers.0.env.0.value", "submitter containers.0.env.0.value", "group-* containers.0.env.0.value"
    ],
    "HF_HUB_OFFLINE": [
        "head containers.0.env.1.value", "submitter containers.0.env.1.value", "group-* containers.0.env.1.value"
    ],
    "SCHEDULE": ["nsnet-night schedule", "RayCronJob schedule"],
    "COMPACT_SCHEDULE": ["nsnet-compact schedule"],
    **dict.fromkeys(("SOURCE", "DETECTOR", "SCORE_OPTIONS"), ["score entrypoint"]),
    "OUT": ["score entrypoint", "nsnet-compact containers.0.args.0"],
    **dict.fromkeys(("TRAIN_SOURCE", "TRAIN_CAPTIONS", "TRAIN_OUT", "TRAIN_OPTIONS"), ["train entrypoint"]),
    "TRAINING": ["train RayJob metadata.name", "train jobId"],
    "TRAIN_WORKERS": ["train entrypoint", "train group-0 *eplicas"],
    "TRAIN_DECODING": ["train group-1 *eplicas"],
    "DECODING": ["score group-0 *eplicas"],
    "MODELS": ["score group-1 *eplicas"],
    "MODELS_GPUS": ["score group-1 containers.0.resources.*.nvidia.com/gpu"],
    "QUEUE": ["nsnet-night containers.0.env.0.value", "RayJob metadata.labels.kueue.x-k8s.io/queue-name"],
    "MONITORING_NAMESPACE": ["nsnet-metrics ingress.0.from.0.namespaceSelector.matchLabels.kubernetes.io/*.name"],
    "QUOTA_PODS": ["ResourceQuota hard.pods"],
    "QUOTA_CPU": ["ResourceQuota hard.requests.cpu"],
    "QUOTA_MEMORY": ["ResourceQuota hard.requests.memory", "ResourceQuota hard.limits.memory"],
    "QUOTA_GPUS": ["ResourceQuota hard.requests.nvidia.com/gpu"],
}  # fmt: skip
"""Where each value arrives: kinds, names of policies and pods, and fields in them."""
for prefix, pod in (
    ("HEAD", "score head"), ("DECODING", "score group-0"), ("MODELS", "score group-1"), ("TRAIN_HEAD", "train head"),
    ("TRAIN", "train group-0"), ("TRAIN_DECODING", "train group-1"),
):  # fmt: skip
    PLACES[f"{prefix}_CPU"] = [f"{pod} containers.0.resources.requests.cpu"]
    PLACES[f"{prefix}_MEMORY"] = [
        f"{pod} containers.0.resources.requests.memory", f"{pod} containers.0.resources.limits.memory",
        f"{pod} volumes.0.emptyDir.sizeLimit",
    ]  # fmt: skip

NAMED = ("NetworkPolicy", "CronJob")
"""Kinds that a render has several of."""
SHORT = (
    ("rayClusterSpec.headGroupSpec.template.spec.", "head "),
    ("rayClusterSpec.headGroupSpec.", "head "),
    ("submitterPodTemplate.spec.", "submitter "),
    ("jobTemplate.spec.template.spec.", ""),
)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value in a document that holds no others, with its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
    for key, item in items or ():
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def places(documents: list[Document], entry: str) -> dict[str, Any]:
    """Each value of a render, by its place as `PLACES` writes it."""
    found = {}
    for number, document in enumerate(documents):
        name = document["metadata"]["name"] if document["kind"] in NAMED else document["kind"]
        ours = "score" if entry == "night" else "train"
        for path, value in leaves(document):
            path = path.removeprefix("spec.")
            if document["kind"] == "RayCronJob":
                path = path.removeprefix("jobTemplate.")
            for long, short in SHORT:
                path = path.replace(long, short) if path.startswith(long) else path
            path = re.sub(r"^rayClusterSpec\.workerGroupSpecs\.(\d)\.(template\.spec\.)?", r"group-\1 ", path)
            found[f"{number} {name} {ours} {path}"] = value
    return found


def is_at(place: str, pattern: str) -> bool:
    """Whether a place is one of a pattern of `PLACES`."""
    _, name, ours, rest = place.split(" ", 3)
    texts = (rest, f"{name} {rest}", f"{ours} {rest}", f"{ours} {name} {rest}")
    return any(fnmatch(text, pattern) for text in texts)


def marked() -> dict[str, str]:
    """A value that occurs nowhere else for each name: numbers where fields are numbers."""
    found = {}
    for number, (name, value) in enumerate(values().items(), start=90_001):
        if re.fullmatch(RANGE, value):
            found[name] = f"{number}-{number}9"
        else:
            found[name] = str(number) if re.fullmatch(COUNT, value) else f"z{number}z"
    return found


MARKED = marked()


def holds(value: Any, mark: str) -> bool:
    """Whether a value of a render holds a mark, or one end of a range."""
    words = re.findall(r"[0-9z]+", str(value))
    return any(part in words for part in mark.split("-"))


@pytest.mark.parametrize("names", [("night", *OPTIONS), ("training", *OPTIONS), ("night", "raycronjob")], ids="-".join)
def test_each_value_arrives_where_it_belongs_and_nothing_else_changes(names: tuple[str, ...]) -> None:
    before = places(render(*names), names[0])
    after = places(rendered(*names, values=MARKED), names[0])
    assert set(before) == set(after)
    arrived: dict[str, set[str]] = {name: set() for name in MARKED}
    for place, value in after.items():
        held = [name for name, mark in MARKED.items() if holds(value, mark)]
        for name in held:
            arrived[name].add(place)
        assert held or value == before[place], place
    for name, found in arrived.items():
        wanted = {place for place in after for pattern in PLACES[name] if is_at(place, pattern)}
        assert found == wanted, name


def test_every_value_is_used_and_every_place_is_of_a_value() -> None:
    assert set(PLACES) == set(values())
    entries = [("night", *OPTIONS), ("training", *OPTIONS)]
    after = [place for names in entries for place in places(render(*names), names[0])]
    for name, patterns in PLACES.items():
        for pattern in patterns:
            assert any(is_at(place, pattern) for place in after) or pattern.startswith("RayCronJob"), (name, pattern)


def test_entrypoints_are_made_of_their_values() -> None:
    given = MARKED
    assert only_entrypoint("night") == (
        f"nsnet score {given['SOURCE']} --detector {given['DETECTOR']} --out {given['OUT']} {given['SCORE_OPTIONS']}"
    )
    assert only_entrypoint("training") == (
        f"nsnet train {given['TRAIN_SOURCE']} --captions {given['TRAIN_CAPTIONS']} --out {given['TRAIN_OUT']} "
        f"--workers {given['TRAIN_WORKERS']} {given['TRAIN_OPTIONS']}"
    )


def only_entrypoint(entry: str) -> str:
    return str(job_spec(rendered(entry, values=MARKED))["entrypoint"])


@pytest.mark.parametrize("names", [("night", *OPTIONS), ("training", *OPTIONS)], ids="-".join)
def test_nothing_is_left_unset(names: tuple[str, ...]) -> None:
    found = places(render(*names), names[0])
    numbers = r"(replicas|(min|max)Replicas|requests\.(cpu|memory|nvidia.com/gpu)|port|hard\.(pods|requests\..*))$"
    for place, value in found.items():
        assert "unset" not in str(value), place
        assert not re.search(numbers, place) or str(value) != "0", place


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("night",), "IMAGE"),
        (("night",), "DETECTOR"),
        (("training",), "TRAIN_WORKERS"),
        (("night", "quota"), "QUOTA_GPUS"),
    ],
)
def test_missing_value_is_refused_by_name(names: tuple[str, ...], name: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        rendered(*names, values={name: None})
    assert name in caught.value.stderr


@pytest.mark.parametrize("name", values())
def test_value_has_the_shape_of_its_kind(name: str) -> None:
    value = values()[name]
    (shape,) = [shape for pattern, shape in SHAPES.items() if re.fullmatch(pattern, name)]
    assert re.fullmatch(shape, value), f"{name}={value}"
    assert value or name in MAY_BE_EMPTY
    assert value == " ".join(value.split())  # what stands behind a value would be part of it
    if name.endswith("_CIDR"):
        ipaddress.ip_network(value)
    if match := re.fullmatch(RANGE, value):
        assert int(match[1]) <= int(match[2])


def test_file_says_how_to_find_what_is_still_to_be_set() -> None:
    (pattern,) = re.findall(r"grep -nE '(.*)' cluster/values/values.env", VALUES.read_text())
    own = {"IMAGE", "KUBECTL_IMAGE", "STORE_CIDR", "API_SERVER_CIDR", "SOURCE", "DETECTOR", "OUT"}
    own |= {"TRAIN_SOURCE", "TRAIN_CAPTIONS", "TRAIN_OUT"}
    shipped = {name for name, value in values().items() if re.search(pattern, f"{name}={value}")}
    assert shipped == own or "IMAGE" not in shipped  # as shipped, or set


def test_each_kustomization_lists_every_option() -> None:
    for entry in ENTRIES:
        text = (CLUSTER / entry / "kustomization.yaml").read_text()
        assert tuple(re.findall(r"# - \.\./options/(\S+)", text)) == OPTIONS
    assert {path.name for path in (CLUSTER / "options").iterdir()} == {*OPTIONS, "raycronjob"}
