"""What takes minutes: the command as a newcomer runs it, an interrupted search, and the full MNIST. `make test-slow`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

MNIST = Path(__file__).parents[2] / "shared" / "data"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def command(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    """`rcnn ...` with a storage and a Prefect of its own, both empty at first."""
    env = os.environ | {"RCNN_STORAGE": str(tmp_path / "storage"), "PREFECT_HOME": str(tmp_path / "prefect")}
    return subprocess.Popen(
        [sys.executable, "-m", "rcnn.cli", *arguments],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=2000)
    assert process.returncode == 0, output
    return output


def test_the_pipeline_starts_from_nothing_and_a_rerun_has_nothing_to_do(tmp_path: Path) -> None:
    first = finish(command(tmp_path, "pipeline", "--recipe", "debug_tiny"))
    for words in ("best trial", "test error", "4,938", "rcnn-mnist-sample version 1, champion", "rcnn predict"):
        assert words in first
    second = finish(command(tmp_path, "pipeline", "--recipe", "debug_tiny"))
    assert second.count("nothing to do") == 6
    samples = sorted((tmp_path / "storage").glob("reports/*/samples/*.png"))
    assert len(samples) == 10
    predicted = finish(command(tmp_path, "predict", *map(str, samples)))
    assert predicted.count(" %)") == 10
    assert "champion" in finish(command(tmp_path, "registry"))
    assert "version 1 is reproduced: the same weights" in finish(command(tmp_path, "registry", "verify", "1"))


def test_a_search_that_was_killed_at_any_moment_is_resumed_and_repeats_no_trial(tmp_path: Path) -> None:
    settings = ("tune.num_trials=3", "tune.max_concurrent_trials=1", "tune.epochs=3", "tune.num_rows=1600")
    search = ["tune", "--recipe", "debug_tiny"] + [word for setting in settings for word in ("--set", setting)]

    def files(pattern: str) -> list[Path]:
        return sorted((tmp_path / "storage" / "runs").glob(pattern))

    for is_due in (
        lambda: files("tune-*"),
        lambda: files("tune-*/ray-*/*"),
        lambda: files("tune-*/trials/trial-00.json"),
    ):
        killed = command(tmp_path, *search)
        while not is_due() and killed.poll() is None:
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
    kept = {file: file.stat().st_mtime_ns for file in files("tune-*/trials/*.json")}
    assert kept
    output = finish(command(tmp_path, *search))
    assert f"resuming: {len(kept)} trials have ended, {3 - len(kept)} are left" in output
    assert "  trial-00 " not in output
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert output.count('"name": "trial-') == 3


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_the_users_own_images_become_a_registered_model(tmp_path: Path, source: str) -> None:
    root = tmp_path / "shapes"
    draw_shapes(root, num_per_class=120)
    if source == "parquet":
        place = ["--set", f"data.root={root}", "--set", "data.image_size=20"]
        finish(command(tmp_path, "ingest", "--set", "data.source=folder", *place))
        finish(command(tmp_path, "data", "export", "shapes", "--to", str(tmp_path / "exported" / "shapes")))
        root = tmp_path / "exported" / "shapes"
    settings = (f"data.source={source}", f"data.root={root}", "data.image_size=20", "tune.enabled=false", "model.k=8")
    settings += ("train.epochs=8", "train.num_rows=0", "train.batch_size=16", "train.learning_rate=0.03")
    flags = [word for setting in settings for word in ("--set", setting)]
    output = finish(command(tmp_path, "pipeline", "--recipe", "debug_tiny", *flags))
    assert "rcnn-shapes version 1, champion" in output
    assert float(output.split("test error ")[1].split(" %")[0]) < 20
    assert finish(command(tmp_path, "pipeline", "--recipe", "debug_tiny", *flags)).count("nothing to do") == 5


def test_a_bad_image_met_on_ray_ends_the_command_and_leaves_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / "train" / label).mkdir(parents=True)
        for number in range(300):
            noise = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
            noise.save(tmp_path / "photos" / "train" / label / f"{number:03d}.png")
    bad = tmp_path / "photos" / "train" / "dog" / "150.png"
    bad.write_bytes(bad.read_bytes()[:5000])
    settings = (
        "data.source=folder",
        f"data.root={tmp_path / 'photos'}",
        "data.image_size=64",
        "data.shard_megabytes=1",
    )
    process = command(tmp_path, "ingest", *(word for setting in settings for word in ("--set", setting)))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "rcnn: DataError: train/dog/150.png: cannot be decoded" in output
    assert "Traceback" not in output
    assert list((tmp_path / "storage" / "datasets").iterdir()) == []


def draw_shapes(root: Path, num_per_class: int) -> None:
    """Grey discs and squares of mixed sizes, with noise."""
    rng = np.random.default_rng(0)
    for label in ("disc", "square"):
        (root / "train" / label).mkdir(parents=True)
        for number in range(num_per_class):
            side = int(rng.integers(20, 41))
            picture = Image.fromarray(rng.integers(0, 60, (side, side), dtype=np.uint8))
            corner, extent = rng.integers(2, side // 3, 2), side // 2
            box = [int(corner[0]), int(corner[1]), int(corner[0]) + extent, int(corner[1]) + extent]
            pen = ImageDraw.Draw(picture)
            (pen.ellipse if label == "disc" else pen.rectangle)(box, fill=int(rng.integers(150, 256)))
            picture.save(root / "train" / label / f"{number:03d}.png")


@pytest.mark.skipif(not MNIST.exists(), reason="the official files are not on this machine")
def test_the_full_mnist_is_learnt(tmp_path: Path) -> None:
    output = finish(command(tmp_path, "pipeline", "--recipe", "mnist_rcnn32_quick", "--set", f"data.root={MNIST}"))
    error = float(output.split("test error ")[1].split(" %")[0])
    assert error < 1.2
