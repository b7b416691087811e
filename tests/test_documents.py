"""README.md, the guide, CONTRIBUTING.md, SECURITY.md and the pages of `infra/`: what they name exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AT_THE_ROOT = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
DOCUMENTS = [*(ROOT / name for name in AT_THE_ROOT), ROOT / "rcnn/README.md", *sorted((ROOT / "infra").rglob("*.md"))]
PATH = re.compile(
    r"(?:rcnn|flows|infra|tests)/[\w./-]*|(?:README|CHANGELOG|SECURITY|CONTRIBUTING)\.md|requirements\.lock|pyproject\.toml"
)
DEPLOYMENTS = {
    f"rcnn/{name}" for name in re.findall(r"^  - name: ([\w-]+)", (ROOT / "prefect.yaml").read_text(), re.MULTILINE)
}
MADE = {"infra/compose/.env"} | DEPLOYMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    quoted = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    named = {word for word in quoted if PATH.fullmatch(word)} - MADE
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert [link for link in links if link and not (document.parent / link).exists()] == []
    commands = [word for line in re.findall(r"^    (.+)$", text, re.MULTILINE) for word in line.split()]
    assert [
        word
        for word in commands
        if word.startswith(("infra/", "tests/")) and word not in MADE and not (ROOT / word).exists()
    ] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_target_of_make_that_a_document_names_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^    )make ([a-z-]+)", document.read_text(), re.MULTILINE)
    assert set(named) <= targets


def test_every_test_that_a_document_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    trees = (ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py"))
    known = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert len(named) >= 5
    assert named - known == set()


def test_the_tables_that_grow_are_named_where_they_are() -> None:
    rows = re.findall(r"`([A-Z_]+)` (?:in|of) `([\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert {"SOURCES", "NETWORKS", "STAGES", "SMALLEST_WRONG", "ORDER"} == {name for name, _ in rows}
    for name, file in rows:
        assert re.search(rf"^{name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
