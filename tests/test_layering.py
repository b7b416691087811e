"""Who may import whom, read from the sources: data flows left to right, and imports point left."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = [
    "text",
    "scores",
    "keys",
    "errors",
    "section",
    "ranges",
    "config",
    "settings",
    "results",
    "progress",
    "storage",
    "conditional",
    "lease",
    "signals",
    "tracking",
    "ray_nodes",
    "ray_token",
    "ray_session",
    "ray_board",
]
ORDER = [
    *SHARED,
    "recipes",
    "config_diff",
    "data",
    "model",
    "train",
    "tune",
    "evaluate",
    "registry",
    "stages",
    "api",
    "verify",
    "plan",
    "compare",
    "reproduce",
    "doctor",
    "gc",
    "summary",
    "completion",
    "cli",
]
TABLES = ["rcnn.model.networks", "rcnn.data.sources"]
"""Text alone, which needs nothing: read by the config, which stands left of what the rows name."""
HOMES = {
    "prefect": ["flows/"],
    "ray": [
        "rcnn/train/ray_trainer.py",
        "rcnn/train/ray_workers.py",
        "rcnn/train/rendezvous.py",
        "rcnn/train/elastic.py",
        "rcnn/train/shared_rows.py",
        "rcnn/ray_nodes.py",
        "rcnn/ray_session.py",
        "rcnn/ray_board.py",
        "rcnn/data/ray_data.py",
        "rcnn/evaluate/ray_scoring.py",
        "rcnn/evaluate/ray_batch.py",
        "rcnn/tune/ray_tuner.py",
        "rcnn/tune/ray_trial.py",
        "flows/job_server.py",
        "flows/ray_client.py",
        "infra/serve/",
        "infra/kuberay/base/leave.py",
    ],
    "mlflow": ["rcnn/registry/mlflow_store.py", "rcnn/registry/served_model.py"],
    "scipy": [
        "rcnn/data/sources/svhn.py",
        "rcnn/evaluate/paired.py",
        "rcnn/evaluate/calibration.py",
        "rcnn/evaluate/corruptions.py",
        "rcnn/evaluate/early_exit.py",
        "rcnn/evaluate/ensemble.py",
        "rcnn/registry/gate.py",
        "rcnn/reproduce/outcome.py",
    ],
    "pyarrow": [
        "rcnn/data/",
        "rcnn/storage.py",
        "rcnn/tune/ledger.py",
        "rcnn/evaluate/predictions.py",
        "rcnn/reproduce/report.py",
        "rcnn/compare/table.py",
        "rcnn/evaluate/batch_",
        "rcnn/evaluate/audit.py",
    ],
    "apprise": ["flows/notify.py"],
    "optuna": ["rcnn/tune/"],
    "onnxruntime": ["rcnn/registry/export.py"],
    "torchvision": [],
    "flows": ["flows/", "rcnn/cli.py", "infra/local/"],
    "infra": ["infra/"],
}


def sources() -> list[Path]:
    return [file for folder in ("rcnn", "flows", "infra") for file in sorted((ROOT / folder).rglob("*.py"))]


def file_of(module: str) -> Path | None:
    file = ROOT / f"{module.replace('.', '/')}.py"
    return file if file.is_file() else None


def imports(file: Path, *, for_types: bool = True) -> Iterator[str]:
    """Every module that a file imports, those inside functions and, unless `for_types` is off, for type checkers included."""
    tree = ast.parse(file.read_text())
    if not for_types:
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where they point"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_vendors_are_imported_in_their_homes_alone(file: Path) -> None:
    name = file.relative_to(ROOT).as_posix()
    for module in imports(file):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or any(name.startswith(home) for home in homes), f"{name} imports {module}"


@pytest.mark.parametrize("file", sorted((ROOT / "rcnn").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_left(file: Path) -> None:
    own = file.relative_to(ROOT / "rcnn").with_suffix("").parts[0]
    if own == "__init__":
        return
    for module in imports(file):
        if any(module == table or module.rpartition(".")[0] == table for table in TABLES) and file_of(module) is None:
            continue
        parts = module.split(".")
        if parts[0] == "rcnn" and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(own), f"{own} imports {module}, which stands right of it"


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_anyone_may_import_imports_the_standard_library_alone(table: str) -> None:
    file = file_of(table) or file_of(f"{table}.__init__")
    assert file
    for module in imports(file, for_types=False):
        assert module.split(".")[0] in sys.stdlib_module_names, f"{table} imports {module}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in (ROOT / "rcnn").rglob("*.py")
        if file.stem != "__init__"
    }
    graph = {
        name: {known for known in names if any(f"{module}.".startswith(f"{known}.") for module in modules)}
        for name, modules in ((name, list(imports(file))) for name, file in names.items())
    }
    assert graph["rcnn.model.lrn"] >= {"rcnn.model.lrn_cpu", "rcnn.model.lrn_equation"}
    assert graph["rcnn.data.loader"] >= {"rcnn.data.streaming", "rcnn.data.batches"}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_package_imports_the_models_names_from_their_own_modules() -> None:
    """`rcnn.model` imports lazily, which whoever reads import statements, as the keys of stages do, cannot follow."""
    modules = {file.stem for file in (ROOT / "rcnn" / "model").glob("*.py")}
    for file in sources():
        for module in imports(file):
            parts = module.split(".")
            assert parts[:2] != ["rcnn", "model"] or parts[2] in modules, f"{file} imports {module}"


def test_importing_leaves_torchs_optimizers_as_they_are() -> None:
    code = """
import torch
def attributes():
    classes = (torch.optim.Optimizer, torch.optim.SGD)
    return [(name, id(value), dict(getattr(inspect.unwrap(value) if callable(value) else value, "__dict__", {})))
            for each in classes for name, value in vars(each).items() if not name.startswith("__")]
import inspect
before = attributes()
import rcnn.train.loop, rcnn.train.optim
assert attributes() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_model_needs_torch_and_the_standard_library_alone() -> None:
    for file in (ROOT / "rcnn" / "model").glob("*.py"):
        for module in imports(file):
            top = module.split(".")[0]
            assert top in ("torch", *sys.stdlib_module_names) or module.startswith("rcnn.model"), f"{file}: {module}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("rcnn", ["torch", "ray", "mlflow", "prefect", "pydantic"]),
        ("rcnn.cli", ["torch", "ray", "mlflow", "prefect", "pydantic"]),
        ("rcnn.config", ["torch", "ray", "mlflow", "prefect", "pyarrow"]),
        ("rcnn.stages", ["torch", "ray", "mlflow", "prefect", "pyarrow"]),
        ("rcnn.train.loop", ["ray", "mlflow", "prefect", "torchvision", "PIL"]),
    ],
)
def test_importing_stays_light(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_leaves_matplotlib_and_the_logs_of_others_as_they_are() -> None:
    code = """
import logging
import matplotlib, mlflow, alembic
def state():
    levels = [logging.getLogger(name).level for name in ("alembic", "mlflow", "mlflow.store.db.utils")]
    return matplotlib.get_backend(auto_select=False), levels
before = state()
import rcnn.evaluate.report, rcnn.registry.mlflow_store
assert state() == before, (before, state())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
