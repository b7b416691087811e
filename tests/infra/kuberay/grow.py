"""Ray's autoscaler v2 over pretended machines: trains with two workers on a cluster that has no core, and prints its nodes.

It must have a namespace of processes for itself, since Ray's `AutoscalingCluster` begins and ends with `ray stop --force`.
"""

import os
import subprocess
import sys

import ray
from ray.cluster_utils import AutoscalingCluster

WORKER = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}


def main() -> int:
    """Starts the cluster, trains there, and says what it had before and after."""
    assert os.readlink("/proc/self/ns/pid") != os.environ["OUTER_PROCESSES"], "would stop every Ray of this machine"
    cluster = AutoscalingCluster(
        head_resources={"CPU": 0}, worker_node_types={"worker": WORKER}, autoscaler_v2=True, idle_timeout_minutes=10
    )
    cluster.start()
    try:
        with ray.init("auto", log_to_driver=False):
            print("before:", ray.cluster_resources().get("CPU", 0))
        train = ["rcnn", "train", "--recipe", "debug_tiny", "--set", "ray.address=auto", *sys.argv[1:]]
        code = subprocess.run(train, check=False).returncode
        with ray.init("auto", log_to_driver=False):
            print("after:", ray.cluster_resources().get("CPU", 0))
        return code
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
