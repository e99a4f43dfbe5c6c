"""Who may import whom, read from the source, and what the CPU workers' modules really load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).parents[1]
ELSEWHERE = {"tests", "jobs", "benchmarks", "tools"}

NOT_IN_THE_LIBRARY = {"ray", "fsspec", "s3fs", "pyarrow", "click", "jobs", "tests"}
LEAVES: dict[str, set[str]] = {
    "errors": set(), "limits": {"errors"}, "decoders": set(), "pixels": {"errors"}, "samples": set(),
    "jpeg": {"errors", "limits"}, "png": {"errors", "limits"}, "tiff": {"errors", "limits"},
    "provenance": {"errors", "png", "samples"},
    "rasters": {"errors", "limits", "png"},
    "images": {"errors", "limits", "decoders", "pixels", "samples", "jpeg", "png", "tiff", "rasters",
               "provenance"},
    "config": {"errors"}, "entropy": set(), "patches": {"config", "errors", "entropy"}, "files": set(),
    "digest": {"errors", "files"}, "hub": {"errors"},
    "model_settings": set(), "weight_formats": {"errors", "files"},
    "model_files": {"errors", "files", "model_settings", "weight_formats"},
    "configuration": {"bundle", "config", "errors", "model_settings", "patches", "transforms"},
    "model_size": {"errors"}, "captions": {"configuration", "errors", "digest", "hub", "model_files"},
    "decoding": set(), "blip": {"decoding"}, "blip_files": {"blip", "errors"}, "caption_words": set(),
    "captioner": {"blip", "blip_files", "caption_words", "captions", "configuration", "errors", "model_files",
                  "model_size", "precision"},
    "imports": set(), "precision": {"configuration"},
    "clip_weights": {"configuration", "errors", "digest", "hub", "imports"},
    "clip": {"clip_weights", "configuration", "errors", "digest", "imports", "model_files", "model_size", "timm_towers",
             "precision", "weight_formats"},
    "mapper": {"configuration", "errors"}, "nullspace": {"configuration", "errors"},
    "head": {"configuration", "errors"}, "losses": {"configuration", "errors"}, "metrics": {"errors"},
    "leakage": {"errors", "metrics"}, "calibration": {"config", "errors", "metrics"}, "transforms": {"errors"},
    "alignment": {"errors", "images", "limits", "transforms"}, "duplicates": set(), "splits": {"errors"},
    "card": set(),
}  # fmt: skip
"""Module of nsnet -> the modules of nsnet that it may import."""


def modules(tree: ast.AST, package: str = "") -> set[str]:
    """Dotted names of everything that a source imports, wherever: also in functions and by name at run time."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            # `from nsnet import bundle` names a module, `from nsnet.bundle import read` does not: both count
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def imports(path: Path) -> set[str]:
    return modules(ast.parse(path.read_text(encoding="utf-8"), str(path)), path.parent.name)


PACKAGES = (
    "isolation", "storage", "telemetry", "console", "dataset", "cluster", "submission", "planning", "pipeline", "runs",
    "training",
    "evaluation", "report", "workflows", "auditing", "experiments",
)  # fmt: skip
"""Packages of jobs/ from the bottom to the top: each imports only those before it."""


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def sources(folder: str) -> list[Path]:
    found = sorted((REPO_ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no source"
    return found


def of_nsnet(path: Path) -> set[str]:
    """The modules of nsnet that a source imports, by their own names."""
    present = {module.stem for module in sources("nsnet")}
    return {parts[1] for name in imports(path) if (parts := name.split("."))[0] == "nsnet" and len(parts) > 1} & present


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b as c", {"a.b"}),
        ("from a import b", {"a", "a.b"}),
        ("from . import b", {"package", "package.b"}),
        ("from .b import c", {"package.b", "package.b.c"}),
        ("def f():\n    import a", {"a"}),
        ("if TYPE_CHECKING:\n    import a", {"a"}),
        ("importlib.import_module('a.b')", {"a.b"}),
        ("__import__('a')", {"a"}),
        ("text = 'import a'", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, expected: set[str]) -> None:
    assert modules(ast.parse(source), "package") == expected


@pytest.mark.parametrize("path", sources("nsnet"), ids=lambda path: path.stem)
def test_library_knows_no_cluster_and_no_storage(path: Path) -> None:
    assert roots(path) & NOT_IN_THE_LIBRARY == set()


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_of_the_library_imports_errors_only(leaf: str) -> None:
    assert of_nsnet(REPO_ROOT / "nsnet" / f"{leaf}.py") <= LEAVES[leaf]


def test_modules_of_the_library_import_each_other_in_no_circle() -> None:
    graph = {path.stem: of_nsnet(path) - {path.stem} for path in sources("nsnet") if path.stem != "__init__"}
    while ready := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed for name, needed in graph.items() if name not in ready}
    assert graph == {}


def test_nothing_but_jobs_tests_and_benchmarks_imports_jobs() -> None:
    folders = [path for path in REPO_ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    others = [path for folder in folders if folder.name not in ELSEWHERE for path in folder.rglob("*.py")]
    others += REPO_ROOT.glob("*.py")
    assert [str(path.relative_to(REPO_ROOT)) for path in others if "jobs" in roots(path)] == []


def package_of(path: Path) -> str | None:
    """The package of jobs/ that a source lies in; None: it is a command."""
    below = path.relative_to(REPO_ROOT / "jobs").parts
    return below[0] if len(below) > 1 else None


def of_jobs(path: Path) -> set[str]:
    """Packages and commands of jobs/ that a source imports."""
    return {parts[1] for name in imports(path) if (parts := name.split("."))[0] == "jobs" and len(parts) > 1}


def test_jobs_are_these_packages_each_with_a_word_on_what_belongs_there() -> None:
    folders = {path.parent.name for path in (REPO_ROOT / "jobs").glob("*/__init__.py")}
    assert folders == set(PACKAGES) == {package for path in sources("jobs") if (package := package_of(path))}
    for name in PACKAGES:
        (docstring,) = ast.parse((REPO_ROOT / "jobs" / name / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr) and len(ast.unparse(docstring)) > 80, name


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_those_below_it(package: str) -> None:
    allowed = {package, *PACKAGES[: PACKAGES.index(package)]}
    found = {path.name: of_jobs(path) - allowed for path in sources(f"jobs/{package}")}
    assert {name: above for name, above in found.items() if above} == {}  # commands are above all packages


def test_command_is_imported_by_nothing_and_imports_no_other() -> None:
    for path in sources("jobs"):
        if package_of(path) is None:
            assert of_jobs(path) <= set(PACKAGES), path.name


def test_modules_of_a_package_import_each_other_in_no_circle() -> None:
    modules_of = {
        path.relative_to(REPO_ROOT).with_suffix("").as_posix().replace("/", "."): path for path in sources("jobs")
    }
    graph = {name: imports(path) & modules_of.keys() - {name} for name, path in modules_of.items()}
    while ready := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed for name, needed in graph.items() if name not in ready}
    assert graph == {}


def test_only_storage_opens_file_systems_and_only_console_and_commands_know_click() -> None:
    assert {package_of(path) for path in sources("jobs") if roots(path) & {"fsspec", "s3fs"}} == {"storage"}
    assert {package_of(path) for path in sources("jobs") if "click" in roots(path)} <= {"console", None}


ARROW_READERS = re.compile(
    r"\b(?:pq|pads|pa\.ipc|pyarrow(?:\.\w+)+|ray\.data|pd|pandas|feather)"
    r"\.(?:read_\w+|open_\w+|ParquetFile|ParquetDataset|dataset|from_(?:parquet|huggingface)\w*)\("
)


def test_parquet_is_read_in_one_place() -> None:
    """Extension types in files of others run code: pyarrow's and Ray's readers are called where that is prevented."""
    found = {
        (path.name, call.rstrip("("))
        for path in [*sources("jobs"), *sources("nsnet")]
        for call in ARROW_READERS.findall(path.read_text(encoding="utf-8"))
    }
    assert found == {
        ("parquet_file.py", "pq.read_metadata"),
        ("parquet_file.py", "pq.ParquetFile"),
        ("parquet_file.py", "pa.ipc.read_schema"),
        ("parquet.py", "pads.dataset"),
        ("stream.py", "ray.data.read_datasource"),
        ("basis.py", "ray.data.read_datasource"),
    }


@pytest.mark.parametrize(
    ("modules", "others"),
    [
        (
            "nsnet, nsnet.images, nsnet.patches, nsnet.preparation",
            "torch ray open_clip transformers peft pyarrow pandas",
        ),
        ("jobs.cli, jobs.predict, jobs.workflows.predict", "torch ray transformers"),
        ("jobs.workflows.streams, nsnet.recipes", "torch open_clip transformers peft scipy"),
        ("jobs.plan_cluster", "torch ray transformers pyarrow numpy fsspec duckdb"),
        ("jobs.calibrate, jobs.ablate, jobs.train, jobs.score, jobs.evaluate, jobs.submit", "torch ray scipy"),
    ],
    ids=["workers that decode", "predict", "a driver that scores", "plan-cluster", "the help of commands"],
)
def test_modules_load_nothing_slow_before_it_is_needed(modules: str, others: str) -> None:
    code = f"import sys\nimport {modules}\nprint(sorted({{*{others.split()}}} & {{*sys.modules}}))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
