"""Corruptions against scipy, Pillow and hand sums."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from rcnn.evaluate.corruptions import BLUR, CONTRAST, CORRUPTIONS, JPEG, NOISE, SHIFT, corrupted
from rcnn.evaluate.study_size import CORRUPTIONS as BILLED
from rcnn.evaluate.study_size import NUM_STRENGTHS

SEEDS = [11, 12, 13, 14]


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def images_NHWC(request: pytest.FixtureRequest) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (4, 20, 16, request.param)).astype(np.float32)
    return gaussian_filter(noise, (0, 2, 2, 0)).astype(np.uint8)


def test_what_is_billed_is_what_there_is() -> None:
    assert tuple(CORRUPTIONS) == BILLED
    assert all(len(levels) == NUM_STRENGTHS for levels in (NOISE, BLUR, CONTRAST, SHIFT, JPEG))


@pytest.mark.parametrize("name", BILLED)
@pytest.mark.parametrize("strength", range(1, NUM_STRENGTHS + 1))
def test_a_row_is_corrupted_alike_in_any_batch(name: str, strength: int, images_NHWC: np.ndarray) -> None:
    before = images_NHWC.copy()
    whole = corrupted(name, strength, images_NHWC, SEEDS)
    assert whole.shape == images_NHWC.shape
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(images_NHWC, before)
    for row in (3, 1):
        np.testing.assert_array_equal(
            corrupted(name, strength, images_NHWC[row : row + 1], SEEDS[row : row + 1])[0], whole[row]
        )
    assert (whole != images_NHWC).any()


def test_noise_has_the_deviation_that_it_says() -> None:
    grey_NHWC = np.full((8, 60, 60, 1), 128, np.uint8)
    for strength, deviation in enumerate(NOISE, start=1):
        noisy_NHWC = corrupted("noise", strength, grey_NHWC, range(8)).astype(float) - 128
        assert noisy_NHWC.std() == pytest.approx(255 * deviation, rel=0.02)
        assert abs(noisy_NHWC.mean()) < 0.5
        assert len({image.tobytes() for image in noisy_NHWC}) == 8


def test_blur_is_scipys_on_each_channel(images_NHWC: np.ndarray) -> None:
    found = corrupted("blur", 5, images_NHWC, SEEDS)
    for image, blurred in zip(images_NHWC, found, strict=True):
        for channel in range(image.shape[2]):
            truth = gaussian_filter(image[..., channel].astype(float), BLUR[4], mode="nearest")
            assert np.abs(truth - blurred[..., channel]).max() <= 0.51


def test_contrast_draws_pixels_towards_the_mean_of_their_channel() -> None:
    image_HWC = np.array([[[0], [100]], [[100], [200]]], np.uint8)
    assert corrupted("contrast", 2, image_HWC[None], [0])[0, ..., 0].tolist() == [[50, 100], [100, 150]]


def test_shift_moves_by_its_strength_in_one_of_eight_directions(images_NHWC: np.ndarray) -> None:
    for strength in range(1, NUM_STRENGTHS + 1):
        for image, moved in zip(images_NHWC, corrupted("shift", strength, images_NHWC, SEEDS), strict=True):
            moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
            truths = [shift(image, (strength * down, strength * right, 0), order=0, cval=0) for down, right in moves]
            assert any(np.array_equal(moved, truth) for truth in truths)


def test_jpeg_is_pillows_at_the_quality(images_NHWC: np.ndarray) -> None:
    found = corrupted("JPEG", 3, images_NHWC, SEEDS)
    picture = Image.fromarray(images_NHWC[1].squeeze())
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=58)
    np.testing.assert_array_equal(found[1].squeeze(), np.asarray(Image.open(packed)))
