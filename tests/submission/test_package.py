"""What is uploaded: the source of the packages, and nothing that lies beside or within it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jobs.submission import package
from jobs.submission.package import pack
from nsnet.errors import UsageError

STRAY = (
    ".env", "jobs/.env", "jobs/keys.txt", "jobs/.cache/x.py", "jobs/model.safetensors", "nsnet/kernels/module.c",
    ".git/config", ".venv/lib/x.py", "demo/x.py", "tests/x.py", "data/x.json", "jobs/__pycache__/a.cpython-311.pyc",
)  # fmt: skip


def test_only_source_of_the_packages_is_packed(tmp_path: Path) -> None:
    wanted = ("jobs/__init__.py", "jobs/report/page.html.jinja", "jobs/planning/rates.json", "nsnet/py.typed")
    for name in (*wanted, *STRAY):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "jobs/link.py").symlink_to(tmp_path / ".env")
    packed = pack(tmp_path, tmp_path)
    with zipfile.ZipFile(packed.path) as archive:
        assert sorted(archive.namelist()) == sorted(wanted)
    assert (packed.files, packed.size) == (4, packed.path.stat().st_size)


def test_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert pack(tmp_path / "a").path.read_bytes() == pack(tmp_path / "b").path.read_bytes()


def test_job_runs_from_what_is_packed(tmp_path: Path) -> None:
    packed = pack(tmp_path)
    assert packed.size < 2 * 2**20
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(tmp_path / "job")
    assert (tmp_path / "job/jobs/report/page.html.jinja").is_file()
    code = "import jobs.planning.rates, jobs.submission.job; print(jobs.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "job", env={"PATH": "/usr/bin"}, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "job/jobs/__init__.py")


def test_source_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_BYTES", 1000)
    with pytest.raises(UsageError, match="at most 1000 are uploaded"):
        pack(tmp_path)
