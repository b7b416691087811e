"""The studies of an evaluation, against scikit-learn, hand-made views, and `predictions.parquet`."""

from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.data.streaming import stored_rows
from rcnn.errors import ConfigError
from rcnn.evaluate.report import run_evaluate
from rcnn.evaluate.studies import StudyRun, telling_rows
from rcnn.evaluate.study_size import NUM_STRENGTHS
from rcnn.results import EvaluateResult, StudyRow
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.train.checkpoint import load_model, save_model
from tests.evaluate.scene import ingested, many_test_rows, untrained

pytestmark = pytest.mark.long


class Heard(NoTracker):
    """Remembers metrics and the names of files."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.files: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], *, step: int = 0) -> None:
        self.metrics |= metrics

    def log_files(self, folder: Path) -> None:
        self.files |= {file.name for file in folder.iterdir()}


class Scene:
    """An evaluation with all studies, of all rows."""

    def __init__(self, storage: Path):
        torch.manual_seed(0)
        settings = {
            "model.k": 8, "model.t": 2, "evaluate.views": ("mirrored", "shifted"), "evaluate.robustness": True,
            "evaluate.sample_rows": 0, "data.test_fraction": 0.1, "train.any_t": True, "tune.enabled": False,
        }  # fmt: skip
        self.config: PipelineConfig = many_test_rows(storage, **settings)
        self.data = ingested(self.config)
        self.trained = untrained(self.config, self.data)
        self.storage = Storage(self.config.storage)
        self._train_a_little()
        self.heard = Heard()
        target = StageFolder(self.storage, "reports/x")
        self.result: EvaluateResult = run_evaluate(self.config, self.data, self.trained, target, self.heard)
        self.folder = self.storage.local_path("reports/x")
        self.table = polars.read_parquet(self.folder / "predictions.parquet")

    def _train_a_little(self) -> None:
        """Enough for probabilities that mean something."""
        folder = self.storage.local_path(f"{self.trained.folder}/model")
        manifest = require_manifest(self.storage, self.data.folder)
        model, _ = load_model(folder)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        rows = stored_rows(self.storage, self.data.folder, manifest, "train", num_rows=3000)
        images_NHWC, labels_N = rows.read(rows.segments)
        order = np.random.default_rng(0).permutation(len(labels_N))
        for batch in np.array_split(order, 60):
            images_NCHW = torch.from_numpy(images_NHWC[batch]).permute(0, 3, 1, 2)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images_NCHW), torch.from_numpy(labels_N[batch])).backward()
            optimizer.step()
        save_model(model.state_dict(), self.config, manifest, folder)

    def row(self, study: str, condition: str) -> StudyRow:
        return next(each for each in self.result.studies[study] if each.condition == condition)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("studies"))


def test_the_model_as_it_is_has_the_error_of_the_predictions_in_every_study(scene: Scene) -> None:
    error = 1 - accuracy_score(scene.table["label"], scene.table["predicted"])
    rows = [scene.row("steps", "2"), scene.row("views", "as it is"), scene.row("robustness", "as it is")]
    for row in rows:
        assert row.error == pytest.approx(error)
        assert row.num_rows == len(scene.table)
        assert (row.gain, row.passes) == (0, 1)
        assert row.error_interval == scene.result.error_interval


def test_a_view_has_the_error_and_the_gain_of_averaged_probabilities(scene: Scene) -> None:
    manifest = require_manifest(scene.storage, scene.data.folder)
    model, _ = load_model(scene.storage.local_path(f"{scene.trained.folder}/model"))
    rows = stored_rows(scene.storage, scene.data.folder, manifest, "test")
    images_NHWC, labels_N = rows.read(rows.segments)

    def probabilities(pixels_NHWC: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(pixels_NHWC.copy()).permute(0, 3, 1, 2)).softmax(1).numpy()

    mean_NC = (probabilities(images_NHWC) + probabilities(images_NHWC[:, :, ::-1])) / 2
    row, plain = scene.row("views", "mirrored"), scene.row("views", "as it is")
    assert row.error == pytest.approx(1 - accuracy_score(labels_N, mean_NC.argmax(1)), abs=1.5 / len(labels_N))
    assert row.gain == pytest.approx(plain.error - row.error)
    assert row.gain_interval[0] < row.gain < row.gain_interval[1]
    assert row.passes == 2


def test_an_early_exit_is_between_the_steps_that_it_takes(scene: Scene) -> None:
    plain, early = scene.result.studies["early exit"]
    assert plain.condition == "as it is"
    num_steps = early.condition.split()[0]
    assert early.condition.startswith(f"{num_steps} where sure by ")
    assert scene.row("steps", num_steps).passes <= early.passes < 1
    assert early.gain == pytest.approx(plain.error - early.error)
    assert early.error < plain.error + 0.03  # 0.1 points on validation rows
    assert scene.heard.metrics["test/early_exit/error"] == early.error


def test_fewer_steps_cost_less(scene: Scene) -> None:
    rows = scene.result.studies["steps"]
    assert [row.condition for row in rows] == ["0", "1", "2"]
    passes = [row.passes for row in rows]
    assert passes == sorted(passes)
    # By hand, for 28x28 pixels and K = 8: the first layer, then t + 1 convolutions in two layers of 14x14 and two of 7x7.
    first, step, last = 28 * 28 * 25 * 8, 2 * (14 * 14 + 7 * 7) * 9 * 8 * 8, 8 * 10
    truth = [(first + (t + 1) * step + last) / (first + 3 * step + last) for t in range(3)]
    assert passes == pytest.approx(truth, abs=1e-3)


def test_every_corruption_is_measured_at_every_strength(scene: Scene) -> None:
    conditions = [row.condition for row in scene.result.studies["robustness"]]
    names = ("noise", "blur", "contrast", "shift", "JPEG")
    assert conditions == ["as it is", *(f"{name}/{each}" for name in names for each in range(1, NUM_STRENGTHS + 1))]


def test_calibrated_metrics_are_scikit_learns_on_divided_logits(scene: Scene) -> None:
    labels_N, logits_NC = scene.table["label"].to_numpy(), np.stack(scene.table["logits"].to_list()).astype(float)
    assert scene.result.temperature != 1
    probabilities_NC = softmax(logits_NC / scene.result.temperature, axis=1)
    classes = range(logits_NC.shape[1])
    truth = {
        "loss": log_loss(labels_N, probabilities_NC, labels=classes),
        "brier_score": brier_score_loss(labels_N, probabilities_NC, labels=classes, scale_by_half=False),
    }
    assert {name: scene.result.calibrated[name] for name in truth} == pytest.approx(truth)
    sure_N, right_N = probabilities_NC.max(1), probabilities_NC.argmax(1) == labels_N
    bin_N = np.minimum((sure_N * 15).astype(int), 14)
    parts = [abs(sure_N[bin_N == each].sum() - right_N[bin_N == each].sum()) for each in range(15)]
    assert scene.result.calibrated["calibration_error"] == pytest.approx(sum(parts) / len(labels_N))


def test_the_temperature_fits_validation_rows_and_no_test_row(scene: Scene) -> None:
    manifest = require_manifest(scene.storage, scene.data.folder)
    model, _ = load_model(scene.storage.local_path(f"{scene.trained.folder}/model"))
    rows = stored_rows(scene.storage, scene.data.folder, manifest, "val")
    images_NHWC, labels_N = rows.read(rows.segments)
    with torch.inference_mode():
        logits_NC = model(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)).double().numpy()

    def loss(temperature: float) -> float:
        return log_loss(labels_N, softmax(logits_NC / temperature, axis=1), labels=range(10))

    best = loss(scene.result.temperature)
    assert best < loss(scene.result.temperature * 1.02)
    assert best < loss(scene.result.temperature * 0.98)


def test_report_metrics_and_pictures_go_where_people_look(scene: Scene) -> None:
    report = (scene.folder / "report.md").read_text()
    pictures = ("steps.png", "states.png", "receptive-fields.png", "filters.png", "robustness.png")
    for picture in pictures:
        assert f"]({picture})" in report
        with Image.open(scene.folder / picture) as image:
            assert min(image.size) > 100
    assert set(pictures) <= scene.heard.files
    for heading in ("## Calibration", "## Recurrent steps", "## Views", "## Robustness"):
        assert heading in report
    assert scene.heard.metrics["test/views/mirrored/error"] == scene.row("views", "mirrored").error
    assert scene.heard.metrics["test/temperature"] == scene.result.temperature
    assert EvaluateResult.model_validate_json(scene.result.model_dump_json()) == scene.result


def run_of(scene: Scene, **changed: object) -> StudyRun:
    config = scene.config.with_settings({f"evaluate.{name}": value for name, value in changed.items()})
    return StudyRun(
        config,
        storage=scene.storage,
        data_folder=scene.data.folder,
        manifest=require_manifest(scene.storage, scene.data.folder),
        trained=scene.trained,
        num_at_once=2,
    )


def test_a_sample_has_its_rows_corrupted_as_among_all_rows(scene: Scene) -> None:
    run = run_of(scene, sample_rows=60, views=(), steps=False)
    answers_AN, labels_N = run.answers(list(run.conditions()))
    assert answers_AN.shape == (1 + 5 * NUM_STRENGTHS, 60)
    whole = run_of(scene, views=(), steps=False)
    all_answers_AN, _ = whole.answers(list(whole.conditions()))
    place = {row_id: number for number, row_id in enumerate(whole.sample.row_ids())}
    same = all_answers_AN[:, [place[row_id] for row_id in run.sample.row_ids()]]
    assert (answers_AN == same).mean() > 0.999  # a batch of another size may tip a tie
    assert set(labels_N) <= set(range(10))


def test_no_study_leaves_the_filters_and_the_temperature(scene: Scene, tmp_path: Path) -> None:
    studied = run_of(scene, views=(), steps=False, robustness=False).run(tmp_path)
    assert studied.studies == {}
    assert studied.temperature == pytest.approx(scene.result.temperature)
    assert [file.name for file in tmp_path.iterdir()] == ["filters.png"]


def test_crops_need_a_network_of_crops(tiny_config: PipelineConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="network sees whole images"):
        tiny_config.with_settings({"evaluate.views": ("crops",)})
    config = many_test_rows(
        tmp_path, **{"model.crop": 20, "model.k": 8, "evaluate.views": ("crops",), "data.test_fraction": 0.1}
    )
    data = ingested(config)
    run = StudyRun(
        config.with_settings({"evaluate.sample_rows": 40, "evaluate.steps": False}),
        storage=Storage(config.storage),
        data_folder=data.folder,
        manifest=require_manifest(Storage(config.storage), data.folder),
        trained=untrained(config, data),
        num_at_once=1,
    )
    answers_AN, _ = run.answers(list(run.conditions()))
    images_NHWC, _ = run.sample.read(run.sample.segments)
    total_NC = 0
    with torch.inference_mode():
        for top in (0, 4, 8):
            for left in (0, 4, 8):
                window_NHWC = images_NHWC[:, top : top + 20, left : left + 20]
                total_NC = total_NC + run.model(torch.from_numpy(window_NHWC.copy()).permute(0, 3, 1, 2)).softmax(1)
    assert (answers_AN[1] == total_NC.argmax(1).numpy()).mean() > 0.97


def test_telling_rows_are_one_corrected_one_spoilt_and_one_otherwise_changed() -> None:
    labels_N = np.zeros(6, int)
    answers_TN = np.array(
        [  # right throughout, corrected, corrected later, spoilt, another mistake, right again
            [0, 1, 1, 0, 1, 0],
            [0, 0, 1, 0, 2, 1],
            [0, 0, 0, 3, 2, 0],
        ]
    )
    assert telling_rows(answers_TN, labels_N, 3) == [1, 3, 4]
    assert telling_rows(answers_TN, labels_N, 4) == [1, 3, 4, 5]
    assert telling_rows(np.zeros((3, 5), int), np.zeros(5, int), 3) == [0, 1, 2]
