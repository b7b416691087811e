"""Whether a training that `train.max_minutes` ended still stands."""

from rcnn.config import PipelineConfig
from rcnn.results import TrainResult
from rcnn.storage import StageFolder


def allows_no_more(config: PipelineConfig, trained: TrainResult, target: StageFolder) -> bool:
    """False where a limit ended the training and the config has a higher one, or none: the stage then resumes it."""
    allowed = config.train.max_minutes
    return not trained.limit_minutes or 0 < allowed <= trained.limit_minutes
