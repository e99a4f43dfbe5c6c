"""What runs the nightly scoring: manifests that Kubernetes would take, and that say what the command understands.

KubeRay's resource definitions check the RayJob, and hold the schema of a pod, which checks the CronJob's too.
"""

import json
import re
import shlex
import stat
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import duckdb
import jsonschema
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from jobs import cli, score, train
from jobs.cluster.embedded import NODE_ENVIRONMENT
from jobs.cluster.shares import shares
from jobs.experiments.request import TrainRequest
from jobs.runs.publication import Run
from jobs.storage import writing
from nsnet import recipes
from tests.support.tables import manifest_row, manifest_table, verdict_row, verdict_table

REPO_ROOT = Path(__file__).parents[1]
CLUSTER = REPO_ROOT / "cluster"
CRDS = REPO_ROOT.parent / "shared/data/kuberay-crds"
GUIDE = REPO_ROOT / "docs/how-to/operations.md"
REPRODUCE = REPO_ROOT / "docs/how-to/reproduce.md"

DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"
LONGEST_NAME = 47
"""Most letters of a RayJob's name: KubeRay adds to it."""

TEXT: dict[str, Any] = {"type": "string"}
WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}


def record(required: str = "", **properties: Any) -> dict[str, Any]:
    """Schema of an object with these keys and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": required.split()}


METADATA = record("name", name={"type": "string", "pattern": f"^{DNS_1035}$"}, labels=TEXTS, annotations=TEXTS)


def cronjob_schema(pod: dict[str, Any]) -> dict[str, Any]:
    """What a manifest may say of a `batch/v1` CronJob, around this schema of a pod's template."""
    job = record(
        "template", backoffLimit=WHOLE, activeDeadlineSeconds=WHOLE, ttlSecondsAfterFinished=WHOLE, template=pod
    )
    cronjob = record(
        "schedule concurrencyPolicy jobTemplate",
        schedule={"type": "string", "pattern": r"^(\S+ ){4}\S+$"},
        timeZone=TEXT,
        concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
        startingDeadlineSeconds=WHOLE,
        successfulJobsHistoryLimit=WHOLE,
        failedJobsHistoryLimit=WHOLE,
        suspend={"type": "boolean"},
        jobTemplate=record("spec", metadata=METADATA, spec=job),
    )
    return record("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=cronjob)


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


def complaints(document: Any, schema: dict[str, Any]) -> list[str]:
    """What a schema has against a document, one line each."""
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return sorted(f"{error.json_path}: {error.message}" for error in errors)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def of_kind(kind: str) -> list[dict[str, Any]]:
    """The documents of the CronJob's file that are of a kind."""
    return [document for document in documents("score-cronjob.yaml") if document["kind"] == kind]


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a document, also those inside others."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(item)


@pytest.fixture(scope="module")
def rayjob_schema() -> dict[str, Any]:
    if not CRDS.is_dir():
        pytest.skip("KubeRay's resource definitions are not here")
    definition = yaml.load((CRDS / "ray.io_rayjobs.yaml").read_text(), Loader=yaml.CSafeLoader)  # a tenth of the time
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema: dict[str, Any] = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = METADATA
    return schema


@pytest.fixture
def rayjob() -> dict[str, Any]:
    (document,) = documents("score-rayjob.yaml")
    return document


@pytest.fixture
def training() -> dict[str, Any]:
    """The RayJob of a training."""
    (document,) = documents("train-rayjob.yaml")
    return document


@pytest.fixture
def ray_up() -> dict[str, Any]:
    """The cluster without Kubernetes."""
    (document,) = documents("ray-up.yaml")
    return document


@pytest.fixture
def cronjob() -> dict[str, Any]:
    (document,) = of_kind("CronJob")
    return document


@pytest.fixture
def groups(rayjob: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The worker groups, by name."""
    return {group["groupName"]: group for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def pod(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["template"]["spec"]
    return found


def limits(group: dict[str, Any]) -> dict[str, str]:
    (container,) = pod(group)["containers"]
    found: dict[str, str] = container["resources"]["limits"]
    return found


# Every document is valid.


def test_rayjob_is_what_kuberay_declares(rayjob: dict[str, Any], rayjob_schema: dict[str, Any]) -> None:
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert complaints(rayjob, rayjob_schema) == []


def test_rayjob_of_a_training_is_what_kuberay_declares(training: dict[str, Any], rayjob_schema: dict[str, Any]) -> None:
    assert (training["apiVersion"], training["kind"]) == ("ray.io/v1", "RayJob")
    assert complaints(training, rayjob_schema) == []
    assert len(training["metadata"]["name"]) <= LONGEST_NAME


def test_cronjob_is_what_kubernetes_declares(cronjob: dict[str, Any], rayjob_schema: dict[str, Any]) -> None:
    cluster = rayjob_schema["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]
    template = cluster["headGroupSpec"]["properties"]["template"]
    assert (cronjob["apiVersion"], cronjob["kind"]) == ("batch/v1", "CronJob")
    assert complaints(cronjob, cronjob_schema(template)) == []


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        ("spec", "shutdownAfterJobFinishes", "shutdownAfterJobFinish"),
        ("spec.rayClusterSpec", "enableInTreeAutoscaling", "enableInTreeAutoScaling"),
        ("spec.rayClusterSpec.workerGroupSpecs.1", "minReplicas", "minReplica"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec", "serviceAccountName", "serviceAccountname"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.tolerations.0", "effect", "affect"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.envFrom.0", "secretRef", "secret"),
        ("metadata", "labels", "label"),
    ],
)
def test_misspelt_field_is_refused(
    rayjob: dict[str, Any], rayjob_schema: dict[str, Any], path: str, right: str, wrong: str
) -> None:
    changed = deepcopy(rayjob)  # anchors make its parts one object
    at: Any = changed
    for key in path.split("."):
        at = at[int(key)] if key.isdigit() else at[key]
    at[wrong] = at.pop(right)
    assert any(f"'{wrong}' was unexpected" in line for line in complaints(changed, rayjob_schema))


def test_value_of_another_type_is_refused(rayjob: dict[str, Any], rayjob_schema: dict[str, Any]) -> None:
    rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert complaints(rayjob, rayjob_schema) == [
        "$.spec.rayClusterSpec.headGroupSpec.rayStartParams['num-cpus']: 0 is not of type 'string'"
    ]


def test_misspelt_field_of_the_cronjob_is_refused(cronjob: dict[str, Any]) -> None:
    cronjob["spec"]["concurencyPolicy"] = cronjob["spec"].pop("concurrencyPolicy")
    assert len(complaints(cronjob, cronjob_schema({}))) == 2  # one is unknown, one is missing


def test_account_of_the_night_may_create_and_get_rayjobs_and_no_more(cronjob: dict[str, Any]) -> None:
    (role,), (binding,) = of_kind("Role"), of_kind("RoleBinding")
    account = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]
    }  # fmt: skip
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert {role["apiVersion"], binding["apiVersion"]} == {"rbac.authorization.k8s.io/v1"}


def test_every_account_is_created(cronjob: dict[str, Any], rayjob: dict[str, Any]) -> None:
    created = {document["metadata"]["name"] for document in of_kind("ServiceAccount")}
    used = {item["serviceAccountName"] for item in walk([cronjob, rayjob]) if "serviceAccountName" in item}
    assert used == created
    assert all(complaints(document, record(apiVersion=TEXT, kind=TEXT, metadata=METADATA)) == []
               for document in of_kind("ServiceAccount"))  # fmt: skip


def test_kustomization_makes_the_volume_of_the_cronjob_from_the_rayjob(cronjob: dict[str, Any]) -> None:
    (kustomization,) = documents("kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    template = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (volume,) = template["volumes"]
    (mount,) = template["containers"][0]["volumeMounts"]
    assert kustomization["resources"] == ["score-cronjob.yaml"]
    assert generator == {"name": volume["configMap"]["name"], "files": ["score-rayjob.yaml"]}
    assert mount == {"name": volume["name"], "mountPath": "/rayjob"}
    assert "/rayjob/score-rayjob.yaml" in template["containers"][0]["args"][0]


# The RayJob: a cluster for one run, of a shape that the command can use.


def test_entrypoint_is_a_command_that_exists(rayjob: dict[str, Any]) -> None:
    program, name, *arguments = shlex.split(rayjob["spec"]["entrypoint"])
    assert (program, name) == ("nsnet", "score")
    assert cli.group.get_command(click.Context(cli.group), name) is score.command
    options = score.command.make_context(name, arguments).params  # raises for an option that there is not
    assert all(uri.startswith("s3://") for uri in (options["source"], *options["detectors"], options["out"]))


def test_cluster_goes_when_the_job_has_ended(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 <= spec["ttlSecondsAfterFinished"] <= 600
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_head_does_no_work(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_cpu_group_grows_and_gpu_group_has_a_fixed_size(groups: dict[str, dict[str, Any]]) -> None:
    decoding, models = groups["decoding"], groups["models"]
    assert len(groups) == 2
    assert "nvidia.com/gpu" not in limits(decoding) and int(limits(models)["nvidia.com/gpu"]) >= 1
    assert 1 <= decoding["minReplicas"] < decoding["maxReplicas"]
    assert 1 <= models["minReplicas"] == models["maxReplicas"]  # the actors are counted when the command starts


def test_actors_fit_on_the_nodes_that_the_command_finds(groups: dict[str, dict[str, Any]]) -> None:
    cpus = sum(group["minReplicas"] * int(limits(group)["cpu"]) for group in groups.values())
    gpus_of_node = int(limits(groups["models"])["nvidia.com/gpu"])
    gpus = groups["models"]["minReplicas"] * gpus_of_node
    models = int(limits(groups["models"])["cpu"])
    it = shares(
        cpus, gpus, node_cpus=min(int(limits(group)["cpu"]) for group in groups.values()),
        cpus_per_gpu=models / gpus_of_node,
    )  # fmt: skip
    assert it.actors == 2 * gpus
    assert 2 * gpus_of_node * it.actor_cpus <= models
    assert it.task_cpus <= int(limits(groups["decoding"])["cpu"])


def test_only_workers_tolerate_spot_nodes(rayjob: dict[str, Any], groups: dict[str, dict[str, Any]]) -> None:
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert "tolerations" not in pod(head)
    assert "submitterPodTemplate" not in rayjob["spec"]  # KubeRay's own tolerates nothing
    assert all("spot" in {item["key"] for item in pod(group)["tolerations"]} for group in groups.values())


def test_cluster_runs_the_version_of_ray_that_is_locked(rayjob: dict[str, Any]) -> None:
    locked = re.search(r"^ray==(\S+)", (REPO_ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None and rayjob["spec"]["rayClusterSpec"]["rayVersion"] == locked[1]


# The RayJob of a training, and the cluster without Kubernetes.


def trained(arguments: list[str]) -> dict[str, Any]:
    """What `nsnet train` makes of arguments; raises for an option that there is not."""
    return train.command.make_context("train", arguments).params


def test_entrypoint_of_a_training_is_a_command_that_exists(training: dict[str, Any]) -> None:
    program, name, *arguments = shlex.split(training["spec"]["entrypoint"])
    assert (program, name) == ("nsnet", "train")
    options = trained(arguments)
    assert all(options[part].startswith("s3://") for part in ("source", "captions", "out"))
    options.pop("max_bytes"), options.pop("max_pixels"), options.pop("max_seconds")
    TrainRequest(**options).resolved()  # every setting is one


def test_elastic_range_of_a_training_is_that_of_its_gpu_group(training: dict[str, Any]) -> None:
    groups = {group["groupName"]: group for group in training["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    low, high = trained(shlex.split(training["spec"]["entrypoint"])[2:])["workers"]
    gpus = int(limits(groups["training"])["nvidia.com/gpu"])
    assert (low, high) == (gpus * groups["training"]["minReplicas"], gpus * groups["training"]["maxReplicas"])
    assert low < high and "nvidia.com/gpu" not in limits(groups["decoding"])
    assert all("spot" in {item["key"] for item in pod(group)["tolerations"]} for group in groups.values())
    head = training["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert "tolerations" not in pod(head) and head["rayStartParams"] == {"num-cpus": "0"}
    assert training["spec"]["shutdownAfterJobFinishes"] is True and training["spec"]["backoffLimit"] >= 1


def test_training_and_scoring_run_the_same_image(training: dict[str, Any], rayjob: dict[str, Any]) -> None:
    images = {item["image"] for item in walk([training, rayjob]) if "image" in item}
    versions = {document["spec"]["rayClusterSpec"]["rayVersion"] for document in (training, rayjob)}
    assert len(images) == len(versions) == 1
    assert {item["serviceAccountName"] for item in walk(training) if "serviceAccountName" in item} == {"nsnet-score"}


def test_cluster_without_kubernetes_is_what_ray_declares(ray_up: dict[str, Any], rayjob: dict[str, Any]) -> None:
    declared = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    assert complaints(ray_up, declared) == []
    assert complaints({**ray_up, "max_worker": 3}, declared) != []  # the schema is closed: it would see a misspelling
    types = ray_up["available_node_types"]
    assert ray_up["head_node_type"] in types and types["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    workers = {name: kind for name, kind in types.items() if name != "head"}
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= ray_up["max_workers"]
    assert 1 <= types["training"]["min_workers"] < types["training"]["max_workers"]
    assert ray_up["docker"]["image"] in {item["image"] for item in walk(rayjob) if "image" in item}


def test_no_cluster_takes_commands_without_a_token(
    rayjob: dict[str, Any], training: dict[str, Any], ray_up: dict[str, Any]
) -> None:
    for document in (rayjob, training):
        assert document["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    options = ray_up["docker"]["run_options"]
    ((place, origin),) = ray_up["file_mounts"].items()
    assert {"--env RAY_AUTH_MODE=token", f"--env RAY_AUTH_TOKEN_PATH={place}"} <= {*options}
    # not below `~`: Ray takes that for /root where an image sets no HOME, and containers run as another user
    assert place.startswith("/") and origin == "~/.ray/auth_token"
    comments = [line for line in (CLUSTER / "ray-up.yaml").read_text().splitlines() if line.startswith("#")]
    assert any("ray get-auth-token --generate" in line for line in comments)  # before `ray up`, which copies it
    assert all("RAY_AUTH_MODE=token" in line for line in comments if "ray job submit" in line)


def test_token_is_copied_from_where_ray_generates_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.authentication import authentication_token_setup as setup

    monkeypatch.setenv("HOME", str(tmp_path))
    setup.generate_and_save_token()
    assert len((tmp_path / ".ray/auth_token").read_text()) >= 32
    assert setup.AUTH_MODE_ENV_VAR == "RAY_AUTH_MODE"


def test_dashboard_and_client_are_reached_through_the_head_alone(
    rayjob: dict[str, Any], training: dict[str, Any], ray_up: dict[str, Any]
) -> None:
    (start,) = [line for line in ray_up["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in shlex.split(start)
    assert "0.0.0.0" not in "".join(path.read_text() for path in CLUSTER.iterdir())
    for document in (rayjob, training):
        cluster = document["spec"]["rayClusterSpec"]
        assert "serviceType" not in cluster["headGroupSpec"]  # ClusterIP: nothing is published outside
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert "dashboard-host" not in group["rayStartParams"] and "hostNetwork" not in pod(group)


def test_commands_of_the_cluster_files_and_of_the_reproduction_exist() -> None:
    comments = "\n".join(line.lstrip("# ") for line in (CLUSTER / "ray-up.yaml").read_text().splitlines())
    text = "\n".join([*blocks("", REPRODUCE), comments]).replace("\\\n", " ")
    commands = re.findall(rf"nsnet ({'|'.join(cli.COMMANDS)}) (s3://.*|univfd.*)$", text, re.MULTILINE)
    assert len(commands) >= 10
    for name, arguments in commands:
        command = cli.group.get_command(click.Context(cli.group), name)
        assert command is not None
        options = command.make_context(name, shlex.split(arguments)).params
        for variant in options.get("variants") or ():
            recipes.variant(recipes.VIT_L_14, variant)


# The CronJob: one RayJob per night, and never two at a time.


def test_nights_do_not_overlap(cronjob: dict[str, Any], rayjob: dict[str, Any]) -> None:
    spec, job = cronjob["spec"], cronjob["spec"]["jobTemplate"]["spec"]
    attempts = 1 + rayjob["spec"]["backoffLimit"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert attempts * rayjob["spec"]["activeDeadlineSeconds"] < job["activeDeadlineSeconds"]
    minute, hour, *days = spec["schedule"].split()
    assert days == ["*"] * 3 and spec["timeZone"] == "Etc/UTC"  # as `date -u` in the script
    latest = timedelta(hours=int(hour), minutes=int(minute), seconds=spec["startingDeadlineSeconds"])
    assert latest + timedelta(seconds=job["activeDeadlineSeconds"]) <= timedelta(days=1)  # the date is one date


KUBECTL = """#!/bin/sh
case $1 in
  create) cat > created.yaml; exit "$(cat refused)" ;;
  get) head -n 1 states; sed -i 1d states ;;
esac
"""
"""Stands in for kubectl: keeps what is to be created, and answers one line of the file `states` at a time."""


def run_night(folder: Path, cronjob: dict[str, Any], states: str, refused: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the CronJob's script against an API server that answers these states."""
    (container,) = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/sh", "-euc"]
    (script,) = container["args"]
    for name, content in (("kubectl", KUBECTL), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(content)
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "states").write_text(states)
    (folder / "refused").write_text(str(refused))
    command = [*container["command"], script.replace("/rayjob/", f"{CLUSTER}/")]
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ("/\nInitializing/0\nRunning/0\nComplete/0\n", 0),
        ("Complete/\n", 0),  # where KubeRay does not count
        ("Running/0\nRetrying/1\nComplete/1\n", 1),  # as after exit code 3
        ("Running/2\nFailed/3\nAppFailed: failed with exit code 2\n", 1),
        ("Running/0\n\n", 1),  # deleted
    ],
)
def test_night_ends_as_its_rayjob_does(tmp_path: Path, cronjob: dict[str, Any], states: str, code: int) -> None:
    done = run_night(tmp_path, cronjob, states)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "states").read_text() == ""
    assert code == 0 or done.stdout.strip() != ""


def test_night_creates_a_rayjob_of_its_date(tmp_path: Path, cronjob: dict[str, Any], rayjob: dict[str, Any]) -> None:
    before = datetime.now(UTC)
    run_night(tmp_path, cronjob, "Complete/0\n")
    created = yaml.safe_load((tmp_path / "created.yaml").read_text())
    name = created["metadata"]["name"]
    assert name in {f"nsnet-score-{day:%Y%m%d}" for day in (before, datetime.now(UTC))}
    assert created["spec"]["jobId"] == name
    assert re.fullmatch(DNS_1035, name) and len(name) <= LONGEST_NAME
    created["metadata"]["name"] = created["spec"]["jobId"] = rayjob["metadata"]["name"]
    assert created == rayjob


def test_second_start_of_a_night_fails_and_waits_for_nothing(tmp_path: Path, cronjob: dict[str, Any]) -> None:
    done = run_night(tmp_path, cronjob, "Running/0\nComplete/0\n", refused=1)
    assert done.returncode == 1
    assert (tmp_path / "states").read_text() == "Running/0\nComplete/0\n"


# No secrets, and an image that can be built.


def test_no_manifest_holds_a_credential(
    cronjob: dict[str, Any], rayjob: dict[str, Any], training: dict[str, Any], ray_up: dict[str, Any]
) -> None:
    assert not [
        item for item in walk([cronjob, rayjob, training, ray_up]) if "env" in item
    ]  # credentials come by reference
    assert all(document["kind"] != "Secret" for document in documents("score-cronjob.yaml"))
    text = "".join(path.read_text() for path in CLUSTER.iterdir())
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key|//[^/\s]+:[^/\s]+@", text, re.IGNORECASE)


def test_ray_pods_get_their_credentials_by_reference(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = pod(group)["containers"]
        assert pod(group)["serviceAccountName"] == "nsnet-score"
        assert container["envFrom"] == [{"secretRef": {"name": "nsnet-s3", "optional": True}}]


def test_dockerfile_copies_what_exists_and_is_sent() -> None:
    instructions = [line.split() for line in (CLUSTER / "Dockerfile").read_text().splitlines() if line[:1].isupper()]
    copied = [name for word, *names in instructions if word == "COPY" for name in names[:-1]]
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert {"requirements.lock", "pyproject.toml", "README.md", "LICENSE", "nsnet", "jobs"} == set(copied)
    assert all((REPO_ROOT / name).exists() and f"!{name}" in sent for name in copied)
    users = [names for word, *names in instructions if word == "USER"]
    assert users and users[-1][0].isdigit() and users[-1] != ["0"]


def test_image_sets_what_nodes_should_be_started_with() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("ENV ")] == [
        f"ENV {name}={value}" for name, value in NODE_ENVIRONMENT.items()
    ]


def test_dockerfile_names_no_package_index() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert not re.search(r"://|index-url|--index|find-links", text, re.IGNORECASE)


# The guide says what works.


def blocks(language: str, guide: Path = GUIDE) -> list[str]:
    """The code blocks of a guide in a language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", guide.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def test_commands_of_the_guide_exist() -> None:
    text = "\n".join(blocks("")).replace("\\\n", " ")
    commands = re.findall(r"(?:nsnet |python -m jobs\.)(score|evaluate|caption) (.*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for name, arguments in commands:
        command = cli.group.get_command(click.Context(cli.group), name)
        assert command is not None
        command.make_context(name, shlex.split(arguments, comments=True))


def test_options_of_the_guide_exist() -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<=[`( ])--[a-z-]+", prose)) - {"--from-env-file", "--generate"}
    commands = [cli.group.get_command(click.Context(cli.group), name) for name in cli.COMMANDS]
    known = {option for command in commands if command for parameter in command.params for option in parameter.opts}
    assert named <= known


def test_queries_of_the_guide_run_on_published_verdicts(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    uris = [f"s3://incoming/{i}.jpg" for i in range(4)]
    publish(out, "20260101T000000Z-aaaaaa", "OLD", [verdict_row(uri, 0.1) for uri in uris])
    publish(out, "20260102T000000Z-bbbbbb", "NEW", [verdict_row(uri, None) for uri in uris])
    publish(out, "20260103T000000Z-cccccc", "NEW", [verdict_row(uri, 0.9) for uri in uris[:3]])
    publish(out, "20260103T000001Z-eeeeee", "NEW", [], unread=["/cut.tar ends too early"])  # nothing was to be done
    cut = publish(out, "20260104T000000Z-dddddd", "NEW", [verdict_row(uri, 0.1) for uri in uris])
    writing.remove_file(cut.record)
    sql = "\n".join(blocks("sql")).replace("s3://example-verdicts/incoming", out)
    statements = [statement for statement in sql.split(";") if statement.strip()]
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as database:
        *_, unread, over_budget, failing, stated, compared = [
            database.execute(statement).fetchall() for statement in statements
        ]
    assert unread == [("/cut.tar ends too early",)]
    assert [run_id for run_id, *_ in over_budget] == ["20260102T000000Z-bbbbbb"]
    assert failing == [("decode", "ImageCorruptError", 1, uris[3])]
    assert stated == [(None, None, None, "real", 4), (None, None, None, "fake", 3)]
    assert compared == [("real", "fake", 3, pytest.approx(0.8)), ("real", None, 1, None)]


def test_query_of_the_reference_gives_the_newest_verdicts_of_published_runs(tmp_path: Path) -> None:
    out = str(tmp_path / "verdicts")
    publish(out, "20260101T000000Z-aaaaaa", "A", [verdict_row(uri, 0.1) for uri in ("/0.jpg", "/1.jpg")])
    publish(out, "20260102T000000Z-bbbbbb", "A", [verdict_row("/1.jpg", 0.9)])
    publish(out, "20260102T000001Z-eeeeee", "A", [])  # nothing was to be done
    cut = publish(out, "20260103T000000Z-cccccc", "A", [verdict_row("/0.jpg", 0.9)])
    writing.remove_file(cut.record)
    (sql,) = blocks("sql", REPO_ROOT / "docs/reference/storage.md")
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as database:
        setting, query, _ = sql.replace("'verdicts/", f"'{out}/").split(";")
        database.execute(setting)
        rows = database.sql(query).project("uri, prob_fake").fetchall()
    assert sorted(rows) == [("/0.jpg", 0.1), ("/1.jpg", 0.9)]


def publish(out: str, run_id: str, detector_id: str, rows: list[dict[str, Any]], **details: Any) -> Run:
    """Publish rows as a run of a detector."""
    run = Run(out=out, run_id=run_id)
    Path(run.staging).mkdir(parents=True)
    manifest, staged = f"{run.staging}/manifest.parquet", f"{run.staging}/rows.parquet"
    pq.write_table(manifest_table(*(manifest_row(row["uri"]) for row in rows)), manifest)
    pq.write_table(verdict_table(*({**row, "run_id": run_id, "detector_id": detector_id} for row in rows)), staged)
    run.publish(manifest, [staged], {"detector_id": detector_id, "attempts": 1, **details})
    return run
