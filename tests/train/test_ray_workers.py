"""What two training workers of one machine see of each other, in one run on a real Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from rcnn.config import PipelineConfig
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train import shared_rows
from rcnn.train.loop import training_data
from rcnn.train.ray_workers import WorkersTrainer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def notes(
    tiny_config: PipelineConfig, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each worker noted: the sum over all workers, where it listens, and the file that holds the rows."""
    from ray.train import RunConfig, ScalingConfig

    # Inside of a function, since the workers cannot import this file.
    def look(settings: dict[str, str]) -> dict[str, Any]:
        import tempfile

        import psutil
        import torch
        import torch.distributed as dist

        tempfile.tempdir = settings["temporary"]
        total = torch.tensor([1.0 + dist.get_rank()])
        dist.all_reduce(total)
        listening = [each for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        config = PipelineConfig.model_validate_json(settings["config"])
        shared = shared_rows.shared_on_node(
            lambda: training_data(config, Storage(config.storage), settings["data_folder"])
        )
        [line] = [line for line in Path("/proc/self/maps").read_text().splitlines() if "train-images.npy" in line]
        seen = {"sum": total.item(), "addresses": [each.laddr.ip for each in listening], "inode": line.split()[4]}
        Path(settings["notes"], str(dist.get_rank())).write_text(json.dumps(seen | {"num_rows": len(shared.train)}))
        return {}

    folders = {name: tmp_path_factory.mktemp(name) for name in ("temporary", "notes", "ray")}
    WorkersTrainer(
        look,
        settings={
            "config": tiny_config.model_dump_json(), "data_folder": digits.folder,
            "temporary": str(folders["temporary"]), "notes": str(folders["notes"]),
        },
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        is_own_ray=True,
        run_config=RunConfig(name="look", storage_path=str(folders["ray"])),
    ).fit()  # fmt: skip
    assert list(folders["temporary"].iterdir()) == []
    return [json.loads((folders["notes"] / rank).read_text()) for rank in "01"]


def test_they_meet_on_loopback(notes: list[dict[str, Any]]) -> None:
    first, second = notes
    assert first["sum"] == second["sum"] == 3.0
    assert len(first["addresses"]) >= 2, "the store and gloo listen"
    addresses = {address.removeprefix("::ffff:") for each in notes for address in each["addresses"]}
    assert addresses == {"127.0.0.1"}


def test_they_map_one_file_which_is_gone(notes: list[dict[str, Any]]) -> None:
    first, second = notes
    assert first["inode"] == second["inode"]
    assert first["num_rows"] == second["num_rows"] > 0
