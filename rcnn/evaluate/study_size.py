"""How large the studies of an evaluation are: what is measured besides the figures of all test rows, and what that costs.

In: settings, and numbers of rows. Out: forward passes, for the stage and for `rcnn plan`. Importing this file loads no torch.
"""

from rcnn.config import PipelineConfig

NUM_VIEWS = {"mirrored": 2, "shifted": 9, "crops": 9, "mirrored_crops": 18}
"""Forward passes per image of each set of views (see `views.py`)."""
CORRUPTIONS = ("noise", "blur", "contrast", "shift", "JPEG")
NUM_STRENGTHS = 5
MOST_ROWS_TO_CALIBRATE = 5000
"""Validation rows that the temperature, a single number, is fitted to."""
NUM_IMAGES_OF_FIELDS = 16
"""Images over which the gradients of receptive fields are averaged, at most."""
PIXELS_OF_FIELDS = 16 * 64 * 64
"""Of those images together, if there is more than one: their gradients take 60 bytes a pixel and feature map at T = 3."""
PASSES_OF_A_FIELD = 4
"""Forward passes that the gradients of all layers after one time step take: one forward, and up to four partial backward."""


def num_steps_studied(config: PipelineConfig) -> int:
    """T where one network has recurrent steps to study, else 0."""
    is_one = config.model.members == 1 or config.model.combine == "weights"
    return config.model.t if config.evaluate.steps and is_one and "t" in config.model.reads else 0


def num_sampled(config: PipelineConfig, num_rows: int) -> int:
    """Test rows that the studies look at; 0 if there is no study."""
    settings = config.evaluate
    is_any = settings.views or settings.robustness or num_steps_studied(config)
    return min(settings.sample_rows or num_rows, num_rows) if is_any else 0


def num_images_of_fields(height: int, width: int) -> int:
    """Images of a size over which the gradients of receptive fields are averaged."""
    return max(1, min(NUM_IMAGES_OF_FIELDS, PIXELS_OF_FIELDS // (height * width)))


def num_passes(config: PipelineConfig, *, num_test: int, num_val: int) -> float:
    """Forward passes of the whole network that calibration and studies take, all images together.

    Of a network with T steps, t steps take about (t + 1) / (T + 1) of a pass: 0.28 to 1 for RCNN-96 with T = 3, where this
    rule says 0.25 to 1.
    """
    settings, last = config.evaluate, num_steps_studied(config)
    per_image = 1.0 + sum(NUM_VIEWS[name] for name in settings.views) + last / 2
    per_image += len(CORRUPTIONS) * NUM_STRENGTHS * settings.robustness
    fields = NUM_IMAGES_OF_FIELDS * PASSES_OF_A_FIELD * (last + 2) / 2 if last else 0.0
    of_val = min(num_val, MOST_ROWS_TO_CALIBRATE) * (1.0 + last / 2 * studies_exit(config))
    return of_val + num_sampled(config, num_test) * (per_image + studies_exit(config)) + fields


def studies_exit(config: PipelineConfig) -> bool:
    """Whether an early exit is studied: of networks that serve any number of steps, where rows are left to choose it by."""
    return bool(num_steps_studied(config)) and config.train.any_t and not config.train.with_validation
