"""Write what the container image holds as a CycloneDX document: `python -m tools.sbom LOCK FILE`.

Versions, licences and dependencies come from the metadata of the packages that are installed here; the hashes of their
files from the lock, which `pip` compares when it installs them. Packages that the lock holds for other platforms, and
that are not installed here, are left out.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Bom = dict[str, Any]


def merge(installed: Bom, locked: Bom) -> Bom:
    """The components of `installed` that `locked` has in the same version, with the hashes that `locked` has.

    Raises `ValueError` if a package is installed in a version that is not locked.
    """
    places = {(_name(item), item["version"]): item.get("externalReferences", []) for item in locked["components"]}
    names = {name for name, _ in places}
    components = [item for item in installed["components"] if _name(item) in names]
    if other := [f"{item['name']} {item['version']}" for item in components if _key(item) not in places]:
        raise ValueError(f"installed, but not as the lock says: {', '.join(other)}; run make setup")
    for item in components:
        hashed = [place for place in places[_key(item)] if place.get("hashes")]
        item["externalReferences"] = [*item.get("externalReferences", []), *hashed]
    kept = {item["bom-ref"] for item in components} | {installed["metadata"]["component"]["bom-ref"]}
    dependencies = [
        {**item, **({"dependsOn": [ref for ref in item["dependsOn"] if ref in kept]} if "dependsOn" in item else {})}
        for item in installed.get("dependencies", ())
        if item["ref"] in kept
    ]
    return {**installed, "components": components, "dependencies": dependencies}


def _name(item: dict[str, Any]) -> str:
    return re.sub(r"[-_.]+", "-", item["name"]).lower()


def _key(item: dict[str, Any]) -> tuple[str, str]:
    return _name(item), item["version"]


def cyclonedx(*arguments: str) -> Bom:
    """What `cyclonedx-py` writes."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "bom.json"
        command = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", *arguments, "--output-reproducible"]
        done = subprocess.run(
            [*command, "--no-validate", "--of", "JSON", "-o", str(file)], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        bom: Bom = json.loads(file.read_text())
    return bom


def main() -> None:
    lock, out = sys.argv[1:]
    locked = cyclonedx("requirements", lock)
    installed = cyclonedx("environment", sys.executable, "--pyproject", "pyproject.toml")
    bom = merge(installed, locked)
    Path(out).write_text(json.dumps(bom, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: {len(bom['components'])} packages")


if __name__ == "__main__":
    main()
