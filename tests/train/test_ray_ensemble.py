"""Ensembles through the stages: members are trainings of their own, and the whole is a model like any other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.model.ensemble import Ensemble
from rcnn.plan.bill import bill_of
from rcnn.plan.costs import SECONDS_TO_JOIN, SECONDS_TO_START_RAY
from rcnn.results import TrainResult
from rcnn.stages import Results, finished_until, run_stage
from rcnn.storage import Storage
from rcnn.train.checkpoint import load_model
from rcnn.train.ensemble import mean_history, of_mean_weights

pytestmark = pytest.mark.long


def test_the_answer_is_the_mean_of_the_probabilities() -> None:
    torch.manual_seed(0)
    members = [torch.nn.Linear(6, 4) for _ in range(3)]
    images = torch.randn(5, 6)
    mean = torch.stack([member(images).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(Ensemble(members)(images).softmax(1), mean)


def test_weights_are_averaged_and_histories_end_with_the_shortest() -> None:
    one, two = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}
    assert of_mean_weights([one, two])["a"].tolist() == [2, 4]
    first = [{"epoch": 1, "val/error": 0.2}, {"epoch": 2, "val/error": 0.1, "train/roll_backs": 1}]
    second = [{"epoch": 1, "val/error": 0.4}, {"epoch": 2, "val/error": 0.3}, {"epoch": 3, "val/error": 0.0}]
    assert mean_history([first, second]) == [
        {"epoch": 1, "val/error": pytest.approx(0.3)},
        {"epoch": 2, "val/error": pytest.approx(0.2)},
    ]


class Scene:
    """A member that was trained before, and then an ensemble of two."""

    def __init__(self, config: PipelineConfig):
        self.config = config.with_settings({"model.members": 2, "tune.enabled": False, "train.epochs": 1})
        self.storage = Storage(self.config.storage)
        self.first = self._run(self.config.members[0], "train")["train"]
        self.results = self._run(self.config, "evaluate")
        self.whole: TrainResult = self.results["train"]
        self.members: list[TrainResult] = [finished_until(each, "train")["train"] for each in self.config.members]

    def _run(self, config: PipelineConfig, last: str) -> Results:
        results: Results = {}
        for name in ("ingest", "train", "evaluate"):
            results[name] = run_stage(config, name, results)
            if name == last:
                break
        return results

    def model(self, trained: TrainResult) -> torch.nn.Module:
        return load_model(self.storage.local_path(f"{trained.folder}/model"))[0]


@pytest.fixture(scope="module")
def scene(tiny_config: PipelineConfig) -> Scene:
    return Scene(tiny_config)


pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 1, 28, 28), dtype=np.uint8))


@pytest.mark.thorough
@pytest.mark.ray
def test_members_are_found_and_answer_as_one(scene: Scene) -> None:
    assert scene.members[0] == scene.first  # trained once
    assert scene.members[0].weights_sha256 != scene.members[1].weights_sha256
    with torch.inference_mode():
        mean = torch.stack([scene.model(each)(pixels).softmax(1) for each in scene.members]).mean(0)
        torch.testing.assert_close(scene.model(scene.whole)(pixels).softmax(1), mean)


@pytest.mark.thorough
@pytest.mark.ray
def test_its_figures_are_its_own(scene: Scene) -> None:
    assert scene.whole.num_parameters == sum(each.num_parameters for each in scene.members)
    assert scene.whole.seconds == pytest.approx(sum(each.seconds for each in scene.members), abs=0.2)
    assert 0 < scene.results["evaluate"].test_error < 1
    assert scene.config.model.title.startswith("2 x RCNN-8")
    bill = bill_of(scene.config.with_settings({"model.members": 3}))
    one = bill_of(scene.config.with_settings({"model.members": 1, "seed": 77}))
    [of_three], [of_one] = ([item for item in each.items if item.name == "train"] for each in (bill, one))
    assert of_three.cost.num_steps == of_one.cost.num_steps  # two of three are there
    joined = bill_of(scene.config.with_settings({"model.combine": "weights"}))
    assert [item.cost.seconds for item in joined.items if item.name == "train"] == [
        SECONDS_TO_JOIN + SECONDS_TO_START_RAY
    ]


@pytest.mark.thorough
@pytest.mark.ray
def test_the_mean_of_the_weights_is_one_network(scene: Scene) -> None:
    config = scene.config.with_settings({"model.combine": "weights"})
    trained = run_stage(config, "train", {"ingest": scene.results["ingest"]})
    assert isinstance(trained, TrainResult)
    assert trained.num_parameters == scene.members[0].num_parameters
    averaged = scene.model(trained).state_dict()
    ours = [scene.model(each).state_dict() for each in scene.members]
    for name, value in averaged.items():
        torch.testing.assert_close(value, (ours[0][name] + ours[1][name]) / 2)


@pytest.mark.thorough
@pytest.mark.ray
def test_an_ensemble_predicts_pictures(scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    [picture, *_] = sorted(scene.storage.local_path(f"{scene.results['evaluate'].folder}/samples").iterdir())
    folder = scene.storage.local_path(f"{scene.whole.folder}/model")
    assert main(["predict", "--model", str(folder), str(picture)]) == 0
    assert str(picture) in capsys.readouterr().out
