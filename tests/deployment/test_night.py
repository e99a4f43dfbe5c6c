"""The CronJob: one RayJob per night, made from the suspended one, and never two at a time."""

import json
import shutil
import stat
import subprocess
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.manifests import Document, cronjob, only, render

KUBECTL = """#!/bin/sh
case $1 in
  get) case $* in
    *nsnet-score-template*) cat suspended.json ;;
    *) head -n 1 states; sed -i 1d states ;;
  esac ;;
  patch) exec {kubectl} "$@" ;;
  create) shift 2; cp "$1" created.json; exit "$(cat refused)" ;;
esac
"""
"""Stands in for kubectl: serves the template, keeps what is to be created, and answers one line of the file `states` at
a time. Patches are made by kubectl itself, which needs no server for them."""


def test_nights_do_not_overlap() -> None:
    spec, rayjob = cronjob(render("night"))["spec"], only(render("night"), "RayJob")["spec"]
    job = spec["jobTemplate"]["spec"]
    attempts = 1 + rayjob["backoffLimit"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert attempts * rayjob["activeDeadlineSeconds"] < job["activeDeadlineSeconds"]
    minute, hour, *days = spec["schedule"].split()
    assert days == ["*"] * 3 and spec["timeZone"] == "Etc/UTC"  # as `date -u` in the script
    latest = timedelta(seconds=spec["startingDeadlineSeconds"])
    assert latest + timedelta(seconds=job["activeDeadlineSeconds"]) <= timedelta(days=1)
    assert timedelta(hours=int(hour), minutes=int(minute)) + latest < timedelta(days=1)  # the date is one date


def test_template_never_runs() -> None:
    assert only(render("night"), "RayJob")["spec"]["suspend"] is True


def stored(document: Document) -> Document:
    """A document as the API server gives it back: with what it and the operator added."""
    it = deepcopy(document)
    it["metadata"] |= {"uid": "0c", "resourceVersion": "7", "creationTimestamp": "2026-01-01T00:00:00Z"}
    it["metadata"] |= {"finalizers": ["ray.io/rayjob-finalizer"], "annotations": {"a": "b"}}
    return {**it, "status": {"jobDeploymentStatus": "Suspended", "jobId": it["spec"]["jobId"]}}


def run_night(folder: Path, states: str, *options: str, refused: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the CronJob's script against an API server that answers these states."""
    documents = render("night", *options)
    (container,) = cronjob(documents)["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/sh", "-euc"]
    (script,) = container["args"]
    for name, content in (("kubectl", KUBECTL.format(kubectl=shutil.which("kubectl"))), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(content)
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "suspended.json").write_text(json.dumps(stored(only(documents, "RayJob"))))
    (folder / "states").write_text(states)
    (folder / "refused").write_text(str(refused))
    command = [*container["command"], script.replace("/tmp/", f"{folder}/")]
    environment = {item["name"]: item["value"] for item in container["env"]}
    environment |= {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
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
def test_night_ends_as_its_rayjob_does(tmp_path: Path, states: str, code: int) -> None:
    done = run_night(tmp_path, states)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "states").read_text() == ""
    assert code == 0 or done.stdout.strip().splitlines()[-1] != ""


@pytest.mark.parametrize("options", [(), ("kueue",), ("credentials", "metrics")], ids="-".join)
def test_night_creates_the_rayjob_of_its_date_from_the_suspended_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    before = datetime.now(UTC)
    assert run_night(tmp_path, "Complete/0\n", *options).returncode == 0
    created = json.loads((tmp_path / "created.json").read_text())
    template = only(render("night", *options), "RayJob")
    name = created["metadata"]["name"]
    assert name in {f"nsnet-score-{day:%Y%m%d}" for day in (before, datetime.now(UTC))}
    queue = {"kueue.x-k8s.io/queue-name": "nsnet"} if "kueue" in options else {}
    assert created == {
        "apiVersion": template["apiVersion"],
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {"app": "nsnet-score", **queue}},
        "spec": {**template["spec"], "jobId": name, "suspend": "kueue" in options},
        "status": {},
    }


def test_second_start_of_a_night_fails_and_waits_for_nothing(tmp_path: Path) -> None:
    done = run_night(tmp_path, "Running/0\nComplete/0\n", refused=1)
    assert done.returncode == 1
    assert (tmp_path / "states").read_text() == "Running/0\nComplete/0\n"
