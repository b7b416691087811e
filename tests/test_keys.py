"""What changes the name of a result, and what does not: on copies of the package with one edit each."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rcnn.config import PipelineConfig
from rcnn.keys import code_of, differing, key_of, without_comments
from rcnn.stages import STAGES, stage_code

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
ASK = """
import json
from rcnn.keys import key_of
from rcnn.recipes import debug_tiny
from rcnn.stages import STAGES, stage_code
config = debug_tiny()
print(json.dumps({
    name: key_of(
        config.values_of(*stage.settings, *(f"-{name}" for name in stage.unread(config))), [], stage_code(config, name)
    )
    for name, stage in STAGES.items()
}))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, to be edited."""
    shutil.copytree(ROOT / "rcnn", tmp_path / "rcnn", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "rcnn"


def changed_stages(package: Path, edit: Callable[[], object]) -> list[str]:
    """The stages that have another key after an edit of the copy."""
    before = keys_of(package)
    edit()
    after = keys_of(package)
    return [name for name in STAGES if after[name] != before[name]]


def keys_of(package: Path) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=package.parent, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(package.parent), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def replace_in(file: Path, old: str, new: str) -> Callable[[], object]:
    def edit() -> None:
        text = file.read_text()
        assert text.count(old) >= 1, f"{old} is in {file}"
        file.write_text(text.replace(old, new, 1))

    return edit


NO_CHANGE = [
    ("data/ingest.py", "import errno\n", "# a comment\nimport errno\n"),
    ("data/ingest.py", '"""The ingest stage: ', '"""Another docstring: '),
    ("model/lrn.py", "\n\n\n", "\n\n\n\n\n\n"),
    (
        "train/step.py",
        "import torch\nimport torch.distributed as dist\n",
        "import torch.distributed as dist\nimport torch\n",
    ),
    ("model/lrn_cpu.c", "/*", "/* another comment */ /*"),
    ("config.py", "class DataConfig(Section):", "A_CONSTANT = 1\n\n\nclass DataConfig(Section):"),
    (
        "config.py",
        "num_workers: int = Field(\n        1,",
        "new: int = Field(3, ge=0, le=9)\n    num_workers: int = Field(\n        2,",
    ),
    (
        "config.py",
        "    width: float = Field(\n        1.0,",
        "    width: float = Field(\n        2.0,",
    ),  # of NIN and Maxout
    ("progress.py", "SECONDS_BETWEEN_LINES = 15", "SECONDS_BETWEEN_LINES = 16"),
    ("data/sources/cifar.py", "BYTES_PER_IMAGE = 3 * 32 * 32", "BYTES_PER_IMAGE = 32 * 3 * 32"),
    ("data/export.py", "PNG_EFFORT = 1", "PNG_EFFORT = 2"),
]


@pytest.mark.parametrize(("file", "old", "new"), NO_CHANGE, ids=[f"{file}: {new[:20]!r}" for file, _, new in NO_CHANGE])
def test_comments_layout_and_what_a_stage_does_not_import_change_no_key(
    package: Path, file: str, old: str, new: str
) -> None:
    assert changed_stages(package, replace_in(package / file, old, new)) == []


TRAINED = ["tune", "train", "evaluate", "audit", "register"]
CHANGE = [
    ("data/sources/digits.py", "SIDE = 28", "SIDE = 29", ["ingest"]),
    ("data/augment.py", "BLACK = 0", "BLACK = 1", ["tune", "train", "evaluate", "audit"]),
    ("model/lrn_cpu.c", "return", "return 0 +", TRAINED),
    ("train/optim.py", "threshold=0.0", "threshold=0.1", TRAINED),
    ("evaluate/report.py", "NUM_SAMPLES = 10", "NUM_SAMPLES = 9", ["evaluate"]),
    ("data/schema.py", "SCHEMA_VERSION = 2", "SCHEMA_VERSION = 3", list(STAGES)),
    ("config.py", "momentum: float = Field(0.9,", "momentum: float = Field(0.8,", ["tune", "train"]),
    (
        "config.py",
        "epochs: int = Field(10,",
        "new: int = Field(3, ge=0, le=9)\n    epochs: int = Field(10,",
        ["tune", "train"],
    ),
    ("config.py", "batch_size: int = Field(256,", "batch_size: int = Field(128,", ["evaluate", "audit"]),
]


@pytest.mark.parametrize(("file", "old", "new", "expected"), CHANGE, ids=[file for file, *_ in CHANGE])
def test_changed_code_renames_the_stages_that_import_it(
    package: Path, file: str, old: str, new: str, expected: list[str]
) -> None:
    assert changed_stages(package, replace_in(package / file, old, new)) == expected


def test_code_of_another_source_is_not_read() -> None:
    assert "rcnn.data.sources.digits" in stage_code(PipelineConfig(), "ingest")
    svhn = PipelineConfig().with_settings({"data.source": "svhn"})
    assert "rcnn.data.sources.digits" in stage_code(svhn, "ingest")  # it imports the names of the digits
    cifar = PipelineConfig().with_settings({"data.source": "cifar10"})
    assert "rcnn.data.sources.digits" not in stage_code(cifar, "ingest")


def test_imports_inside_functions_count_and_those_for_types_do_not() -> None:
    code = code_of(["rcnn.data.ingest"])
    assert "rcnn.data.ray_data" in code
    assert "rcnn.config" not in code


def test_modules_that_differ_are_named() -> None:
    ours = code_of(["rcnn.train.step"])
    assert differing(ours, dict(ours)) == []
    assert differing(ours, ours | {"rcnn.train.step": "other", "rcnn.new": "x"}) == ["rcnn.new", "rcnn.train.step"]


def test_a_key_is_twelve_digits_and_follows_each_part() -> None:
    keys = {
        key_of({"a": 1}, ["x"], {"m": "1"}),
        key_of({"a": 2}, ["x"], {"m": "1"}),
        key_of({"a": 1}, ["y"], {"m": "1"}),
        key_of({"a": 1}, ["x"], {"m": "2"}),
    }
    assert len(keys) == 4
    assert {len(key) for key in keys} == {12}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("int a; // one\nint b;", "int a; int b;"),
        ("/* a\n b */ int  a;", "int a;"),
        ('char *a = "/* no // comment";', 'char *a = "/* no // comment";'),
        (r'char a = \'"\'; // "'.replace("\\'", "'"), "char a = '\"';"),
    ],
)
def test_comments_of_c_are_left_out(code: str, expected: str) -> None:
    assert without_comments(code) == expected
