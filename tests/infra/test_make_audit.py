"""`make audit`: what it refuses, and that "could not be checked" is never "nothing found"."""

from importlib.metadata import distributions
from pathlib import Path

import pytest

from infra import audit


def package(name: str, licence: str) -> dict[str, str]:
    return {"Name": name, "Version": "1.0", "License": licence}


@pytest.mark.parametrize("licence", ["GPL-3.0-only", "GNU Affero General Public License v3", "LGPL-2.1", "UNKNOWN"])
def test_a_licence_that_obliges_needs_a_reviewer(licence: str) -> None:
    assert audit.unreviewed([package("new", licence)]) == [f"new 1.0: {licence}"]
    assert audit.unreviewed([package("psycopg-binary", licence), package("nvidia-nccl-cu13", licence)]) == []


@pytest.mark.parametrize("licence", ["MIT", "Apache-2.0 OR BSD-3-Clause", "MPL-2.0", "PSF-2.0", "ISC License (ISCL)"])
def test_a_licence_that_permits_passes(licence: str) -> None:
    assert audit.unreviewed([package("new", licence)]) == []


def test_every_reviewed_package_is_still_one_of_ours() -> None:
    lock = (audit.ROOT / "requirements.lock").read_text()
    ours = lock + (audit.ROOT / "pyproject.toml").read_text()
    assert [name for name in audit.REVIEWED if name not in ours] == []


def test_what_pip_audit_skips_is_not_called_sound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = '{"dependencies": [{"name": "six", "skip_reason": "not found"}], "fixes": []}'
    monkeypatch.setattr(audit, "_output", lambda command: skipped)
    assert audit.audit_vulnerabilities() == 2
    assert "NOT CHECKED: 1 packages" in capsys.readouterr().out


def test_a_known_vulnerability_is_found_with_its_remedy() -> None:
    fault = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
    answer = {
        "dependencies": [{"name": "a", "version": "1.0", "vulns": [fault]}, {"name": "b", "version": "1", "vulns": []}]
    }
    assert audit.vulnerabilities(answer) == (["a 1.0: PYSEC-1, fixed in 2.0"], [])


def test_a_program_that_is_missing_or_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "BIN", tmp_path)
    assert audit.audit_licences() == 2
    assert "NOT CHECKED: pip-licenses is not installed" in capsys.readouterr().out
    (tmp_path / "pip-audit").write_text("#!/bin/sh\necho 'no route to the host' >&2\nexit 1\n")
    (tmp_path / "pip-audit").chmod(0o755)
    assert audit.audit_vulnerabilities() == 2
    assert "NOT CHECKED: pip-audit: no route to the host" in capsys.readouterr().out


def test_the_code_has_no_finding() -> None:
    assert audit.audit_code() == 0


@pytest.mark.long
@pytest.mark.skipif(
    not any(found.metadata["Name"] == "pip-licenses" for found in distributions()),
    reason="pip-licenses is not installed",
)
def test_everything_that_is_installed_has_been_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--offline"]) == 0
    assert "not reviewed" not in capsys.readouterr().out
