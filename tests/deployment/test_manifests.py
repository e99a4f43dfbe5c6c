"""Every render of `cluster/` is taken by the API server, and its pods may do no more than they need."""

import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import click
import kubernetes_validate
import pytest

from jobs import cli, compact, score
from jobs.cluster.shares import NodeShape, shares
from jobs.experiments.request import TrainRequest
from tests.support.manifests import (
    CLUSTER,
    ENTRIES,
    OPTIONS,
    RENDERS,
    REPO_ROOT,
    Document,
    cronjob,
    groups,
    job_spec,
    of_kind,
    only,
    pods,
    refusals,
    render,
    walk,
)  # fmt: skip

EVERYTHING = [("night", *OPTIONS), ("training", *OPTIONS), ("night", "raycronjob")]
every_render = pytest.mark.parametrize("names", RENDERS, ids="-".join)
each_entry = pytest.mark.parametrize("entry", ENTRIES)


def containers(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Each container of each pod, with the names of both."""
    for pod in pods(documents).values():
        assert "initContainers" not in pod.spec
        for container in pod.spec["containers"]:
            yield f"{pod.name}/{container['name']}", container


def limits(group: Document) -> dict[str, str]:
    (container,) = group["template"]["spec"]["containers"]
    found: dict[str, str] = container["resources"]["limits"]
    return found


def requests(group: Document) -> dict[str, str]:
    (container,) = group["template"]["spec"]["containers"]
    found: dict[str, str] = container["resources"]["requests"]
    return found


# Every document is valid.


@every_render
def test_every_document_is_what_kubernetes_and_kuberay_declare(names: tuple[str, ...]) -> None:
    documents = render(*names)
    for document in documents:
        assert refusals(document) == [], f"{document['kind']} {document['metadata']['name']}"
    keys = [(item["kind"], item["metadata"]["name"]) for item in documents]
    assert len(keys) == len(set(keys)) and ("Namespace", keys[0][1]) == keys[0]


@pytest.mark.parametrize(
    ("kind", "path", "right", "wrong"),
    [
        ("RayJob", "spec", "shutdownAfterJobFinishes", "shutdownAfterJobFinish"),
        ("RayJob", "spec.rayClusterSpec", "enableInTreeAutoscaling", "enableInTreeAutoScaling"),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.1", "minReplicas", "minReplica"),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.1.template.metadata", "labels", "label"),
        ("RayJob", "spec.rayClusterSpec.headGroupSpec.template.spec", "serviceAccountName", "serviceAccountname"),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.tolerations.0", "effect", "affect"),
        ("RayJob", "spec.submitterPodTemplate.spec.containers.0", "securityContext", "securitycontext"),
        ("RayJob", "metadata", "labels", "label"),
        ("CronJob", "spec", "concurrencyPolicy", "concurencyPolicy"),
        ("CronJob", "spec.jobTemplate.spec.template.spec.securityContext", "runAsNonRoot", "runAsNonroot"),
        ("NetworkPolicy", "spec", "policyTypes", "policyType"),
        ("PodDisruptionBudget", "spec", "minAvailable", "minavailable"),
    ],
)
def test_misspelt_field_is_refused(kind: str, path: str, right: str, wrong: str) -> None:
    changed = deepcopy(of_kind(render("night"), kind)[0])
    assert refusals(changed) == []
    at: Any = changed
    for key in path.split("."):
        at = at[int(key)] if key.isdigit() else at[key]
    at[wrong] = at.pop(right)
    assert any(f"'{wrong}' was unexpected" in line or f"'{right}' is a required" in line for line in refusals(changed))


def test_value_of_another_type_is_refused() -> None:
    changed = deepcopy(only(render("night"), "RayJob"))
    changed["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert refusals(changed) == [
        "$.spec.rayClusterSpec.headGroupSpec.rayStartParams['num-cpus']: 0 is not of type 'string'"
    ]


def test_pods_are_what_kubernetes_declares_for_pods() -> None:
    """KubeRay's definitions are of the pods of some Kubernetes version; these are of the newest."""
    for names in EVERYTHING:
        for pod in pods(render(*names)).values():
            document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name}, "spec": pod.spec}
            kubernetes_validate.validate(document, "1.37", strict=True)


# What pods may do.


@pytest.mark.parametrize("names", EVERYTHING, ids="-".join)
def test_no_pod_runs_as_root_or_may_become_more(names: tuple[str, ...]) -> None:
    documents = render(*names)
    for pod in pods(documents).values():
        assert pod.spec["securityContext"] == {
            "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(pod.spec)
    for _, container in containers(documents):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
    levels = only(documents, "Namespace")["metadata"]["labels"]
    assert levels["pod-security.kubernetes.io/enforce"] == "restricted"  # also for what KubeRay adds


@pytest.mark.parametrize("names", EVERYTHING, ids="-".join)
def test_pods_write_to_bounded_volumes_only(names: tuple[str, ...]) -> None:
    documents = render(*names)
    found = pods(documents)
    for pod in found.values():
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for container in pod.spec["containers"]:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {"/tmp", "/home/nsnet"} <= set(mounts)
            for path, mount in mounts.items():
                volume = volumes[mount["name"]]
                assert mount.get("readOnly") or volume["emptyDir"]["sizeLimit"], path
            if container["name"] in ("ray-head", "ray-worker"):
                shared = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
                assert shared == {"medium": "Memory", "sizeLimit": container["resources"]["limits"]["memory"]}
        assert not {"hostPath", "persistentVolumeClaim"} & {key for volume in volumes.values() for key in volume}


@every_render
def test_containers_ask_for_what_they_may_use(names: tuple[str, ...]) -> None:
    for name, container in containers(render(*names)):
        asked, allowed = (container["resources"][part] for part in ("requests", "limits"))
        assert {"cpu", "memory", "ephemeral-storage"} <= set(asked), name
        assert set(allowed) == set(asked) - {"cpu"}, name  # a limit of CPUs would throttle while the node is idle
        assert all(asked[key] == value for key, value in allowed.items()), name


@every_render
def test_images_are_named_by_digest(names: tuple[str, ...]) -> None:
    images = {item["image"] for item in walk(render(*names)) if "image" in item}
    assert images and all(re.fullmatch(r"[\w./:-]+@sha256:[0-9a-f]{64}", image) for image in images)
    assert not any(re.search(r":[^/@]+@", image) for image in images)  # not a tag besides, which would not count


@every_render
def test_only_who_asks_the_api_server_has_a_token_for_it(names: tuple[str, ...]) -> None:
    documents = render(*names)
    place = "/var/run/secrets/kubernetes.io/serviceaccount"
    for pod in pods(documents).values():
        assert pod.spec["automountServiceAccountToken"] == (pod.name == "night")
        projected = [volume["name"] for volume in pod.spec["volumes"] if "serviceAccountToken" in str(volume)]
        mounted = [
            container["name"] for container in pod.spec["containers"]
            if any(mount["name"] in projected or mount["mountPath"] == place for mount in container["volumeMounts"])
        ]  # fmt: skip
        assert bool(projected) == (pod.name == "head")
        assert set(mounted) <= {"autoscaler"}
    if job_spec(documents)["rayClusterSpec"]["enableInTreeAutoscaling"]:
        assert any(name == "head/autoscaler" for name, _ in containers(documents))


@every_render
def test_every_account_is_created_and_used_by_one_kind_of_pod(names: tuple[str, ...]) -> None:
    documents = render(*names)
    found = pods(documents)
    created = {account["metadata"]["name"] for account in of_kind(documents, "ServiceAccount")}
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(documents, "ServiceAccount"))
    cluster = "nsnet-score" if names[0] == "night" else "nsnet-train"
    accounts = {name: pod.spec.get("serviceAccountName") for name, pod in found.items()}
    nodes = set(accounts) - {"night", "submitter", "compact"}
    assert {accounts[name] for name in nodes} == {cluster} and accounts["submitter"] is None
    assert accounts.get("compact", "nsnet-compact") == "nsnet-compact"
    assert created == {account for account in accounts.values() if account}


def test_account_of_the_night_may_create_and_get_rayjobs_and_no_more() -> None:
    documents = render("night")
    role, binding = only(documents, "Role"), only(documents, "RoleBinding")
    account = pods(documents)["night"].spec["serviceAccountName"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]
    }  # fmt: skip
    namespace = role["metadata"]["namespace"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]
    assert not of_kind(render("training"), "Role") and not of_kind(render("night", "raycronjob"), "Role")


@every_render
def test_no_cluster_takes_commands_without_a_token_or_is_published(names: tuple[str, ...]) -> None:
    cluster = job_spec(render(*names))["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert "serviceType" not in cluster["headGroupSpec"]  # ClusterIP
    assert not {"enableIngress", "ingressOptions", "headService"} & set(cluster["headGroupSpec"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert "dashboard-host" not in group["rayStartParams"]
    ports = {port["name"] for port in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"gcs-server", "dashboard", "metrics"}  # without Ray's client and Serve


@every_render
def test_credentials_come_by_reference(names: tuple[str, ...]) -> None:
    documents = render(*names)
    assert not of_kind(documents, "Secret")
    references = {name: container.get("envFrom") for name, container in containers(documents)}
    nodes = {name for name in references if name.endswith(("ray-head", "ray-worker", "compact"))}
    wanted = [{"secretRef": {"name": "nsnet-s3"}}] if "credentials" in names else None
    assert {name: wanted if name in nodes else None for name in references} == references
    named = {item["name"] for _, container in containers(documents) for item in container.get("env", ())}
    assert named <= {"NSNET_WEIGHTS", "HF_HUB_OFFLINE", "LABELS", "SUSPEND", "HOME"}


def test_no_file_of_the_cluster_holds_a_credential() -> None:
    text = "".join(path.read_text() for path in CLUSTER.rglob("*") if path.is_file())
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key|//[^/\s]+:[^/\s]+@", text, re.IGNORECASE)
    assert "0.0.0.0" not in text.replace("0.0.0.0/0", "")


@each_entry
def test_drained_node_waits_for_the_head_and_for_the_night_and_not_for_workers(entry: str) -> None:
    documents = render(entry)
    budgets = [item["spec"] for item in of_kind(documents, "PodDisruptionBudget")]
    covered = {
        pod.name for pod in pods(documents).values() for budget in budgets
        if budget["selector"]["matchLabels"].items() <= pod.labels.items() and budget["minAvailable"] == 1
    }  # fmt: skip
    assert covered == ({"head", "night"} if entry == "night" else {"head"})


# The weekly compaction.


def test_compaction_is_a_command_that_exists_for_the_output_of_the_nights() -> None:
    documents = render("night")
    (container,) = pods(documents)["compact"].spec["containers"]
    program, name = container["command"]
    command = cli.group.get_command(click.Context(cli.group), name)
    assert (program, command) == ("nsnet", compact.command)
    options = compact.command.make_context(name, list(container["args"])).params
    assert options["out"] == parsed(documents)[1]["out"] and options["wait"] is True


def test_compaction_starts_hours_after_the_night() -> None:
    documents = render("night")
    night, compaction = (cronjob(documents, f"nsnet-{name}")["spec"] for name in ("night", "compact"))
    assert compaction["concurrencyPolicy"] == "Forbid" and compaction["timeZone"] == night["timeZone"]
    hours = [int(spec["schedule"].split()[1]) for spec in (night, compaction)]
    assert 3600 * (hours[1] - hours[0]) > job_spec(documents)["activeDeadlineSeconds"]
    assert hours[0] + 24 - hours[1] >= 6  # and before the next one
    assert pods(render("training")).keys().isdisjoint({"night", "compact"})


# A cluster for one run, of a shape that the command can use.


def parsed(documents: list[Document]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of the command of the entrypoint; raises for an option that there is not."""
    program, name, *arguments = shlex.split(job_spec(documents)["entrypoint"])
    assert program == "nsnet"
    command = cli.group.get_command(click.Context(cli.group), name)
    assert command is not None
    return name, command.make_context(name, arguments).params


def test_entrypoint_of_the_night_is_a_command_that_exists() -> None:
    name, options = parsed(render("night"))
    assert name == "score" and cli.group.get_command(click.Context(cli.group), name) is score.command
    assert all(uri.startswith("s3://") for uri in (options["source"], *options["detectors"], options["out"]))


def test_entrypoint_of_a_training_is_a_command_that_exists() -> None:
    name, options = parsed(render("training"))
    assert name == "train"
    assert all(options[part].startswith("s3://") for part in ("source", "captions", "out"))
    parameters = set(TrainRequest.__dataclass_fields__)
    TrainRequest(**{key: value for key, value in options.items() if key in parameters}).resolved()  # settings exist


@pytest.mark.parametrize("names", EVERYTHING, ids="-".join)
def test_no_shell_changes_the_entrypoint(names: tuple[str, ...]) -> None:
    """KubeRay puts it into a line of bash in the submitter, and Ray gives it to a shell on the head."""
    entrypoint = job_spec(render(*names))["entrypoint"]
    assert re.fullmatch(r"[\w\s./:=%,@+-]+", entrypoint), entrypoint
    assert entrypoint == " ".join(entrypoint.split())


@each_entry
def test_cluster_goes_when_the_job_has_ended(entry: str) -> None:
    spec = job_spec(render(entry))
    assert spec["shutdownAfterJobFinishes"] is True and 0 <= spec["ttlSecondsAfterFinished"] <= 600
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True and spec["backoffLimit"] >= 1
    assert spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


@each_entry
def test_head_does_no_work(entry: str) -> None:
    assert job_spec(render(entry))["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


@each_entry
def test_only_workers_tolerate_spot_nodes(entry: str) -> None:
    found = pods(render(entry))
    spot = {item["key"] for item in found["decoding"].spec["tolerations"]}
    assert len(spot) == 1
    for name, pod in found.items():
        tolerated = {item["key"] for item in pod.spec.get("tolerations", ())}
        assert tolerated == set() if name in ("head", "submitter", "night", "compact") else spot <= tolerated, name


@pytest.mark.parametrize(("entry", "gpus"), [("night", "models"), ("training", "training")])
def test_both_groups_grow_and_one_has_gpus(entry: str, gpus: str) -> None:
    found = groups(render(entry))
    assert set(found) == {"decoding", gpus}
    assert "nvidia.com/gpu" not in limits(found["decoding"]) and int(limits(found[gpus])["nvidia.com/gpu"]) >= 1
    for group in found.values():
        assert 1 <= group["minReplicas"] == group["replicas"] < group["maxReplicas"]


def node_shape(group: dict[str, Any]) -> NodeShape:
    """The nodes of a group when the command starts."""
    gpus = int(limits(group).get("nvidia.com/gpu", 0))
    return NodeShape(cpus=int(requests(group)["cpu"]), gpus=gpus, count=group["minReplicas"])


def test_actors_fit_on_the_nodes_that_the_command_finds() -> None:
    found = groups(render("night"))
    it = shares([node_shape(group) for group in found.values()])
    gpus_of_node = int(limits(found["models"])["nvidia.com/gpu"])
    gpus = found["models"]["minReplicas"] * gpus_of_node
    models = int(requests(found["models"])["cpu"])
    assert it.actors == 2 * gpus
    assert 2 * gpus_of_node * it.actor_cpus <= models
    assert it.task_cpus <= int(requests(found["decoding"])["cpu"])


@pytest.mark.parametrize(("entry", "group"), [("night", "models"), ("training", "training")])
def test_ray_reads_the_sizes_that_the_pods_request(entry: str, group: str) -> None:
    """Ray's autoscaler for KubeRay, on the RayCluster of this RayJob: CPUs come from requests, as there is no limit."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    documents = render(entry)
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": job_spec(documents)["rayClusterSpec"]}
    types = _derive_autoscaling_config_from_ray_cr(deepcopy(cluster))["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    for name, found in groups(documents).items():
        it = types[name]
        assert (it["min_workers"], it["max_workers"]) == (found["minReplicas"], found["maxReplicas"])
        assert it["resources"]["CPU"] == int(requests(found)["cpu"])
        assert it["resources"].get("GPU", 0) == int(limits(found).get("nvidia.com/gpu", 0))
        assert it["resources"]["memory"] == int(limits(found)["memory"].removesuffix("Gi")) * 2**30
    assert types[group]["resources"]["GPU"] >= 1


def test_elastic_range_of_a_training_is_that_of_its_gpu_group() -> None:
    documents = render("training")
    group = groups(documents)["training"]
    low, high = parsed(documents)[1]["workers"]
    assert (low, high) == (group["minReplicas"], group["maxReplicas"]) and limits(group)["nvidia.com/gpu"] == "1"


@each_entry
def test_cluster_runs_the_version_of_ray_that_is_locked(entry: str) -> None:
    locked = re.search(r"^ray==([^\s\\]+)", (REPO_ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None and job_spec(render(entry))["rayClusterSpec"]["rayVersion"] == locked[1]


# Options.


def test_quota_holds_a_night_and_a_training_at_their_most() -> None:
    hard = only(render("night", "quota"), "ResourceQuota")["spec"]["hard"]
    asked = dict.fromkeys(("pods", "requests.cpu", "requests.memory", "requests.nvidia.com/gpu"), 0.0)
    for entry in ENTRIES:
        documents = render(entry)
        for name, pod in pods(documents).items():
            times = groups(documents)[name]["maxReplicas"] if name in groups(documents) else 1
            asked["pods"] += times
            for container in pod.spec["containers"]:
                for key, value in container["resources"]["requests"].items():
                    if f"requests.{key}" in asked:
                        asked[f"requests.{key}"] += times * quantity(value)
    assert all(asked[key] <= quantity(hard[key]) <= 1.25 * asked[key] + 1 for key in asked), (asked, hard)
    assert hard["limits.memory"] == hard["requests.memory"]


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number."""
    number, unit = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1.0, "m": 0.001, "Mi": 2**20, "Gi": 2**30}[unit]


def test_queue_starts_what_is_created_suspended_and_of_a_fixed_size() -> None:
    job = only(render("training", "kueue"), "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] and job["spec"]["suspend"] is True
    for entry in ENTRIES:
        spec = job_spec(render(entry, "kueue"))
        assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is False  # Kueue refuses it
        assert spec["shutdownAfterJobFinishes"] is True
        assert all(group["replicas"] >= 1 for group in groups(render(entry, "kueue")).values())  # what Kueue counts
    template = only(render("night", "kueue"), "RayJob")
    assert "kueue.x-k8s.io/queue-name" not in template["metadata"]["labels"]  # Kueue would start the template itself


def test_raycronjob_creates_what_the_night_creates() -> None:
    spec = only(render("night", "raycronjob"), "RayCronJob")["spec"]
    assert spec["jobTemplate"] == {**job_spec(render("night")), "suspend": False}
    assert spec["suspend"] is False and spec["timeZone"] == "Etc/UTC"
    assert spec["schedule"] == cronjob(render("night"))["spec"]["schedule"]
    rest = [item for item in render("night", "raycronjob") if item["metadata"]["name"] != "nsnet-compact"]
    assert not {document["kind"] for document in rest} & {"CronJob", "RayJob", "Role"}
