"""The whole pipeline on a cluster of machines, one of which is lost in each stage: the same weights and predictions."""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.recipes import debug_tiny
from rcnn.stages import STAGES
from rcnn.storage import Storage
from tests.faults.nodes import Nodes, can_run, end_left_over

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not can_run(), reason="network namespaces need root and `ip`"),
]

SECONDS_FOR_A_LINE = 600
WORKERS = ("rcnn-a", "rcnn-b")
NUM_IMAGES, SIDE = 6000, 160
SETTINGS = {
    "data.source": "parquet", "data.image_size": 32, "data.shard_megabytes": 1, "data.test_fraction": 0.4,
    "tune.enabled": True, "tune.num_trials": 3, "tune.early_stopping": "none", "tune.epochs": 4,
    "train.num_shares": 2, "train.deterministic": True, "train.epochs": 10, "train.num_rows": 0,
    "model.k": 8, "model.t": 2, "evaluate.batch_size": 13, "execution.num_workers": "1..2",
    "execution.checkpoint_minutes": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than 64 MB of photographs of noise, so that ingest runs on the cluster."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) // 4 + 19 * (number % 10)
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=95)
        rows.append({"bytes": stream.getvalue(), "path": None})
    labels = [number % 10 for number in range(NUM_IMAGES)]
    pq.write_table(pa.table({"image": rows, "label": labels}), folder / "train-00000.parquet", row_group_size=200)
    return folder


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    end_left_over()
    with Nodes(tmp_path) as nodes:
        for name in WORKERS:
            nodes.join(name, cpus=2)
        yield nodes


class Run:
    """A pipeline that was started on the user's machine."""

    def __init__(self, nodes: Nodes, config: PipelineConfig, log: Path):
        self.log, self._process = log, nodes.run(config, log)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS_FOR_A_LINE
        while text not in self.log.read_text():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{text!r} is missing in:\n{self.log.read_text()}"
            time.sleep(0.2)

    def finish(self) -> None:
        assert self._process.wait(timeout=SECONDS_FOR_A_LINE) == 0, self.log.read_text()


def digests(storage: str) -> dict[str, Any]:
    """What identifies the data set, the weights and the predictions."""
    root, found = Storage(storage), {}
    for name, key in (("ingest", "digest"), ("train", "weights_sha256"), ("evaluate", "predictions_sha256")):
        place = STAGES[name].folder
        results = [root.read_json(f"{place}/{folder}/_result.json") or {} for folder in root.list_folders(place)]
        [found[name]] = [result[key] for result in results if key in result]
    return found


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_one_machine_is_lost_in_each_stage_and_the_result_is_that_of_a_quiet_cluster(
    nodes: Nodes, images: Path, tmp_path: Path, place: str
) -> None:
    config = debug_tiny().with_settings(SETTINGS | {"data.root": str(images), "tracking.uri": nodes.tracking_uri})
    (tmp_path / "quiet").mkdir()
    before = {name: nodes.cpu_seconds(name) for name in WORKERS}
    quiet = config.with_settings({"storage": str(tmp_path / "quiet")})
    Run(nodes, quiet, tmp_path / "quiet.log").finish()
    used = [nodes.cpu_seconds(name) - before[name] for name in WORKERS]
    assert min(used) > 0.3 * sum(used), f"the nodes used {used} s of processor time"
    storage = nodes.bucket if place == "s3" else str(tmp_path / "disturbed")
    Storage(storage).write_text("there", "")
    run = Run(nodes, config.with_settings({"storage": storage}), tmp_path / "disturbed.log")
    for stage, line in (
        ("ingest", "  |   1 of "),
        ("tune", "epoch 2/4"),
        ("train", "  |   epoch 2/10"),
        ("evaluate", "  |   scoring "),
    ):
        run.wait_for(f"{stage}: submitted as Ray job")
        run.wait_for(line)
        time.sleep(1)
        nodes.kill("rcnn-a")
        nodes.join("rcnn-a", cpus=2)
    run.finish()
    assert digests(storage) == digests(str(tmp_path / "quiet"))
