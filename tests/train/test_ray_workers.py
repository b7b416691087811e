"""What two training workers of one machine see of each other, in one run on a real Ray."""

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Seen:
    """What each worker noted (the sum over all, where it listens, the file with the rows), and what was left."""

    notes: list[dict[str, Any]]
    returned: dict[str, Any]
    left: list[Path]


@pytest.fixture(scope="module")
def seen(tiny_config: PipelineConfig, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory) -> Seen:
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
        note = {"sum": total.item(), "addresses": [each.laddr.ip for each in listening]}
        note |= {"inode": line.split()[4], "num_rows": len(shared.train)}
        Path(settings["notes"], str(dist.get_rank())).write_text(json.dumps(note))
        return note

    folders = {name: tmp_path_factory.mktemp(name) for name in ("temporary", "notes", "ray")}
    found = WorkersTrainer(
        look,
        settings={
            "config": tiny_config.model_dump_json(), "data_folder": digits.folder,
            "temporary": str(folders["temporary"]), "notes": str(folders["notes"]),
        },
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        is_own_ray=True,
        run_config=RunConfig(name="look", storage_path=str(folders["ray"])),
    ).fit()  # fmt: skip
    notes = [json.loads((folders["notes"] / rank).read_text()) for rank in "01"]
    return Seen(notes, dict(found.return_value), list(folders["temporary"].iterdir()))


def test_they_meet_on_loopback(seen: Seen) -> None:
    first, second = seen.notes
    assert first["sum"] == second["sum"] == 3.0
    assert len(first["addresses"]) >= 2, "the store and gloo listen"
    addresses = {address.removeprefix("::ffff:") for each in seen.notes for address in each["addresses"]}
    assert addresses == {"127.0.0.1"}


def test_the_first_ones_answer_is_the_result(seen: Seen) -> None:
    assert seen.returned == seen.notes[0]


def test_they_map_one_file_which_is_gone(seen: Seen) -> None:
    first, second = seen.notes
    assert first["inode"] == second["inode"]
    assert first["num_rows"] == second["num_rows"] > 0
    assert seen.left == []
