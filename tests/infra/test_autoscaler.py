"""A training on a cluster without workers gets them from Ray's own autoscaler v2, as the manifests count on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.nodes import can_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_run(), reason="namespaces need root"),
]
GROW = Path(__file__).parent / "kuberay" / "grow.py"


def test_a_training_on_a_cluster_of_nothing_but_a_head_makes_it_grow(tmp_path: Path) -> None:
    alone = ["unshare", "--pid", "--net", "--mount-proc", "--fork", "--kill-child", "bash", "-c"]
    script = 'ip link set lo up; "$@"; exit $?'  # bash stays, and reaps orphans
    done = subprocess.run(
        [*alone, script, "grow", sys.executable, str(GROW), "--set", "execution.num_workers=2"],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "OUTER_PROCESSES": os.readlink("/proc/self/ns/pid")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "before: 0" in done.stdout
    assert "after: 2.0" in done.stdout
    assert "waiting for the cluster to grow" in done.stdout + done.stderr
    assert list(tmp_path.glob("storage/runs/train-*/_result.json"))
