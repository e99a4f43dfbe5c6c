"""Ask a vulnerability service about every package of a lock file: `python -m tools.audit [LOCK]`.

Exit codes:
    0  every package was audited, and none has a known vulnerability
    1  some packages have one; each is named, as are packages that no service knows
    3  no service answered, or some packages are known to none: nothing can be said of these

pip-audit itself ends with 0, "No known vulnerabilities found", if its service knows none of the packages, as behind a
package mirror. So its report is read here.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3
SERVICES: Final = (("-s", "pypi"), ("-s", "osv"))
"""pip-audit's options for each service, in the order in which they are asked."""
MAX_NAMED: Final = 20
"""Packages that a line names."""


def audit(lock: str, services: Sequence[Sequence[str]] = SERVICES) -> tuple[int, list[str]]:
    """Exit code and lines to print. A service is asked only for what the services before it did not know."""
    found: dict[str, None] = {}
    unknown: list[str] | None = None
    answered, failures = [], []
    count = 0
    for service in services:
        packages, reason = _ask(lock, service)
        if not packages:
            failures.append(f"{service[1]}: {reason}")
            continue
        found |= dict.fromkeys(_flaws(packages))
        skipped = {package["name"] for package in packages if "skip_reason" in package}
        unknown = [
            package["name"] for package in packages if package["name"] in skipped.intersection(unknown or skipped)
        ]
        answered.append(service[1])
        count = len(packages)
        if not unknown:
            break
    if unknown is None:
        return UNKNOWN, [f"not audited: no vulnerability service can be reached ({'; '.join(failures)})"]
    lines = list(found)
    if unknown:
        services_named = f"{' and '.join(answered)} {'do' if len(answered) > 1 else 'does'} not know"
        failed = f" ({'; '.join(failures)})" if failures else ""
        lines.append(f"not audited completely: {services_named} {_named(unknown)} of {count} packages{failed}")
    if found:
        return VULNERABLE, lines
    return (UNKNOWN, lines) if unknown else (CLEAN, [f"no known vulnerability in {count} packages"])


def _flaws(packages: list[dict[str, Any]]) -> list[str]:
    """A line for each known vulnerability of each package."""
    return [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or '-'}"
        for package in packages
        for flaw in package.get("vulns", ())
    ]


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _ask(lock: str, service: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """pip-audit's report on each package; or none, and the reason."""
    command = [sys.executable, "-m", "pip_audit", *service, "--requirement", lock, "--require-hashes", "--disable-pip",
               "--format", "json", "--progress-spinner", "off"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (ValueError, KeyError):
        lines = done.stderr.strip().splitlines()
        return [], lines[-1].split(":")[0] if lines else f"exit code {done.returncode}"


def main() -> int:
    code, lines = audit(sys.argv[1] if len(sys.argv) > 1 else "requirements.lock")
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
