"""Early exits, against choices by hand and against the network with fewer and with all steps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rcnn.config import PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.errors import ConfigError
from rcnn.evaluate.early_exit import EarlyExit, Exit, choose_exit
from rcnn.evaluate.predict import Predictor
from rcnn.evaluate.unrolled import shortened
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.loop import fit
from tests.evaluate.test_unrolled import classifier, images


def logits_of(probabilities: list[float], answers: list[int]) -> np.ndarray:
    """Of two classes: an answer with its probability for each row."""
    rows = [
        (share, 1 - share) if answer == 0 else (1 - share, share)
        for share, answer in zip(probabilities, answers, strict=True)
    ]
    return np.log(np.array(rows))


def test_the_exit_takes_as_many_rows_as_keep_the_error() -> None:
    labels_N = np.zeros(5, int)
    # By falling certainty: right, right, wrong where all steps are right, right. One more error of five is too many.
    few = logits_of([0.99, 0.9, 0.8, 0.7, 0.6], [0, 0, 1, 0, 0])
    everything = logits_of([0.9] * 5, [0, 0, 0, 0, 0])
    chosen = choose_exit({0: few, 1: everything}, labels_N, [0.3])
    assert chosen is not None
    assert (chosen.num_steps, chosen.confidence) == (0, pytest.approx(0.9))


def test_an_early_right_answer_pays_for_an_early_wrong_one() -> None:
    labels_N = np.zeros(3, int)
    few = logits_of([0.9, 0.8, 0.7], [1, 0, 0])
    everything = logits_of([0.9] * 3, [0, 1, 0])  # the second row is right after few steps alone
    chosen = choose_exit({0: few, 1: everything}, labels_N, [0.3])
    assert chosen is not None
    assert chosen.confidence == pytest.approx(0.7)


def test_the_cheapest_number_of_steps_is_chosen_and_none_that_costs_more_than_all_of_them() -> None:
    labels_N = np.zeros(4, int)
    right = logits_of([0.9] * 4, [0] * 4)
    half = logits_of([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1])
    # Half of the rows exit after no step: 0.3 + 0.5; all of them after one: 0.6.
    assert choose_exit({0: half, 1: right, 2: right}, labels_N, [0.3, 0.6]) == Exit(1, pytest.approx(0.9))
    wrong = logits_of([0.9] * 4, [1] * 4)
    assert choose_exit({0: wrong, 1: right}, labels_N, [0.3]) is None


def test_only_images_that_are_not_sure_take_all_steps() -> None:
    model, batch = classifier("rcnn"), images(16)
    with torch.inference_mode():
        few, everything = shortened(model, 1)(batch), model(batch)
        sure_N = few.softmax(1).amax(1)
        bound = float(sure_N.median())
        exits = EarlyExit(model, Exit(1, bound))
        found = exits(batch)
        for row in range(16):
            expected = few[row] if sure_N[row] >= bound else everything[row]
            torch.testing.assert_close(
                found[row], expected, rtol=1e-4, atol=1e-5
            )  # another batch, another order of sums
        assert exits.num_passed_on == int((sure_N < bound).sum()) > 0
        torch.testing.assert_close(EarlyExit(model, Exit(1, 0.0))(batch), few, rtol=0, atol=0)


@pytest.fixture(scope="module")
def model_folder(tiny_config: PipelineConfig, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config.with_settings({"train.epochs": 1, "train.any_t": True, "model.t": 2, "tune.enabled": False})
    folder = tmp_path_factory.mktemp("model")
    data = load_training_data(Storage(config.storage), digits.folder, num_rows=320)
    fit(config, data, lambda metrics: None).save_best(folder)
    return folder


def test_a_loaded_model_answers_after_fewer_steps(model_folder: Path) -> None:
    pixels_NHWC = images(8).permute(0, 2, 3, 1).numpy()
    whole = Predictor(model_folder)
    for num_steps in range(3):
        with torch.inference_mode():
            truth = shortened(whole.model, num_steps)(images(8)).softmax(1).numpy()
        np.testing.assert_allclose(Predictor(model_folder, num_steps=num_steps).probabilities(pixels_NHWC), truth)
    never_sure = Predictor(model_folder, num_steps=0, confidence=1.0)
    np.testing.assert_allclose(never_sure.probabilities(pixels_NHWC), whole.probabilities(pixels_NHWC))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"num_steps": 3}, "num_steps: is 3, and the model has 2 recurrent steps. Use fewer, or leave it out"),
        ({"num_steps": -1}, "num_steps: is -1"),
        ({"num_steps": 1, "confidence": 1.5}, r"confidence = 1\.5: is not a probability"),
        ({"confidence": 0.9}, r"confidence = 0\.9: needs num_steps. Give both, such as 1 and 0\.99"),
    ],
)
def test_what_cannot_be_is_refused(model_folder: Path, options: dict[str, float], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        Predictor(model_folder, **options)  # type: ignore[arg-type]
