"""What results say of themselves, those of earlier versions included."""

import json

import pytest

from rcnn.results import EvaluateResult, StageResult, TrainResult, TuneResult

TUNED = {"best": {"model.k": 8}, "best_trial": "trial-00", "val_error": 0.1, "trials": [], "outcomes": {"finished": 2}}
TRAINED = {
    "folder": "runs/x", "weights_sha256": "w", "val_error": 0.1, "best_epoch": 1, "epochs": 1, "num_parameters": 1,
    "images_per_second": 9,
}  # fmt: skip
SCORED = {
    "folder": "reports/x", "metrics": {"error": 0.1, "loss": 1}, "classes": {}, "num_rows": 1,
    "images_per_second": 900, "test_digest": "t",
}  # fmt: skip
TIMES = {"seconds": 41.2, "predicted_seconds": 38.4}


@pytest.mark.parametrize(
    ("kind", "tree", "label", "before", "now"),
    [
        (TuneResult, TUNED, "search", None, "41 s (38 s predicted)"),
        (EvaluateResult, SCORED, "inference", "900 images/s", "900 images/s, 41 s (38 s predicted)"),
        (TrainResult, TRAINED, "training", "9 images/s, 0 s", "9 images/s, 41 s (38 s predicted)"),
    ],
)
def test_prediction_and_fact_are_shown_and_results_made_before_remain_readable(
    kind: type[StageResult], tree: dict, label: str, before: str | None, now: str
) -> None:
    old = kind.model_validate_json(json.dumps(tree))
    assert old.highlights(str).get(label) == before
    new = kind.model_validate_json(json.dumps(tree | TIMES))
    assert new.highlights(str)[label] == now
    assert old.timed(41.24, 38.44) == new


def test_a_stage_that_times_itself_keeps_its_own_figures() -> None:
    own = TrainResult.model_validate(TRAINED | TIMES)
    assert own.timed(99, 99) == own
    assert own.model_copy(update={"predicted_seconds": 0.0}).timed(99, 38.4) == own
