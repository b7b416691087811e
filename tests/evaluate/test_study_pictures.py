"""Pictures of what a network computes: grids by hand, and files of networks of all sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rcnn.evaluate.study_pictures import (
    _enlarged,
    _mosaic,
    _shown,
    _telling_maps,
    draw_fields,
    draw_filters,
    draw_states,
)
from rcnn.evaluate.unrolled import receptive_fields, unroll
from tests.evaluate.test_unrolled import classifier, images


def test_a_mosaic_fills_rows_from_the_left() -> None:
    tiles = [np.full((1, 2), number) for number in range(3)]
    assert _mosaic(tiles, 2, fill=9).tolist() == [[0, 0, 9, 1, 1], [9, 9, 9, 9, 9], [2, 2, 9, 9, 9]]


def test_maps_are_enlarged_by_repeating_units() -> None:
    assert _enlarged(np.array([[1, 2], [3, 4]]), 4).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2


def test_of_many_steps_the_first_and_the_last_are_shown() -> None:
    assert _shown(4) == [0, 1, 2, 3]
    assert _shown(1) == [0]
    assert (_shown(33)[0], _shown(33)[-1], len(_shown(33))) == (0, 32, 6)


def test_maps_that_change_and_maps_that_are_active_are_shown() -> None:
    state_TKHW = np.zeros((3, 20, 2, 2))
    state_TKHW[:, [3, 7, 11, 15]] = 5.0
    state_TKHW[1, [2, 4, 6, 8]] = 1.0
    assert _telling_maps(state_TKHW).tolist() == [2, 3, 4, 6, 7, 8, 11, 15]


@pytest.mark.parametrize("shape", [(32, 1, 5, 5), (96, 3, 5, 5), (10, 2, 3, 3)])
def test_filters_of_any_number_and_channels_are_drawn(shape: tuple[int, ...], tmp_path: Path) -> None:
    draw_filters(np.random.default_rng(0).normal(size=shape), "Filters", tmp_path / "filters.png")
    with Image.open(tmp_path / "filters.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(("t", "channels", "side"), [(1, 3, 32), (8, 1, 28), (2, 1, 9)])
def test_states_and_fields_of_any_network_are_drawn(t: int, channels: int, side: int, tmp_path: Path) -> None:
    model = classifier("rcnn", t=t, side=side, channels=channels, k=8)
    pixels = images(2, side=side, channels=channels)
    names = ("a $ class", "犬", *(f"class number {number}, with a long name" for number in range(8)))
    images_NHWC = pixels.permute(0, 2, 3, 1).numpy()
    draw_states(unroll(model, pixels), images_NHWC, [1, 3], names, "States", tmp_path / "states.png")
    fields = [field for step in range(t + 1) for field in receptive_fields(model, pixels, step)]
    draw_fields(fields, "Fields", tmp_path / "fields.png")
    for name in ("states.png", "fields.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300


def test_a_network_that_diverged_is_drawn_too(tmp_path: Path) -> None:
    model = classifier("rcnn", k=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    draw_states(
        unroll(model, images(1)), np.zeros((1, 28, 28, 1), np.uint8), [0], ["0"] * 10, "NaN", tmp_path / "x.png"
    )
    draw_fields(receptive_fields(model, images(1), 0), "NaN", tmp_path / "y.png")
    draw_filters(np.full((8, 1, 5, 5), np.nan), "NaN", tmp_path / "z.png")
    assert len(list(tmp_path.iterdir())) == 3
