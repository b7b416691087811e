import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcnn.data.augment import shift
from rcnn.data.loader import ResidentLoader, Rows
from rcnn.errors import DataError


def numbered_rows(count: int) -> Rows:
    """Rows whose label is their number."""
    return Rows(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))


@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 8), st.integers(0, 3))
def test_ranks_share_each_global_batch_without_overlap(rows: int, share: int, ranks: int, epoch: int) -> None:
    batch_size = share * ranks
    if rows < batch_size:
        return
    whole = [
        labels.tolist() for _, labels in ResidentLoader(numbered_rows(rows), batch_size=batch_size, seed=1).epoch(epoch)
    ]
    loaders = [
        ResidentLoader(numbered_rows(rows), batch_size=batch_size, seed=1, rank=rank, num_ranks=ranks)
        for rank in range(ranks)
    ]
    parts = [[labels.tolist() for _, labels in loader.epoch(epoch)] for loader in loaders]
    assert [sum((part[step] for part in parts), []) for step in range(loaders[0].num_steps)] == whole
    seen = sum(whole, [])
    assert len(seen) == len(set(seen)) == rows // batch_size * batch_size


def test_epochs_differ_and_repeat_by_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = ResidentLoader(numbered_rows(50), batch_size=50, seed=seed)
        return next(labels.tolist() for _, labels in loader.epoch(epoch))

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 60))
def test_shares_for_evaluation_hold_each_row_once(rows: int, ranks: int, batch_size: int) -> None:
    labels = [
        label
        for rank in range(ranks)
        for _, batch in numbered_rows(rows).share(rank, ranks).batches(batch_size)
        for label in batch.tolist()
    ]
    assert sorted(labels) == list(range(rows))


def test_fewer_rows_than_a_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="has 3 rows, fewer than one batch of 4"):
        ResidentLoader(numbered_rows(3), batch_size=4, seed=0)


def test_a_shift_moves_the_whole_image_and_fills_with_black() -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    shifted = shift(images, torch.randint(0, 5, (64, 2)), max_shift=2)
    assert shifted.shape == images.shape
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    found = set()
    for number in range(64):
        places = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if (padded[number, :, dy : dy + 6, dx : dx + 5] == shifted[number].numpy()).all()
        ]
        assert len(places) == 1
        found.update(places)
    assert len(found) > 15


def test_a_shift_of_nothing_changes_nothing_and_ranks_shift_alike() -> None:
    images = torch.randint(0, 256, (12, 1, 5, 5), dtype=torch.uint8)
    assert torch.equal(shift(images, torch.full((12, 2), 3), max_shift=3), images)
    rows = Rows(images, torch.arange(12))
    whole = next(ResidentLoader(rows, batch_size=12, seed=5, max_shift=2).epoch(3))[0]
    halves = [
        next(ResidentLoader(rows, batch_size=12, seed=5, max_shift=2, rank=rank, num_ranks=2).epoch(3))[0]
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(halves), whole)
