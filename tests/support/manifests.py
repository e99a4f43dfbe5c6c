"""What `kubectl kustomize` makes of `cluster/`, as documents and as pods, and the schemas that they must fit."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

REPO_ROOT = Path(__file__).parents[2]
CLUSTER = REPO_ROOT / "cluster"
VALUES = CLUSTER / "values/values.env"
CRDS = REPO_ROOT.parent / "shared/data/kuberay-crds"
KUBERNETES = "1.37"
ENTRIES = ("night", "training")
OPTIONS = ("credentials", "pod-identity", "metrics", "quota", "kueue")
"""Options of both entries. `raycronjob` is one of `night`, in the place of `parts/cronjob`."""
RENDERS = [
    *((entry,) for entry in ENTRIES),
    *((entry, option) for entry in ENTRIES for option in OPTIONS),
    *((entry, *OPTIONS) for entry in ENTRIES),
    ("night", "raycronjob"),
    ("night", "raycronjob", *OPTIONS[:-1]),
]
"""Entry and options of every render that is documented: each option alone, and all together."""

Document = dict[str, Any]


def values() -> dict[str, str]:
    """The values file, read as kustomize reads it."""
    lines = [line for line in VALUES.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@cache
def render(entry: str, *options: str) -> list[Document]:
    """The documents of an entry with some of its options. Skips the test if there is no kubectl; change no document."""
    return rendered(entry, *options)


def rendered(entry: str, *options: str, values: Mapping[str, str | None] | None = None) -> list[Document]:
    """As `render`, with other values in the file; None removes the line of a value.

    Raises `CalledProcessError` if kustomize refuses.
    """
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "cluster"
        shutil.copytree(CLUSTER, copy)
        _take_options(copy / entry / "kustomization.yaml", options)
        file = copy / VALUES.relative_to(CLUSTER)
        for name, value in (values or {}).items():
            line = "" if value is None else f"{name}={value}"
            text, count = re.subn(rf"^{name}=.*$", lambda _, line=line: line, file.read_text(), flags=re.MULTILINE)
            assert count == 1, name
            file.write_text(text)
        done = subprocess.run(["kubectl", "kustomize", str(copy / entry)], check=True, capture_output=True, text=True)
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def _take_options(kustomization: Path, options: tuple[str, ...]) -> None:
    """Remove the # in front of options, as the file says."""
    text = kustomization.read_text()
    for option in options:
        before = f"  # - ../options/{option}  #"
        if option == "raycronjob":
            before = f"  - ../parts/cronjob  # or ../options/{option},"
        assert text.count(before) == 1, before
        text = text.replace(before, f"  - ../options/{option}  #")
    kustomization.write_text(text)


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def only(documents: list[Document], kind: str) -> Document:
    (document,) = of_kind(documents, kind)
    return document


def cronjob(documents: list[Document], name: str = "nsnet-night") -> Document:
    """A CronJob by its name."""
    (document,) = [item for item in of_kind(documents, "CronJob") if item["metadata"]["name"] == name]
    return document


def job_spec(documents: list[Document]) -> Document:
    """The spec of the RayJob that is rendered, or that a RayCronJob creates."""
    jobs = of_kind(documents, "RayJob")
    spec: Document = jobs[0]["spec"] if jobs else only(documents, "RayCronJob")["spec"]["jobTemplate"]
    return spec


def groups(documents: list[Document]) -> dict[str, Document]:
    """The worker groups, by name."""
    return {group["groupName"]: group for group in job_spec(documents)["rayClusterSpec"]["workerGroupSpecs"]}


@dataclass(frozen=True)
class Pod:
    """A pod that a render leads to, with the containers that KubeRay adds to it."""

    name: str
    labels: dict[str, str]
    spec: Document


def pods(documents: list[Document]) -> dict[str, Pod]:
    """All pods by name: head, submitter, each worker group, and those of CronJobs by their component."""
    spec = job_spec(documents)
    cluster = spec["rayClusterSpec"]
    templates = {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    templates |= {name: group["template"] for name, group in groups(documents).items()}
    for cronjob in of_kind(documents, "CronJob"):
        template = cronjob["spec"]["jobTemplate"]["spec"]["template"]
        templates[template["metadata"]["labels"]["app.kubernetes.io/component"]] = template
    found = {name: Pod(name, item["metadata"]["labels"], dict(item["spec"])) for name, item in templates.items()}
    head = found["head"].spec
    options = {key: value for key, value in cluster["autoscalerOptions"].items() if key != "idleTimeoutSeconds"}
    if cluster["enableInTreeAutoscaling"]:  # KubeRay's container takes the head's image
        head["containers"] = [
            *head["containers"], {"name": "autoscaler", "image": head["containers"][0]["image"], **options}
        ]  # fmt: skip
    return found


def walk(value: Any) -> Iterator[Document]:
    """All mappings in a document, also those inside others."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(item)


# Schemas.

METADATA: Document = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},  # KubeRay adds to it
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def closed(schema: Any) -> Any:
    """The schema with objects that take no undeclared key: the API server's strict validation, and not its pruning."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and not is_open:
        result["additionalProperties"] = False
    return result


@cache
def kuberay_schema(kind: str) -> Document:
    """KubeRay's own definition of a kind. Skips the test if it is not here."""
    if not CRDS.is_dir():
        pytest.skip("KubeRay's resource definitions are not here")
    definition = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema: Document = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = METADATA
    return schema


def complaints(document: Any, schema: Document) -> list[str]:
    """What a schema has against a document, one line each."""
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return sorted(f"{error.json_path}: {error.message}" for error in errors)


def refusals(document: Document) -> list[str]:
    """What the API server would have against a document, of KubeRay's kinds or of Kubernetes' own."""
    return _refusals(json.dumps(document))


@cache  # most documents are the same in many renders
def _refusals(text: str) -> list[str]:
    document = json.loads(text)
    if document["apiVersion"].startswith("ray.io/"):
        return complaints(document, kuberay_schema(document["kind"]))
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    return []
