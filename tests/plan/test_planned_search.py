"""What a search comes to, compared with Ray's own ASHA on random errors."""

import random
from collections.abc import Sequence

import pytest

from rcnn.config import PipelineConfig
from rcnn.plan.search import expected_epochs, most_epochs, networks_of, timed_of
from rcnn.results import Choice
from rcnn.tune.ledger import Record
from rcnn.tune.search import trial_name


def asha_epochs(config: PipelineConfig, seed: int, *, num_ended: int = 0) -> tuple[int, dict[str, Record]]:
    """Epochs that Ray's brackets let trials with random errors train, one after another; and the first ones' records."""
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import ASHAScheduler

    tune, rng = config.tune, random.Random(seed)
    scheduler = ASHAScheduler(
        "epoch", "error", "min", max_t=tune.epochs, grace_period=tune.grace_epochs,
        reduction_factor=tune.reduction_factor,
    )  # fmt: skip
    total, ended = 0, {}
    for number in range(tune.num_trials):
        trial = Trial("stub", stub=True, trial_id=str(number))
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        errors = []
        for epoch in range(1, tune.epochs + 1):
            total += number >= num_ended
            result = {"epoch": epoch, "error": rng.random()}
            errors.append(result["error"])
            if scheduler.on_trial_result(None, trial, result) == scheduler.STOP:  # type: ignore[arg-type]
                break
        if number < num_ended:
            ended[trial_name(number)] = record(number, errors)
    return total, ended


def record(number: int, errors: Sequence[float], *, seed: int = 0) -> Record:
    return Record(
        name=trial_name(number) + (f"-seed-{seed}" if seed else ""), choice=Choice({}), seed=seed, val_error=errors[-1],
        epochs=len(errors), outcome="finished", val_errors=tuple(errors),
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("num_trials", "epochs", "grace", "factor"), [(8, 9, 1, 2), (30, 27, 1, 3), (16, 8, 2, 2)])
def test_the_expected_epochs_are_those_of_rays_scheduler(num_trials: int, epochs: int, grace: int, factor: int) -> None:
    config = PipelineConfig().with_settings(
        {"tune.num_trials": num_trials, "tune.epochs": epochs, "tune.grace_epochs": grace,
         "tune.reduction_factor": factor}
    )  # fmt: skip
    simulated = sum(asha_epochs(config, seed)[0] for seed in range(300)) / 300
    assert expected_epochs(config) == pytest.approx(simulated, rel=0.1)
    assert expected_epochs(config) < most_epochs(config) == num_trials * epochs


@pytest.mark.long
def test_an_extended_search_is_billed_for_what_is_left_of_it() -> None:
    config = PipelineConfig().with_settings({"tune.num_trials": 20, "tune.epochs": 9})
    searches = [asha_epochs(config, seed, num_ended=12) for seed in range(300)]
    simulated = sum(epochs for epochs, _ in searches) / 300
    expected = sum(expected_epochs(config, ended) for _, ended in searches) / 300
    assert expected == pytest.approx(simulated, rel=0.1)
    assert {most_epochs(config, ended) for _, ended in searches} == {8 * 9}


def test_further_seeds_of_a_finished_search_are_billed_one_by_one() -> None:
    settings = {"tune.num_trials": 2, "tune.epochs": 3, "tune.seeds": 3, "tune.num_finalists": 2}
    config = PipelineConfig().with_settings(settings)
    ended = {each.name: each for each in (record(0, [0.5, 0.4, 0.3]), record(1, [0.5, 0.4, 0.2]))}
    assert (expected_epochs(config, ended), most_epochs(config)) == (4 * 3, 2 * 3 + 4 * 3)
    repeat = record(1, [0.5, 0.4, 0.2], seed=1)
    assert expected_epochs(config, ended | {repeat.name: repeat}) == 3 * 3


def test_a_large_space_is_timed_at_its_ends_and_between_them() -> None:
    config = PipelineConfig().with_settings({"tune.space": {"model.k": (96, 32, 64), "model.t": (3, 1, 2)}})
    points = networks_of(config)
    assert len(points) == 9
    timed = timed_of(points)
    assert len(timed) == 4
    assert timed[0] == {"model.k": 32, "model.t": 1}
    assert timed[-1] == {"model.k": 96, "model.t": 3}
    assert timed_of(points[:3]) == points[:3]
