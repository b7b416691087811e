"""`fit` by itself, without Ray."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rcnn.config import ModelConfig, PipelineConfig
from rcnn.data.loader import Rows, TrainingData, load_training_data
from rcnn.errors import ClusterError, ConfigError, DataError, TrainingError
from rcnn.evaluate.unrolled import recurrent_layers
from rcnn.model.networks import NETWORKS, unread_settings
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.train import step
from rcnn.train.checkpoint import TrainState, load_model, new_state
from rcnn.train.checkpoint_store import CheckpointStore
from rcnn.train.loop import Metrics, fit, training_data
from rcnn.train.pace import Forecast, Pace
from rcnn.train.step import loss_of, train_step

GOLDEN = Path(__file__).parents[1] / "golden" / "debug_tiny.json"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads may come in another order from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tiny_config: PipelineConfig, digits: IngestResult) -> TrainingData:
    return load_training_data(Storage(tiny_config.storage), digits.folder, num_rows=320)


def ignore(metrics: Metrics) -> None:
    pass


def store_in(folder: Path) -> CheckpointStore:
    return CheckpointStore(StageFolder(Storage(str(folder)), "run"))


def saved_model(state: TrainState, folder: Path) -> Path:
    """A folder with the best model of a run."""
    folder.mkdir(exist_ok=True)
    state.save_best(folder)
    return folder


class Stopped(Exception):
    """Ends a run."""


def run_until(config: PipelineConfig, data: TrainingData, epoch: int, folder: Path) -> None:
    """Runs until an epoch is reported, with checkpoints in a folder."""

    def report(metrics: Metrics) -> None:
        if metrics["epoch"] == epoch:
            raise Stopped

    checkpoints = store_in(folder)
    with pytest.raises(Stopped):
        fit(config, data, report, checkpoints=checkpoints)
    checkpoints.close()


def weights(state: object) -> dict[str, torch.Tensor]:
    return state.model.state_dict()  # type: ignore[attr-defined,no-any-return]


def test_losses_are_the_stored_ones(tiny_config: PipelineConfig, data: TrainingData) -> None:
    """At a rate so low that rounding stays rounding: at that of the recipe, two processors differ in the fourth digit."""
    golden = json.loads(GOLDEN.read_text())
    history = fit(tiny_config.with_settings(golden["settings"]), data, ignore).history
    for metrics, expected in zip(history, golden["epochs"], strict=True):
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=10 ** -golden["digits"])


@pytest.mark.long
def test_a_small_model_learns_real_digits(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings(
        {"model.k": 16, "model.dropout": 0, "train.epochs": 12, "train.schedule": "one_cycle", "train.batch_size": 16,
         "train.learning_rate": 0.03}
    )  # fmt: skip
    state = fit(config, data, ignore)
    assert state.history[-1]["val/error"] < 0.35 < state.history[0]["val/error"]


@pytest.mark.long
def test_a_streamed_model_learns_as_well_and_resumes_to_the_same_weights(
    tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path
) -> None:
    config = tiny_config.with_settings(
        {"model.k": 16, "train.epochs": 5, "train.batch_size": 16, "train.learning_rate": 0.03, "seed": 1,
         "train.schedule": "one_cycle", "execution.loader": "streaming", "train.num_rows": 1500, "augment.max_shift": 1}
    )  # fmt: skip
    data = training_data(config, Storage(config.storage), digits.folder)
    assert not isinstance(data.train, Rows)

    whole = fit(config, data, ignore)
    assert whole.history[-1]["val/error"] < 0.35
    run_until(config, data, 2, tmp_path)
    resumed = fit(config, data, ignore, checkpoints=store_in(tmp_path))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_the_network_may_see_a_window_of_each_image(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings(
        {"model.crop": 20, "model.normalise": "channel", "augment.flip": True, "augment.cutout": 4}
    )
    state = fit(config, data, ignore)
    images = data.val.images[:4]  # type: ignore[attr-defined]
    model = state.model.eval()
    assert torch.equal(model(images), model(images[:, :, 4:24, 4:24]))
    with pytest.raises(
        ConfigError, match=r"model\.crop = 30: is larger than the images of mnist-sample, which are 28x28"
    ):
        fit(tiny_config.with_settings({"model.crop": 30}), data, ignore)


@pytest.mark.parametrize("schedule", ["plateau", "one_cycle"])
def test_a_stopped_and_resumed_run_ends_with_the_very_same_weights(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path, schedule: str
) -> None:
    config = tiny_config.with_settings(
        {"train.epochs": 4, "train.schedule": schedule, "train.plateau_patience": 0, "train.ema_decay": 0.9,
         "augment.max_shift": 2, "model.dropout": 0.3}
    )  # fmt: skip
    whole = fit(config, data, ignore)

    run_until(config, data, 2, tmp_path)
    torch.manual_seed(999)
    resumed = fit(config, data, ignore, checkpoints=store_in(tmp_path))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert all(
        torch.equal(a, b) for a, b in zip(whole.best_model.parameters(), resumed.best_model.parameters(), strict=True)
    )
    timeless = [[{k: v for k, v in row.items() if "perf" not in k} for row in run.history] for run in (whole, resumed)]
    assert timeless[0] == timeless[1]


def stop_at(epoch: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the time be up at a step of an epoch, whatever the clock says."""
    seen: list[int] = []

    def is_over(pace: Pace, at: int = 0) -> bool:
        seen.extend([at] if at == 1 else [])
        return len(seen) == epoch and at == step

    monkeypatch.setattr(Pace, "is_over", is_over)


@pytest.mark.long
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_time_limit_ends_an_epoch_early_and_a_higher_one_resumes_to_the_same_weights(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    config = tiny_config.with_settings(
        {"train.epochs": 4, "train.schedule": "one_cycle", "train.ema_decay": 0.9, "model.dropout": 0.3}
    )
    whole = fit(config, data, ignore)
    with monkeypatch.context() as patched:
        stop_at(epoch, 3, patched)
        limited = fit(config, data, ignore, checkpoints=store_in(tmp_path), max_seconds=1e6)
    assert [metrics["epoch"] for metrics in limited.history] == [*range(1, epoch), epoch - 1 + 0.3]
    assert 0 <= limited.history[-1]["val/error"] <= 1
    assert limited.step == 3
    resumed = fit(config, data, ignore, checkpoints=store_in(tmp_path))
    assert [metrics["epoch"] for metrics in resumed.history] == [1, 2, 3, 4]
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_however_short_the_time_one_step_is_trained_and_validated(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path
) -> None:
    reported: list[float] = []

    def report(metrics: Metrics) -> None:
        reported.append(metrics["epoch"])

    fit(tiny_config, data, report, max_seconds=1e-9, seconds_spent=60, checkpoints=store_in(tmp_path))
    assert reported == [0.1]  # of 10 steps
    fit(tiny_config, data, report, max_seconds=1e6, checkpoints=store_in(tmp_path))
    assert reported == [0.1, 1, 2]
    again = fit(tiny_config, data, report, max_seconds=1e-9, checkpoints=store_in(tmp_path))
    assert len(again.history) == 2
    assert reported == [0.1, 1, 2]


def test_a_resumed_run_counts_the_time_before_it(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path
) -> None:
    config = tiny_config.with_settings({"train.epochs": 1})
    first = fit(config, data, ignore, checkpoints=store_in(tmp_path), seconds_spent=100)
    assert first.history[0]["perf/seconds"] > 100
    more = tiny_config.with_settings({"train.epochs": 3})
    limited = fit(more, data, ignore, checkpoints=store_in(tmp_path), max_seconds=100)
    assert len(limited.history) == 1
    longer = fit(more, data, ignore, checkpoints=store_in(tmp_path), max_seconds=1000)
    assert [100 < metrics["perf/seconds"] < 200 for metrics in longer.history] == [True, True, True]


def test_the_first_steps_forecast_the_rest(tiny_config: PipelineConfig, data: TrainingData) -> None:
    forecasts: list[Forecast] = []
    config = tiny_config.with_settings({"train.epochs": 4})
    state = fit(config, data, ignore, on_forecast=forecasts.append)
    [forecast] = forecasts
    assert 0 < forecast.seconds_left < 2 * state.seconds
    assert 1e7 < forecast.peak_bytes < 1e11


def test_the_plateau_schedule_cuts_the_rate_by_10(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings(
        {"train.epochs": 4, "train.learning_rate": 1e-7, "train.plateau_patience": 1, "train.weight_decay": 0}
    )
    rates = [metrics["learning_rate"] for metrics in fit(config, data, ignore).history]
    # Nothing is learnt at such a rate: no epoch is better than the first, and after two of them the rate is cut.
    assert rates == pytest.approx([1e-7, 1e-7, 1e-7, 1e-8])


def test_the_one_cycle_schedule_rises_and_falls(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings(
        {"train.epochs": 4, "train.schedule": "one_cycle", "train.one_cycle_warmup": 0.5}
    )
    rates = [metrics["learning_rate"] for metrics in fit(config, data, ignore).history]
    assert rates[0] == pytest.approx(0.02 / 25)
    assert rates[0] < rates[1] < rates[2]
    assert rates[3] < rates[2]


def test_validation_rows_that_are_learned_choose_nothing(
    tiny_config: PipelineConfig, digits: IngestResult, data: TrainingData
) -> None:
    settings = {"train.with_validation": True, "train.num_rows": 0, "train.schedule": "one_cycle", "train.epochs": 2}
    config = tiny_config.with_settings(settings)
    whole = training_data(config, Storage(config.storage), digits.folder)
    assert len(whole.train) == digits.rows["train"] + digits.rows["val"]
    # At a rate of nearly nothing no epoch is better than the first, which would be kept otherwise.
    frozen = config.with_settings({"train.learning_rate": 1e-12, "train.weight_decay": 0})
    assert fit(frozen, whole, ignore).best["epoch"] == 2


def test_smoothed_labels_change_the_loss_that_is_learned_and_no_figure(
    tiny_config: PipelineConfig, data: TrainingData
) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 10, requires_grad=True), torch.tensor([1, 2, 3, 4])
    found = loss_of(torch.nn.Identity(), logits, labels, torch.float32, 0.1)
    target = torch.full((4, 10), 0.01).scatter(1, labels[:, None], 0.91)
    assert found.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-6)
    shares = tiny_config.with_settings({"train.num_shares": 4, "train.epochs": 1})
    plain, smoothed = (
        fit(shares.with_settings({"train.label_smoothing": value}), data, ignore).history[0] for value in (0, 0.3)
    )
    assert smoothed["train/loss"] != plain["train/loss"]


def test_the_first_step_is_torchs_own_sgd(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings({"model.dropout": 0, "train.nesterov": True, "train.clip_norm": 0})
    ours, theirs = (new_state(config, data.manifest, device=torch.device("cpu"), num_steps=9) for _ in range(2))
    theirs.optimizer = torch.optim.SGD(
        theirs.model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=config.train.weight_decay
    )
    for state in (ours, theirs):
        for _ in range(3):
            train_step(state.model, state.optimizer, data.train.images[:32], data.train.labels[:32], clip_norm=0)
    for name, tensor in weights(ours).items():
        assert torch.equal(tensor, weights(theirs)[name]), name


def test_muon_updates_kernels_as_torchs_does_and_the_rest_by_sgd(
    tiny_config: PipelineConfig, data: TrainingData
) -> None:
    config = tiny_config.with_settings({"model.dropout": 0, "train.optimizer": "muon", "train.weight_decay": 0.01})
    state = new_state(config, data.manifest, device=torch.device("cpu"), num_steps=9)
    truth = copy.deepcopy(state.model)
    kernels = {name: value for name, value in truth.named_parameters() if value.dim() == 4}
    matrices = {
        name: torch.nn.Parameter(value.detach().permute(0, 2, 3, 1).flatten(1)) for name, value in kernels.items()
    }
    muon = torch.optim.Muon(list(matrices.values()), lr=0.02, momentum=0.9, weight_decay=0.01)
    others = [value for name, value in truth.named_parameters() if name not in kernels]
    sgd = torch.optim.SGD(others, lr=0.02, momentum=0.9, weight_decay=0.01)
    images, labels = data.train.images[:32], data.train.labels[:32]
    for _ in range(3):
        train_step(state.model, state.optimizer, images, labels, clip_norm=0)
        sgd.zero_grad()
        for kernel in kernels.values():
            kernel.grad = None
        loss_of(truth, images, labels, torch.float32).backward()
        for name, kernel in kernels.items():
            matrices[name].grad = kernel.grad.permute(0, 2, 3, 1).flatten(1)  # type: ignore[union-attr]
        muon.step()
        sgd.step()
        with torch.no_grad():
            for name, kernel in kernels.items():
                num_maps, in_maps, *sides = kernel.shape
                kernel.copy_(matrices[name].view(num_maps, *sides, in_maps).permute(0, 3, 1, 2))
    for name, value in truth.named_parameters():
        torch.testing.assert_close(state.model.get_parameter(name), value, msg=name)


def test_with_muon_a_schedule_moves_both_rates(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings({"train.optimizer": "muon", "train.schedule": "one_cycle"})
    state = new_state(config, data.manifest, device=torch.device("cpu"), num_steps=10)
    rates = [[group["lr"] for group in state.optimizer.param_groups]]
    for _ in range(10):
        state.optimizer.step()
        state.schedule.after_step()
        rates.append([group["lr"] for group in state.optimizer.param_groups])
    assert [max(each) for each in zip(*rates, strict=True)] == pytest.approx([0.02, 0.02], rel=0.1)
    state.schedule.lower(0.5)
    assert [group["max_lr"] for group in state.optimizer.param_groups] == [0.01, 0.01]


DRAWN = {"train.any_t": True, "model.t": 2, "tune.enabled": False}


def test_the_number_of_steps_is_drawn_and_all_of_them_are_used_afterwards(
    tiny_config: PipelineConfig, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    real = step.train_step

    def noting(model: torch.nn.Module, *args: Any, **options: Any) -> torch.Tensor:
        used.extend({layer.active_steps for layer in recurrent_layers(model)})
        return real(model, *args, **options)

    monkeypatch.setattr(step, "train_step", noting)
    state = fit(tiny_config.with_settings(DRAWN | {"train.epochs": 5}), data, ignore)
    assert len(used) == 50
    assert 15 < used.count(2) < 35
    assert {0, 1, 2} == set(used)
    assert {layer.active_steps for layer in recurrent_layers(state.model)} == {2}


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_run_that_draws_its_steps_resumes_with_the_very_same_weights(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path, optimizer: str
) -> None:
    settings = {"train.epochs": 3, "train.optimizer": optimizer, "train.schedule": "one_cycle", "train.ema_decay": 0.9}
    config = tiny_config.with_settings(DRAWN | settings)
    whole = fit(config, data, ignore)
    run_until(config, data, 1, tmp_path)
    resumed = fit(config, data, ignore, checkpoints=store_in(tmp_path))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_the_saved_model_gives_the_same_logits(tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path) -> None:
    config = tiny_config.with_settings({"train.learning_rate": 0.002})  # the second epoch is better on every processor
    state = fit(config, data, ignore)
    model, description = load_model(saved_model(state, tmp_path / "model"))
    images = data.val.images[:7]
    assert state.best["epoch"] == 2
    assert torch.equal(model(images), state.model.eval()(images))
    assert description["classes"] == [str(digit) for digit in range(10)]
    assert PipelineConfig.model_validate(description["config"]) == config


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_and_its_stored_model_gives_the_same_logits(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path, name: str
) -> None:
    unset = {f"model.{key}": value for key, value in unread_settings(name, ModelConfig().model_dump()).items()}
    config = tiny_config.with_settings(
        unset | {"model.network": name, "tune.enabled": False, "train.epochs": 1, "train.ema_decay": 0.5}
    )
    state = fit(config, data, ignore, checkpoints=store_in(tmp_path))
    model, description = load_model(saved_model(state, tmp_path / "model"))
    images = data.val.images[:7]
    assert torch.equal(model(images), state.best_model.eval()(images))
    assert description["network"]["network"] == name
    resumed = fit(config, data, ignore, checkpoints=store_in(tmp_path))
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(state).items())


def test_a_model_from_before_there_was_a_choice_of_networks_is_an_rcnn(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path
) -> None:
    state = fit(tiny_config.with_settings({"train.epochs": 1}), data, ignore)
    file = saved_model(state, tmp_path) / "model.json"
    description = json.loads(file.read_text())
    assert description["network"].pop("network") == "rcnn"
    assert description["config"]["model"].pop("network") == "rcnn"
    file.write_text(json.dumps(description))
    model, old = load_model(tmp_path)
    assert torch.equal(model(data.val.images[:7]), state.model.eval()(data.val.images[:7]))
    assert PipelineConfig.model_validate(old["config"]).model.network == "rcnn"
    description["network"]["network"] = "resnet"
    file.write_text(json.dumps(description))
    with pytest.raises(DataError, match="there is no network 'resnet'; choose one of rcnn, recursive"):
        load_model(tmp_path)


def test_what_a_network_cannot_take_is_refused(tiny_config: PipelineConfig, data: TrainingData) -> None:
    nin = tiny_config.with_settings(
        {"tune.enabled": False, "model.network": "nin", "model.k": 32, "model.t": 3, "model.dropout": 0.2}
    )
    with pytest.raises(ConfigError, match=r"execution\.recompute = true: is not read by model\.network = 'nin'"):
        fit(nin.with_settings({"execution.recompute": True}), data, ignore)
    with pytest.raises(
        ConfigError,
        match=r"model\.network = nin: cannot be used with the images of mnist-sample, 28x28: images of 3x3 are too small",
    ):
        fit(nin.with_settings({"model.crop": 3}), data, ignore)


def test_a_loss_that_is_no_number_is_an_error_with_a_remedy(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings({"train.learning_rate": 10, "train.weight_decay": 1000, "train.clip_norm": 0})
    with pytest.raises(TrainingError, match=r"train\.learning_rate = 10\.0: the training loss is (nan|inf) in epoch"):
        fit(config, data, ignore)


DIVERGES = {
    "train.learning_rate": 10, "train.weight_decay": 5, "train.clip_norm": 0, "train.batch_size": 8,
    "train.on_divergence": "roll_back",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["plateau", "one_cycle"])
def test_training_that_diverges_goes_back_and_on_with_a_lower_rate(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config.with_settings(DIVERGES | {"train.epochs": 4, "train.schedule": schedule})
    with caplog.at_level("INFO", "rcnn"):
        whole = fit(config, data, ignore)
    lines = [each.message for each in caplog.records if "going back to the start of epoch" in each.message]
    count = whole.roll_backs
    assert len(lines) == count > 0
    assert lines[-1].endswith(f"with a third of the learning rate ({count} of at most 5 times)")
    assert whole.history[-1]["train/roll_backs"] == count
    assert len(whole.history) == 4
    if schedule == "plateau":
        assert whole.history[-1]["learning_rate"] == pytest.approx(10 / 3**count)
    calm = tiny_config.with_settings({"train.epochs": 1})
    assert "train/roll_backs" not in fit(calm, data, ignore).history[-1]


@pytest.mark.long
@pytest.mark.parametrize("stop", [(1, 2), (2, 3)])
def test_a_run_that_is_stopped_near_its_divergence_ends_with_the_same_bits(
    tiny_config: PipelineConfig,
    data: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[int, int],
) -> None:
    config = tiny_config.with_settings(DIVERGES | {"train.epochs": 3})
    whole = fit(config, data, ignore)
    with monkeypatch.context() as patched:
        stop_at(*stop, patched)
        limited = fit(config, data, ignore, checkpoints=store_in(tmp_path), max_seconds=1e6)
    assert limited.step == stop[1]  # a checkpoint within an epoch that diverges, or after it went back
    resumed = fit(config, data, ignore, checkpoints=store_in(tmp_path))
    assert resumed.roll_backs == whole.roll_backs > 0
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_training_that_goes_on_diverging_ends(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings(DIVERGES | {"train.weight_decay": 1000, "train.momentum": 0.99})
    with pytest.raises(TrainingError, match=r"It was lowered 5 times: lower it by a factor of 3 to 10"):
        fit(config, data, ignore)


def test_wrong_batch_device_and_checkpoints_are_named(
    tiny_config: PipelineConfig, data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="fewer than one batch"):
        fit(tiny_config.with_settings({"train.batch_size": 999}), data, ignore)
    if not torch.cuda.is_available():
        with pytest.raises(ClusterError, match="no GPU"):
            fit(tiny_config.with_settings({"execution.use_gpu": True}), data, ignore)
    fit(tiny_config.with_settings({"train.epochs": 1}), data, ignore, checkpoints=store_in(tmp_path))
    other = TrainingData(data.manifest.model_copy(update={"digest": "other"}), data.train, data.val)
    with pytest.raises(TrainingError, match="made with another data set"):
        fit(tiny_config, other, ignore, checkpoints=store_in(tmp_path))
    with pytest.raises(DataError, match="does not hold a model"):
        load_model(tmp_path / "nowhere")
