"""Masks follow from (seed, epoch, step, share, layer), and from nothing else."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rcnn.model.compiled import can_compile
from rcnn.model.dropout import Dropout, Position, kernel, set_position

pytestmark = pytest.mark.skipif(not can_compile(), reason="there is no C compiler")

RATE = 0.3
AT = {"seed": 1, "epoch": 2, "step": 3, "share": 0}


def mask(shape: tuple[int, ...] = (4, 32, 16, 16), *, layer: int = 0, p: float = RATE, **at: int) -> Tensor:
    """True where an element is kept."""
    model = nn.ModuleList(Dropout(p) for _ in range(layer + 1))
    set_position(model, Position(**(AT | at)))
    return model[layer](torch.ones(shape)) != 0


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)  # fmt: skip
def test_the_generator_gives_the_published_values(counter: list[int], key: list[int], expected: list[int]) -> None:
    out = (ctypes.c_uint32 * 4)()
    kernel(torch.float32).philox((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    assert list(out) == expected


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_as_many_are_kept_as_the_rate_says(p: float) -> None:
    kept = mask((16, 32, 16, 16), p=p)
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=4.5 * deviation)
    for dim in range(4):  # every image, map, row and column
        of_each = kept.double().mean(dim=[other for other in range(4) if other != dim])
        assert of_each.std() < 1.8 * deviation * len(of_each) ** 0.5


def test_masks_of_other_steps_layers_shares_epochs_and_seeds_are_independent() -> None:
    others = [{"seed": 2}, {"epoch": 3}, {"step": 4}, {"share": 1}, {"layer": 1}, {"layer": 2}, {"step": 3 + 2**32}]
    masks = [mask(**{"layer": 0, **other}).double() for other in [{}, *others]]
    bound = 4.5 / masks[0].numel() ** 0.5
    for one, other in itertools.combinations(masks, 2):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < bound


def test_neighbours_in_every_direction_are_independent() -> None:
    kept = mask().double()
    for dim, distance in itertools.product(range(4), [1, 2]):
        one, other = (
            kept.narrow(dim, 0, kept.shape[dim] - distance),
            kept.narrow(dim, distance, kept.shape[dim] - distance),
        )
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 4.5 / one.numel() ** 0.5


def test_a_step_is_drawn_alike_whatever_else_was_drawn_and_on_any_number_of_threads() -> None:
    expected, before = mask(), torch.get_num_threads()
    torch.rand(5)
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(mask(), expected)
    finally:
        torch.set_num_threads(before)


def test_an_images_mask_does_not_depend_on_the_number_of_images_nor_on_the_layout() -> None:
    assert torch.equal(mask((2, 32, 16, 16)), mask((5, 32, 16, 16))[:2])
    dropout = Dropout(RATE)
    set_position(dropout, Position(**AT))
    x = torch.randn(3, 12, 5, 7)
    assert torch.equal(dropout(x), dropout(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (4, 300), (2, 8, 1, 1), (0, 8, 2, 2)])
def test_the_backward_pass_draws_the_same_mask_and_scales_alike(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = Dropout(0.25)(x)  # a rate that all types hold exactly
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y)
    assert set(y.unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75, dtype=dtype))}


def test_without_a_position_torchs_seed_decides() -> None:
    dropout, x = Dropout(0.5), torch.ones(2, 8, 4, 4)
    torch.manual_seed(5)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(5)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero() -> None:
    x = torch.ones(2, 8, 4, 4)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_what_is_not_a_number_is_kept_or_dropped() -> None:
    y = Dropout(0.5)(torch.full((4, 100), float("nan")))
    assert 0 < int(y.isnan().sum()) < y.numel()
