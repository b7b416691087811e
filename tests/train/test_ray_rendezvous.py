"""Where the training workers of one machine listen, with a real Ray."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_the_workers_of_one_node_meet_on_loopback(tmp_path: Path) -> None:
    from rcnn.train.ray_workers import WorkersTrainer  # isort: skip

    from ray.train import RunConfig, ScalingConfig

    # Inside the test, since the workers cannot import this file.
    def add_up_and_look(settings: dict[str, Any]) -> dict[str, Any]:
        """What a worker runs: a sum over all workers, and the addresses on which this process listens."""
        import psutil
        import torch
        import torch.distributed as dist

        total = torch.tensor([1.0 + dist.get_rank()])
        dist.all_reduce(total)
        listening = [each for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        return {
            "sum": total.item(),
            "addresses": sorted({each.laddr.ip for each in listening}),
            "count": len(listening),
        }

    found = WorkersTrainer(
        add_up_and_look,
        settings={},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        is_own_ray=True,
        run_config=RunConfig(name="meeting", storage_path=str(tmp_path)),
    ).fit()
    assert found.return_value["sum"] == 3.0
    assert found.return_value["count"] >= 2, "the store and gloo listen"
    assert {address.removeprefix("::ffff:") for address in found.return_value["addresses"]} == {"127.0.0.1"}
