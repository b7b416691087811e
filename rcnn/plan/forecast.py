"""What `rcnn plan` says of a stage that is about to run, to stand beside the fact in its result.

In: what the stage is run with. Out: seconds. Nothing is timed for it, which would delay the stage: training steps count only
where `rcnn plan` has timed them before, on this machine and with this code.
"""

import sys
from collections.abc import Sequence

from rcnn.config import PipelineConfig
from rcnn.errors import RcnnError
from rcnn.plan.bill import after_ray_started, cost_of
from rcnn.plan.calibrate import Calibration, Job, known_calibrations
from rcnn.stages import STAGES, Results
from rcnn.storage import StageFolder


def forecast_seconds(config: PipelineConfig, name: str, results: Results, target: StageFolder) -> float:
    """The predicted time of a stage, from its start to its end; 0 where it is not known."""

    def known(jobs: Sequence[Job], num_threads: int, num_copies: int) -> list[Calibration]:
        return known_calibrations(jobs, target.storage, num_threads=num_threads, num_copies=num_copies)

    ray = sys.modules.get("ray")  # a pipeline starts it before its stages
    starts_ray = STAGES[name].on_ray(config) and not config.ray.address and not (ray and ray.is_initialized())
    try:
        cost = cost_of(config, name, results, known, target)
    except RcnnError:
        return 0.0  # about the data or the settings: the stage meets it too, and reports it
    return (after_ray_started(cost) if starts_ray else cost).seconds or 0.0
