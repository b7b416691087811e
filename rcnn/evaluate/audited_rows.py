"""Whether the audit scores the training rows: by setting, or by what it costs. Light to import, for `rcnn plan`."""

from rcnn.config import PipelineConfig

FORWARDS_PER_STEP = 3
MOST_OF_TRAINING = 0.03
"""Training rows are scored by default if that is at most this share of the training's arithmetic."""


def reason_to_skip(config: PipelineConfig, num_rows: int) -> str:
    """Why these `num_rows` training rows are not scored; empty where they are."""
    if config.audit.train_rows == "never":
        return "audit.train_rows = never"
    share = scoring_share(config, num_rows)
    if config.audit.train_rows == "always" or share <= MOST_OF_TRAINING:
        return ""
    return f"it would add {100 * share:.0f} % to a training this short; audit.train_rows = always scores them"


def scoring_share(config: PipelineConfig, num_rows: int) -> float:
    """The arithmetic of scoring all training rows, as a share of the training's."""
    trained_rows = min(config.train.num_rows or num_rows, num_rows)
    return num_rows / (FORWARDS_PER_STEP * config.train.epochs * trained_rows)
