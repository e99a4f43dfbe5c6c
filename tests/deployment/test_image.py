"""The container image can be built from what is sent, holds no compiler and no secret, runs as an unprivileged user."""

import re
import shutil
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest

from jobs.cluster.embedded import NODE_ENVIRONMENT
from tests.support.manifests import CLUSTER, REPO_ROOT, pods, render

DOCKERFILE = CLUSTER / "Dockerfile"
LOCK = CLUSTER / "requirements.lock"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with the rest of its lines."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, from its FROM."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def test_two_stages_start_from_the_digest_that_is_given() -> None:
    build, runtime = stages()
    assert (build[0], runtime[0]) == (("FROM", "${BASE} AS build"), ("FROM", "${BASE}"))
    assert instructions()[0] == ("ARG", "BASE")  # no default: nobody builds from a tag without knowing
    assert "latest" not in DOCKERFILE.read_text()


def test_compiler_and_installer_stay_behind() -> None:
    build, runtime = stages()
    assert "gcc" in str(build) and not re.search(r"gcc|pip|\buv\b|install\.lock", str(runtime))
    assert [rest for word, rest in runtime if word == "COPY"] == ["--from=build /install /usr/local"]


def test_everything_is_installed_by_hash() -> None:
    build, _ = stages()
    commands = "\n".join(rest for word, rest in build if word == "RUN")
    installs = re.findall(r"\b(?:(?:uv )?pip install|uv build) [^&;\n]*", commands)
    assert len(installs) == len(re.findall(r"pip3? install|uv build", commands)) == 5
    others = [line for line in installs if "--require-hashes" not in line]
    assert len(others) == 2
    assert "--torch-backend cpu" in others[0] and "dist/*.whl" in others[1]  # as the comment says; the wheel just built
    assert all("--no-deps" in line for line in installs if "uv pip install" in line)


def test_image_runs_as_the_user_of_the_pods() -> None:
    _, runtime = stages()
    (user,) = [rest for word, rest in runtime if word == "USER"]
    context = pods(render("night"))["head"].spec["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}" == "1000:1000"
    assert [word for word, _ in runtime][-2:] == ["WORKDIR", "CMD"]  # nothing runs after it as another user


def test_image_sets_what_nodes_should_be_started_with() -> None:
    assert [rest for word, rest in instructions() if word == "ENV"] == [
        f"{name}={value}" for name, value in NODE_ENVIRONMENT.items()
    ]


def test_dockerfile_names_no_package_index() -> None:
    assert not re.search(r"://|index-url|--index|find-links", DOCKERFILE.read_text(), re.IGNORECASE)


def sent(path: str) -> bool:
    """Whether `.dockerignore` sends a file of the repository to the build: the last line that matches decides."""
    decision = True
    for line in (REPO_ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").replace("**/", "(.*/)?").replace("*", "[^/]*").replace("[^/]*/)?", "*/)?")
        if re.match(rf"^{pattern}(/|$)", path):
            decision = line.startswith("!")
    return decision


def test_build_is_sent_what_it_copies_and_nothing_else() -> None:
    copied = {name for word, rest in instructions() if word == "COPY" and "--from" not in rest
              for name in rest.split()[:-1]}  # fmt: skip
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO_ROOT, capture_output=True, text=True, check=True).stdout
    files = tracked.splitlines()
    assert {name for name in copied if not (REPO_ROOT / name).exists()} == set()
    wanted = {file for file in files if any(file == name or file.startswith(f"{name}/") for name in copied)}
    assert {file for file in files if sent(file)} == wanted and wanted
    strays = ("nsnet/__pycache__/x.pyc", "jobs/storage/__pycache__/x.pyc", ".venv/bin/python", "demo/a", ".git/config",
              "nsnet_kernels.abi3.so", "s3.env", "tests/conftest.py")  # fmt: skip
    assert not [stray for stray in strays if sent(stray)]


def test_wheel_needs_no_file_that_is_not_sent() -> None:
    text = (REPO_ROOT / "pyproject.toml").read_text()
    named = {"README.md", "LICENSE", *re.findall(r'"(nsnet/kernels/[\w.]+)"', text)}
    assert all(sent(name) and (REPO_ROOT / name).is_file() for name in named) and len(named) >= 5


def test_variant_for_cpus_leaves_out_what_only_cuda_needs(tmp_path: Path) -> None:
    """The command of the Dockerfile, on the lock: without torch's CUDA packages, and all others as they are."""
    (command,) = re.findall(r"awk '.*?' requirements\.lock > install\.lock", DOCKERFILE.read_text())
    (pair,) = re.findall(r"sed -nE '.*?' requirements\.lock > torch\.txt", DOCKERFILE.read_text())
    shutil.copy(LOCK, tmp_path / "requirements.lock")
    subprocess.run(f"{command} && {pair}", shell=True, cwd=tmp_path, check=True)

    def names(file: Path) -> set[str]:
        return {line.split("==")[0] for line in file.read_text().splitlines() if re.match(r"[a-z0-9]", line)}

    left_out = names(LOCK) - names(tmp_path / "install.lock")
    assert names(tmp_path / "torch.txt") == {"torch", "torchvision"} <= left_out
    cuda = {re.split(r"[\[=<>~; ]", line)[0] for line in requires("torch") or () if "platform_system" in line
            or "sys_platform" in line}  # fmt: skip
    assert cuda and cuda <= left_out
    assert all(re.match(r"torch|triton|cuda-|nvidia-", name) for name in left_out)
    assert set((tmp_path / "install.lock").read_text().splitlines()) <= set(LOCK.read_text().splitlines())
    assert re.fullmatch(r"torch==[\w.]+\ntorchvision==[\w.]+\n", (tmp_path / "torch.txt").read_text())


def test_hadolint_has_nothing_against_the_dockerfile() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(REPO_ROOT / ".venv/bin"))
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    worse = DOCKERFILE.read_text().replace("--no-install-recommends ", "")
    refused = subprocess.run([program, "-"], input=worse, capture_output=True, text=True)
    assert refused.returncode == 1 and "DL3015" in refused.stdout
