"""The key of a result: a hash of the settings that its stage reads, the identity of its inputs, and the code that makes it.

Python code is hashed by its syntax tree, so comments, docstrings and formatting change no key. Only the modules that the stage
imports count, found by reading import statements. C code is hashed without comments. This file imports no other of the package.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "rcnn"
KEY_LENGTH = 12

# Modules that report, store or check, and so do not affect a result. The schema counts by the values that a stage reads.
UNCOUNTED = frozenset(
    f"{PACKAGE}.{name}"
    for name in (
        "conditional", "config", "data.sources", "errors", "keys", "lease", "model.networks", "progress", "ranges",
        "ray_board", "ray_nodes", "ray_session", "recipes", "results", "section", "settings", "signals", "stages",
        "storage", "text", "tracking", "train.checkpoint_store", "train.elastic", "train.ray_workers", "train.rendezvous",
        "tune.budget", "tune.plots", "tune.resources", "tune.screen",
    )
)  # fmt: skip

Code = dict[str, str]
"""Digests by module."""


def key_of(settings: Mapping[str, Any], inputs: Iterable[str], code: Code) -> str:
    """The key of a result: the first 12 hex digits of a SHA-256 over everything that it depends on."""
    depends_on = {"settings": settings, "inputs": list(inputs), "code": code}
    return _digest(json.dumps(depends_on, sort_keys=True))


def code_of(modules: Iterable[str]) -> Code:
    """The digests of these modules and of all modules that they import, directly or indirectly."""
    found: Code = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or name in UNCOUNTED:
            continue
        found[name] = _digest_of(name)
        waiting += _imports_of(name)
    return dict(sorted(found.items()))


def code_of_the_package() -> Code:
    """The digests of all modules, those that affect no result included."""
    files = (file.relative_to(ROOT).with_suffix("") for file in Path(__file__).parent.rglob("*.py"))
    return {name: _digest_of(name) for name in sorted(".".join(file.parts).removesuffix(".__init__") for file in files)}


def differing(ours: Code, theirs: Code) -> list[str]:
    """The modules in which two versions of the code differ."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


@cache
def _digest_of(module: str) -> str:
    file = _file_of(module)
    assert file is not None, f"{module} has a file"
    text = "\n".join(_tokens(ast.parse(file.read_text(encoding="utf-8"))))
    in_c = file.with_suffix(".c")
    return _digest(text + (_c_code(in_c) if in_c.exists() else ""))


def _c_code(file: Path) -> str:
    """A C file without comments, and the files beside it that it includes."""
    code = without_comments(file.read_text(encoding="utf-8"))
    included = re.findall(r'#include "([^"]+)"', code)
    return code + "".join(_c_code(file.with_name(name)) for name in included)


@cache
def _imports_of(module: str) -> tuple[str, ...]:
    """The modules of this package that a module imports, inside functions too, but not under TYPE_CHECKING."""
    file = _file_of(module)
    assert file is not None, f"{module} has a file"
    return tuple(dict.fromkeys(_imported(ast.parse(file.read_text(encoding="utf-8")))))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _file_of(inner) else node.module
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imported(node)


def _is_ours(module: str) -> bool:
    return module.startswith(f"{PACKAGE}.")


def _file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    found = next((file for file in candidates if file.is_file()), None)
    if found is None and not _is_ours(module):  # a stage of another package
        spec = find_spec(module)
        found = Path(spec.origin) if spec and spec.origin else None
    return found


def _tokens(node: ast.AST) -> Iterator[str]:
    """The syntax tree as text, equal in every version of Python: empty fields, which differ between versions, are omitted.

    Docstrings and imports are omitted too: the order of imports is layout, and imported names appear where they are used.
    """
    yield type(node).__name__
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, ast.AST):
                if not _is_layout(child):
                    yield name
                    yield from _tokens(child)
            elif child is not None:
                yield f"{name}={child!r}"
    yield "."


def _is_layout(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def without_comments(code: str) -> str:
    """C code without comments and with white space collapsed; comment marks inside quotes are kept."""
    kept = re.sub(
        r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|/\*.*?\*/|//[^\n]*',
        lambda match: match[0] if match[0][0] in "\"'" else " ",
        code,
        flags=re.DOTALL,
    )
    return " ".join(kept.split())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]
