"""The whole command on Ray: every image once, resumed, refused, and through the death of a worker."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError
from rcnn.evaluate import batch_inputs
from rcnn.evaluate.batch_predict import batch_predict
from rcnn.evaluate.batch_records import BAD_IMAGES, BATCH, Batch
from rcnn.train.checkpoint import load_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

NUM_ROWS = 600
SECONDS_TO_END = 20


@dataclass(frozen=True)
class Scene:
    folder: Path
    images_NHWC: np.ndarray
    said: str


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_inputs, "ROWS_PER_PART", 100)
        yield


@pytest.fixture(scope="module")
def scene(model: Path, ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A folder with `rows.parquet`, in six row groups, and their predictions, `whole`; to be read only."""
    folder = tmp_path_factory.mktemp("scene")
    images_NHWC = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 28, 28, 1), dtype=np.uint8)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(images_NHWC)
    pq.write_table(pa.table({"image": column}), folder / "rows.parquet", row_group_size=100)
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.chdir(folder)
        assert run(model) == 0
        Path("out").rename("whole")
    return Scene(folder, images_NHWC, said.getvalue())


@pytest.fixture
def images(scene: Scene, tmp_path: Path) -> np.ndarray:
    """Those in `rows.parquet`, in the folder of this test."""
    shutil.copy2(scene.folder / "rows.parquet", tmp_path)
    return scene.images_NHWC


@pytest.fixture
def predicted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the test beside the images, whose path is in the record, with a copy of their predictions in `out`."""
    monkeypatch.chdir(scene.folder)
    shutil.copytree("whole", "out")
    yield
    shutil.rmtree("out")


@pytest.fixture(autouse=True)
def _no_worker_is_left(ray_session: object) -> Iterator[None]:
    """A worker that outlives its run keeps a core, for which the next user of the cluster waits."""
    yield
    _, left = psutil.wait_procs(workers(), SECONDS_TO_END)
    assert not left


def run(model: Path, *arguments: str) -> int:
    return main(["batch-predict", "rows.parquet", "--to", "out", "--model", str(model), *arguments])


def written(folder: str = "out") -> dict[str, int]:
    """The files of predictions, with the times at which they were written."""
    return {file.name: file.stat().st_mtime_ns for file in sorted(Path(folder).glob("part-*.parquet"))}


@pytest.mark.usefixtures("predicted")
def test_each_row_is_predicted_once_and_a_finished_folder_is_left_alone(
    model: Path, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pl.read_parquet("out/part-*.parquet")
    assert frame["row_id"].to_list() == [f"rows.parquet#{row}" for row in range(NUM_ROWS)]
    with torch.inference_mode():
        wanted_NC = load_model(model)[0](torch.from_numpy(scene.images_NHWC).permute(0, 3, 1, 2)).softmax(1).numpy()
    np.testing.assert_allclose(np.stack(frame["probabilities"].to_list()), wanted_NC, atol=1e-5)
    batch = Batch.model_validate_json(Path("out", BATCH).read_text())
    assert (batch.is_finished, batch.rows, batch.num_parts, batch.bad) == (True, NUM_ROWS, 6, 0)
    assert "predicting 6 parts on 2 workers" in scene.said
    before = written()
    assert run(model) == 0
    printed = capsys.readouterr()
    assert "batch-predict: nothing to do: " in printed.err
    assert printed.out.splitlines()[-1] == "predictions: out"
    assert written() == before


@pytest.mark.usefixtures("predicted")
def test_a_finished_folder_is_recognised_without_torch_and_ray(model: Path) -> None:
    code = """
import sys
from rcnn.cli import main
assert main(sys.argv[1:]) == 0
print("imported:", [name for name in ("torch", "ray", "mlflow") if name in sys.modules])
"""
    # The parts of this test are smaller, which only planning them would notice.
    command = [sys.executable, "-c", code, "batch-predict", "rows.parquet", "--to", "out", "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "imported: []" in done.stdout
    assert "nothing to do" in done.stderr


@pytest.mark.thorough
@pytest.mark.usefixtures("predicted")
def test_an_interrupted_run_is_resumed_with_the_parts_that_are_missing(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pl.read_parquet("out/part-*.parquet")
    before = written()
    # As a kill leaves it: no mark of the end, a part without its record, a record without its part, and half of a part.
    batch = Batch.model_validate_json(Path("out", BATCH).read_text())
    Path("out", BATCH).write_text(batch.model_copy(update={"is_finished": False}).model_dump_json())
    Path("out/_parts/part-00001.json").unlink()
    Path("out/part-00003.parquet").unlink()
    os.truncate("out/part-00004.parquet", 100)
    assert run(model) == 0
    said = capsys.readouterr().err
    assert "resuming: 300 of 600 images are done" in said
    assert "predicting 3 parts on 2 workers" in said
    after = written()
    kept = ("part-00000.parquet", "part-00002.parquet", "part-00005.parquet")
    assert {name for name in before if before[name] == after[name]} == set(kept)
    assert pl.read_parquet("out/part-*.parquet").equals(whole)


@pytest.mark.usefixtures("images")
def test_a_folder_of_somebody_else_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    for arguments in ((), ("--fresh",)):
        assert run(model, *arguments) == 2
        assert "is not empty (it holds mine.txt). Choose another folder" in capsys.readouterr().err


@pytest.mark.thorough
@pytest.mark.usefixtures("predicted")
def test_a_folder_about_something_else_is_refused_and_fresh_replaces_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / "model.json").write_text((other / "model.json").read_text() + "\n")
    assert run(other) == 2
    assert "holds predictions of" in capsys.readouterr().err
    before = written()
    assert run(other, "--fresh") == 0
    assert all(written()[name] > time for name, time in before.items())


def test_bad_images_are_listed_and_counted_again_by_a_rerun(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.fromarray(np.full((28, 28), 60 * number, np.uint8)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    arguments = ["batch-predict", "in", "--to", "out", "--model", str(model)]
    for _ in range(2):
        assert main(arguments) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"rcnn: 1 of 5 images could not be read; out/{BAD_IMAGES} lists them"
    [bad] = [json.loads(line) for line in Path("out", BAD_IMAGES).read_text().splitlines()]
    assert bad["row_id"] == "bad.png"
    assert "is not an image" in bad["fault"]
    assert len(pl.read_parquet("out/*.parquet")) == 4


def test_faults_of_the_input_end_with_exit_code_2(
    model: Path, images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"number": [1]}), "numbers.parquet")
    Path("empty").mkdir()
    for source, fault in (("numbers.parquet", "has no column 'image'"), ("empty", "no image file found")):
        assert main(["batch-predict", source, "--to", "out", "--model", str(model)]) == 2
        assert fault in capsys.readouterr().err
    damaged = bytearray(Path("rows.parquet").read_bytes())
    damaged[1000:1100] = bytes(100)  # of the first page, which a worker reads
    Path("rows.parquet").write_bytes(damaged)
    assert run(model) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rcnn: SourceError: rows.parquet in ")
    assert "data.root" not in error


def workers() -> list[psutil.Process]:
    """Ray's processes that predict."""
    return [
        each for each in psutil.process_iter(["cmdline"]) if "PartPredictor" in " ".join(each.info["cmdline"] or [])
    ]


@pytest.mark.thorough
def test_a_killed_worker_is_replaced(
    model: Path, images: np.ndarray, tiny_config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = threading.Event()

    def kill_one() -> None:
        """Kills a worker as soon as one has written a part."""
        while not stop.is_set():
            if written() and (found := workers()):
                os.kill(found[0].pid, signal.SIGKILL)
                return
            stop.wait(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        assert run(model) == 0
    finally:
        stop.set()
        killer.join()
    assert len(pl.read_parquet("out/part-*.parquet")) == NUM_ROWS
    assert "a worker died" in capsys.readouterr().err
    for each in workers():  # Ray Data keeps the pool's other worker until this process ends
        each.kill()


@pytest.mark.thorough
def test_workers_that_always_die_end_the_run(
    model: Path, images: np.ndarray, tiny_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rcnn.evaluate import ray_batch

    class Dying(ray_batch.PartPredictor):
        def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
            os._exit(1)

    monkeypatch.setattr(ray_batch, "PartPredictor", Dying)
    config = tiny_config.with_settings({"execution.max_failures": 1})
    with pytest.raises(ClusterError, match="workers died more often than allowed") as caught:
        batch_predict(config, "rows.parquet", "out", model_name="m", model_folder=model)
    assert caught.value.retryable
