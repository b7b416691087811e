"""A source is one file and one row of the table: it is added to a copy of the package, and ingested from there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rcnn.config import PipelineConfig
from rcnn.stages import stage_folder

pytestmark = pytest.mark.long

PACKAGE = Path(__file__).parents[3] / "rcnn"
ROW = """
SOURCES["stripes"] = Source("stripes", "nothing", "stripes", "open_stripes", ("image_size",))
"""
FILE = '''
"""Dark and bright images."""

import numpy as np

from rcnn.data.manifest import SourceRecord
from rcnn.data.sources.origin import Arrays, origin_of_arrays


def open_stripes(data, downloads):
    """40 images of each kind."""
    side = data.image_size or 4
    images = np.repeat(np.array([0, 255], np.uint8), 40)[:, None, None, None] * np.ones((1, side, side, 1), np.uint8)
    record = SourceRecord(name="stripes", url="", files={})
    return origin_of_arrays({"train": Arrays(images, np.repeat([0, 1], 40))}, ("dark", "bright"), record)
'''
USE = """
from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.data.ingest import run_ingest
from rcnn.data.manifest import require_manifest
from rcnn.stages import stage_folder
from rcnn.tracking import NoTracker
config = PipelineConfig().with_settings({"data.source": "stripes", "data.image_size": 6})
target = stage_folder(config, "ingest", {})
run_ingest(config, target, NoTracker())
print(require_manifest(target.storage, target.name).image_shape)
print(stage_folder(PipelineConfig(), "ingest", {}).name)
main(["sources"])
print(main(["config", "--set", "data.source=stripes", "--set", "data.resize=pad"]))
"""


def test_a_source_is_one_file_and_one_row(tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "rcnn"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "data/sources/stripes.py").write_text(FILE.lstrip())
    table = copy / "data/sources/__init__.py"
    table.write_text(table.read_text() + ROW)
    done = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy.parent)},
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shape, other_key, *listed, exit_code = done.stdout.splitlines()
    assert shape == "(6, 6, 1)"
    assert other_key == stage_folder(PipelineConfig(), "ingest", {}).name  # other data sets keep their identity
    assert any("stripes" in line for line in listed)
    assert exit_code == "2"
    assert "data.resize = 'pad' is for the sources folder and parquet, and source is 'stripes'" in done.stderr
