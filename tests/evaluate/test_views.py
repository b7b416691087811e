"""Views against numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import shift
from scipy.special import softmax
from torch import Tensor

from rcnn.evaluate.study_size import NUM_VIEWS
from rcnn.evaluate.views import mean_probabilities, views_of


@pytest.fixture
def images_NCHW() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 2, 9, 11), dtype=np.uint8))


@pytest.mark.parametrize("name", NUM_VIEWS)
def test_there_are_as_many_views_as_are_billed(name: str, images_NCHW: Tensor) -> None:
    views = list(views_of(name, images_NCHW, crop=5))
    assert len(views) == NUM_VIEWS[name]
    assert all(view.dtype == torch.uint8 for view in views)


def test_mirrored_views_are_the_image_and_its_mirror_image(images_NCHW: Tensor) -> None:
    plain, mirrored = views_of("mirrored", images_NCHW, crop=0)
    assert torch.equal(plain, images_NCHW)
    np.testing.assert_array_equal(mirrored.numpy(), np.flip(images_NCHW.numpy(), 3))


def test_shifted_views_are_scipys_shifts_with_black_borders(images_NCHW: Tensor) -> None:
    found = {view.numpy().tobytes() for view in views_of("shifted", images_NCHW, crop=0)}
    moves = [(down, right) for down in (-2, 0, 2) for right in (-2, 0, 2)]
    truth = {shift(images_NCHW.numpy(), (0, 0, *move), order=0, cval=0).tobytes() for move in moves}
    assert found == truth
    assert len(truth) == 9


def test_crops_reach_from_corner_to_corner(images_NCHW: Tensor) -> None:
    crops = [view.numpy() for view in views_of("crops", images_NCHW, crop=5)]
    whole = images_NCHW.numpy()
    corners = [whole[:, :, top : top + 5, left : left + 5] for top in (0, 2, 4) for left in (0, 3, 6)]
    for crop, corner in zip(crops, corners, strict=True):
        np.testing.assert_array_equal(crop, corner)
    mirrored = [view.numpy() for view in views_of("mirrored_crops", images_NCHW, crop=5)]
    for number, crop in enumerate(crops):
        np.testing.assert_array_equal(mirrored[2 * number], crop)
        np.testing.assert_array_equal(mirrored[2 * number + 1], crop[..., ::-1])


def test_probabilities_are_averaged_not_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (4, 6, 3))
    truth = softmax(logits, axis=2).mean(0)
    np.testing.assert_allclose(mean_probabilities(map(torch.from_numpy, logits)).numpy(), truth, rtol=1e-12)
