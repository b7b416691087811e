import numpy as np
import pytest
import torch

from rcnn.data import augment
from rcnn.data.augment import Augmentation, Draws, cut_out, cut_windows, flip_some
from rcnn.data.loader import Order, ResidentLoader, Rows


@pytest.fixture
def images() -> torch.Tensor:
    """64 images of 6x5 pixels, none of them black, channels last in memory."""
    pixels = np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def draws(count: int, **chosen: np.ndarray) -> Draws:
    nothing = {
        "offsets": np.zeros((count, 2), int),
        "flips": np.zeros(count, bool),
        "cutouts": np.zeros((count, 2), int),
    }
    return Draws(**(nothing | chosen))  # type: ignore[arg-type]


def test_a_window_is_the_slice_of_the_padded_image(images: torch.Tensor) -> None:
    offsets = np.random.default_rng(1).integers(0, 5, (64, 2))
    shifted = cut_windows(images, offsets, (6, 5), max_shift=2).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    for number, (row, column) in enumerate(offsets):
        np.testing.assert_array_equal(shifted[number], padded[number, :, row : row + 6, column : column + 5])


@pytest.mark.parametrize("window", [(6, 5), (3, 4), (1, 1)])
def test_both_ways_to_cut_agree(images: torch.Tensor, window: tuple[int, int]) -> None:
    room = np.array([6 - window[0], 5 - window[1]])
    offsets = np.random.default_rng(2).integers(0, room + 1, (64, 2))
    images_NHWC = images.permute(0, 2, 3, 1)
    by_copy = torch.from_numpy(augment._windows_by_copy(images_NHWC.contiguous().numpy(), offsets, window))
    by_index = augment._windows_by_index(images_NHWC, torch.from_numpy(offsets), window)
    assert torch.equal(by_copy.permute(0, 3, 1, 2), by_index)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_flip_mirrors_the_chosen_images_alone(images: torch.Tensor, memory_format: torch.memory_format) -> None:
    flips = np.random.default_rng(3).random(64) < 0.5
    flipped = images.clone(memory_format=memory_format)
    flip_some(flipped, flips)
    for number, is_flipped in enumerate(flips):
        expected = images[number].numpy()[:, :, ::-1] if is_flipped else images[number].numpy()
        np.testing.assert_array_equal(flipped[number].numpy(), expected)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_cutout_blackens_a_square_around_its_centre(images: torch.Tensor, side: int) -> None:
    centres = np.random.default_rng(4).integers(0, (6, 5), (64, 2))
    cut = images.clone()
    cut_out(cut, centres, side)
    for number, (row, column) in enumerate(centres - side // 2):
        expected = images[number].numpy().copy()
        expected[:, max(0, row) : max(0, row + side), max(0, column) : max(0, column + side)] = 0
        np.testing.assert_array_equal(cut[number].numpy(), expected)


def test_a_crop_is_a_part_of_the_image(images: torch.Tensor) -> None:
    augmentation = Augmentation(crop=4)
    drawn = augmentation.draw(np.random.default_rng(5), 64, (6, 5))
    cropped = augmentation.apply(images, drawn)
    assert cropped.shape == (64, 3, 4, 4)
    assert {tuple(offset) for offset in drawn.offsets} == {(row, column) for row in range(3) for column in range(2)}
    for number, (row, column) in enumerate(drawn.offsets):
        assert torch.equal(cropped[number], images[number, :, row : row + 4, column : column + 4])


def test_half_of_the_images_are_flipped_and_every_shift_occurs() -> None:
    drawn = Augmentation(max_shift=2, flip=True, cutout=3).draw(np.random.default_rng(6), 10_000, (6, 5))
    assert 4_800 < drawn.flips.sum() < 5_200
    counts = np.unique(drawn.offsets, axis=0, return_counts=True)[1]
    assert len(counts) == 25
    assert counts.min() > 300
    assert len(np.unique(drawn.cutouts, axis=0)) == 30


def test_nothing_asked_for_changes_nothing(images: torch.Tensor) -> None:
    nothing = Augmentation()
    assert torch.equal(nothing.apply(images, nothing.draw(np.random.default_rng(0), 64, (6, 5))), images)


@pytest.mark.parametrize("augmentation", [Augmentation(flip=True), Augmentation(cutout=2), Augmentation(max_shift=1)])
def test_the_stored_images_stay_as_they_are(images: torch.Tensor, augmentation: Augmentation) -> None:
    before = images.clone()
    augmented = augmentation.apply(images, augmentation.draw(np.random.default_rng(0), 64, (6, 5)))
    assert torch.equal(images, before)
    assert not torch.equal(augmented, before)


def test_any_number_of_ranks_augments_alike(images: torch.Tensor) -> None:
    rows = Rows(images[:12], torch.arange(12))
    augmentation = Augmentation(max_shift=2, crop=4, flip=True, cutout=2)
    whole = next(ResidentLoader(rows, Order(12, seed=5), augmentation).epoch(3))[0]
    halves = [next(ResidentLoader(rows, Order(12, 5, rank, 2), augmentation).epoch(3))[0] for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)
    assert whole.is_contiguous(memory_format=torch.channels_last)
