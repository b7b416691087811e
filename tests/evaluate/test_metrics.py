import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from rcnn.evaluate.metrics import score_logits


def test_figures_agree_with_a_hand_count() -> None:
    logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]])
    scores = score_logits(logits, torch.tensor([0, 1, 1, 0]))
    assert scores.confusion.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert scores.error == 0.5
    assert scores.accuracy_per_class == [0.5, 0.5, None]
    truth = functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
    assert scores.loss == pytest.approx(float(truth))


@given(st.integers(1, 60), st.integers(1, 7))
def test_shares_of_any_number_of_workers_add_up_to_the_whole(rows: int, workers: int) -> None:
    logits, labels = torch.randn(rows, 4), torch.randint(0, 4, (rows,))
    whole = score_logits(logits, labels)
    parts = [score_logits(logits[rank::workers], labels[rank::workers]) for rank in range(min(workers, rows))]
    total = sum(parts[1:], parts[0])
    assert torch.equal(total.confusion, whole.confusion)
    assert total.num_rows == rows
    assert total.loss == pytest.approx(whole.loss)
