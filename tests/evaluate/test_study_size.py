"""What studies cost, by hand."""

import pytest

from rcnn.config import PipelineConfig
from rcnn.evaluate.study_size import num_images_of_fields, num_passes, num_sampled


def config_of(**settings: object) -> PipelineConfig:
    return PipelineConfig().with_settings(
        {"model.t": 3} | {name.replace("__", "."): value for name, value in settings.items()}
    )


def test_the_passes_of_the_defaults() -> None:
    # 600 validation rows; 1,000 test rows as they are and with 0, 1 and 2 of 3 steps (1/4 + 2/4 + 3/4 of a pass); 16 images
    # for receptive fields, 4 passes after each of 0 to 3 steps (1/4 + 2/4 + 3/4 + 1).
    assert num_passes(config_of(), num_test=10_000, num_val=600) == 600 + 1000 * 2.5 + 16 * 4 * 2.5


def test_views_and_corruptions_multiply() -> None:
    config = config_of(evaluate__views=("mirrored", "shifted"), evaluate__robustness=True, evaluate__steps=False)
    assert num_passes(config, num_test=500, num_val=9000) == 5000 + 500 * (1 + 2 + 9 + 25)


@pytest.mark.parametrize(("asked", "num_test", "sampled"), [(1000, 300, 300), (100, 300, 100), (0, 300, 300)])
def test_a_sample_is_no_larger_than_the_test_set(asked: int, num_test: int, sampled: int) -> None:
    assert num_sampled(config_of(evaluate__sample_rows=asked), num_test) == sampled


def test_a_network_without_steps_samples_nothing_by_default() -> None:
    config = PipelineConfig().with_settings({"model.network": "wide", "tune.enabled": False})
    assert num_sampled(config, 500) == 0
    assert num_passes(config, num_test=500, num_val=70) == 70


def test_of_large_images_fewer_are_differentiated() -> None:
    assert [num_images_of_fields(side, side) for side in (28, 64, 128, 512)] == [16, 16, 4, 1]
