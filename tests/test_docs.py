"""The documents name what exists: links, files, the tree, the walk through the code, commands and their options."""

import ast
import re
import tomllib
from pathlib import Path

import click
import pytest
import yaml

REPO_ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [REPO_ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    + [*(REPO_ROOT / "docs").rglob("*.md")]
)
LOG = REPO_ROOT / "docs/log.md"
COMMANDS = REPO_ROOT / "docs/reference/commands.md"
README_LINES = 110
WALK_FILES = 8


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(REPO_ROOT).as_posix()


def without_blocks(text: str) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {heading}"
    return found[1]


def anchors(text: str) -> set[str]:
    """The fragments that links to headings of a document may have, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_paths(text: str) -> list[str]:
    """Paths in code spans that begin with a folder of this repository; a name in <brackets> is none."""
    tops = "|".join(sorted(path.name for path in REPO_ROOT.iterdir() if path.is_dir() and path.name[0] != "."))
    return re.findall(rf"`((?:{tops})/[\w./*-]*)(?:::\w+)?`", text)


def test_readme_is_short() -> None:
    assert len(read(REPO_ROOT / "README.md").splitlines()) < README_LINES


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_blocks(read(path))):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), target
        assert not fragment or fragment in anchors(read(place)), target


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != LOG], ids=name_of)  # entries name old files
def test_files_that_a_document_names_exist(path: Path) -> None:
    for name in named_paths(read(path)):  # tests are also named by their path below tests/
        assert [*REPO_ROOT.glob(name.rstrip("/"))] or (REPO_ROOT / "tests" / name).is_file(), name


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != LOG], ids=name_of)
def test_lines_of_prose_are_short(path: Path) -> None:
    prose = [line for line in without_blocks(read(path)).splitlines() if not line.lstrip().startswith("|")]
    assert [line for line in prose if len(line) > 120] == []


def test_every_document_is_in_the_index() -> None:
    index = REPO_ROOT / "docs/README.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", read(index))}
    assert {path for path in DOCUMENTS if path.parent != REPO_ROOT} <= linked | {index}


def test_way_of_an_image_names_at_most_eight_files_each_once() -> None:
    walk = section(read(REPO_ROOT / "ARCHITECTURE.md"), "The way of one image")
    steps = re.findall(r"^(\d+)\. `([\w/]+\.py)`, ((?:`[\w.]+`(?: and )?)+)", walk, re.MULTILINE)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert 1 < len(steps) <= WALK_FILES
    assert sorted(re.findall(r"[\w/]+\.py\b", walk)) == sorted({file for _, file, _ in steps})
    for _, file, names in steps:
        tree = ast.parse(read(REPO_ROOT / file))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        wanted = {part for name in re.findall(r"`([\w.]+)`", names) for part in name.split(".")}
        assert wanted <= defined, file


def test_tree_names_every_package_and_every_module_of_the_library() -> None:
    block = re.search(r"```\n(.*?)```", section(read(REPO_ROOT / "ARCHITECTURE.md"), "The tree"), re.DOTALL)
    assert block
    library, _, jobs = block[1].partition("\njobs/")
    described = [re.split(r"\s{2,}", line.strip())[0] for line in library.splitlines()[1:]]
    modules = {path.stem for path in (REPO_ROOT / "nsnet").glob("*.py")} - {"__init__"}
    modules |= {f"{path.parent.name}/" for path in (REPO_ROOT / "nsnet").glob("*/__init__.py")}
    assert set(" ".join(described).split()) == modules
    packages = {path.parent.name for path in (REPO_ROOT / "jobs").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+) {2,}", jobs, re.MULTILINE)) == packages


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load(read(REPO_ROOT / "CITATION.cff"))
    project = tomllib.loads(read(REPO_ROOT / "pyproject.toml"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_every_dependency_is_a_package_that_is_locked_and_has_its_licence_named() -> None:
    project = tomllib.loads(read(REPO_ROOT / "pyproject.toml"))["project"]
    needed = {re.split(r"[\[>=!~<; ]", line)[0].lower().replace("_", "-") for line in project["dependencies"]}
    locked = {line.split("==")[0] for line in read(REPO_ROOT / "requirements.lock").splitlines()}
    assert needed - locked == set()
    licences = read(REPO_ROOT / "docs/reference/licences.md").lower().replace("_", "-")
    assert {name for name in needed if not re.search(rf"\b{re.escape(name)}\b", licences)} == set()


def test_hooks_run_what_make_check_runs() -> None:
    config = yaml.safe_load(read(REPO_ROOT / ".pre-commit-config.yaml"))
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    recipe = re.search(r"^check: setup\n((?:\t.+\n)+)", read(REPO_ROOT / "Makefile"), re.MULTILINE)
    assert recipe
    lines = recipe[1].replace("$(VENV)", ".venv").replace("$(RUN)", ".venv/bin/python")
    assert hooks == [line.strip().removeprefix("@") for line in lines.splitlines()]


def test_reference_has_every_command_with_its_options() -> None:
    from jobs import cli

    text = read(COMMANDS)
    headings = re.findall(r"^## nsnet ([\w-]+)$", text, re.MULTILINE)
    assert headings == list(cli.COMMANDS)
    shared = dict(re.findall(r"^### (\w+)$(.*?)(?=^##|\Z)", section(text, "Shared options"), re.MULTILINE | re.DOTALL))
    for name in cli.COMMANDS:
        command = cli.group.get_command(click.Context(cli.group), name)
        assert command is not None
        own = section(text, f"nsnet {name}")
        groups = re.findall(r"\]\(#(\w+)\)", own.partition("\nShared: ")[2].partition("\n\n")[0])
        documented = options(own).union(*(options(shared[group.capitalize()]) for group in groups))
        parts = [*command.commands.values()] if isinstance(command, click.Group) else [command]
        known = {opt for part in parts for parameter in part.params if isinstance(parameter, click.Option) for opt in
                 (*parameter.opts, *parameter.secondary_opts)}  # fmt: skip
        assert documented == known, name


def options(text: str) -> set[str]:
    """Options in the first column of a document's tables."""
    cells = re.findall(r"^\| ((?:\\\||[^|])+) \|", text, re.MULTILINE)
    return {option for cell in cells for option in re.findall(r"`(--[a-z0-9-]+)", cell)}
