"""Confident learning, compared with its definition written out row by row."""

import numpy as np
import pytest

from rcnn.evaluate.figures import softmax
from rcnn.evaluate.suspects import Rows, find_suspects


def some_rows(num_rows: int, *, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(num_rows, 4))).astype(np.float32)
    labels = np.where(rng.random(num_rows) < 0.8, logits.argmax(1), rng.integers(0, 4, num_rows))
    losses = -np.log(softmax(logits)[np.arange(num_rows), labels])
    return {"label": labels, "logits": logits, "loss": losses}


def cut(rows: Rows, *places: int) -> list[Rows]:
    starts = (0, *places)
    stops = (*places, len(rows["label"]))
    return [
        {name: column[start:stop] for name, column in rows.items()} for start, stop in zip(starts, stops, strict=True)
    ]


def test_suspects_are_those_of_the_definition() -> None:
    rows = some_rows(500, seed=0)
    found = find_suspects(lambda: cut(rows, 100, 333), 4)
    probabilities, labels = softmax(rows["logits"]), rows["label"]
    thresholds = [probabilities[labels == j, j].mean() for j in range(4)]
    for n in range(500):
        reached = [j for j in range(4) if probabilities[n, j] >= thresholds[j]]
        believed = max(reached, key=lambda j: probabilities[n, j], default=labels[n])
        assert found.is_suspect[n] == (believed != labels[n])
        others = [j for j in range(4) if j != labels[n]]
        assert found.suggested[n] == max(others, key=lambda j: probabilities[n, j])
        assert found.label_probability[n] == pytest.approx(probabilities[n, labels[n]])
        assert found.suggested_probability[n] == pytest.approx(probabilities[n, found.suggested[n]])
    assert 20 < found.is_suspect.sum() < 150


def test_rows_are_ranked_by_margin_and_seen_rows_by_loss() -> None:
    rows = some_rows(200, seed=1)
    found = find_suspects(lambda: [rows], 4)
    margin = found.label_probability - found.suggested_probability
    assert (np.diff(margin[found.order(is_seen=False)]) >= 0).all()
    assert (np.diff(found.loss[found.order(is_seen=True)]) <= 0).all()


def test_a_class_without_rows_is_suggested_but_makes_no_row_suspect() -> None:
    rows = {
        "label": np.array([0, 0, 1]),
        "logits": np.array([[1, 0, 9], [5, 0, 0], [0, 5, 0]], np.float32),
        "loss": np.array([8.0, 0.0, 0.0]),
    }
    found = find_suspects(lambda: [rows], 3)
    assert found.suggested[0] == 2
    assert not found.is_suspect[0]
