"""What a search comes to, compared with Ray's own ASHA on random errors."""

import random

import pytest

from rcnn.config import PipelineConfig
from rcnn.plan.search import expected_epochs, most_epochs, networks_of, timed_of


def asha_epochs(config: PipelineConfig, seed: int) -> int:
    """Epochs that Ray's brackets let trials with random errors train, one trial after another."""
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import ASHAScheduler

    tune, rng = config.tune, random.Random(seed)
    scheduler = ASHAScheduler(
        "epoch", "error", "min", max_t=tune.epochs, grace_period=tune.grace_epochs,
        reduction_factor=tune.reduction_factor,
    )  # fmt: skip
    total = 0
    for number in range(tune.num_trials):
        trial = Trial("stub", stub=True, trial_id=str(number))
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        for epoch in range(1, tune.epochs + 1):
            total += 1
            result = {"epoch": epoch, "error": rng.random()}
            if scheduler.on_trial_result(None, trial, result) == scheduler.STOP:  # type: ignore[arg-type]
                break
    return total


@pytest.mark.long
@pytest.mark.parametrize(("num_trials", "epochs", "grace", "factor"), [(8, 9, 1, 2), (30, 27, 1, 3), (16, 8, 2, 2)])
def test_the_expected_epochs_are_those_of_rays_scheduler(num_trials: int, epochs: int, grace: int, factor: int) -> None:
    config = PipelineConfig().with_settings(
        {"tune.num_trials": num_trials, "tune.epochs": epochs, "tune.grace_epochs": grace,
         "tune.reduction_factor": factor}
    )  # fmt: skip
    simulated = sum(asha_epochs(config, seed) for seed in range(300)) / 300
    assert expected_epochs(config) == pytest.approx(simulated, rel=0.1)
    assert expected_epochs(config) < most_epochs(config) == num_trials * epochs


def test_a_large_space_is_timed_at_its_ends_and_between_them() -> None:
    config = PipelineConfig().with_settings({"tune.space": {"model.k": (96, 32, 64), "model.t": (3, 1, 2)}})
    points = networks_of(config)
    assert len(points) == 9
    timed = timed_of(points)
    assert len(timed) == 4
    assert timed[0] == {"model.k": 32, "model.t": 1}
    assert timed[-1] == {"model.k": 96, "model.t": 3}
    assert timed_of(points[:3]) == points[:3]
