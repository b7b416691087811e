"""The points of a search, their order, and the config of a trial."""

from collections import Counter
from typing import Any

import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.ranges import Range
from rcnn.recipes import debug_tiny
from rcnn.results import Choice
from rcnn.tune.space import Space, num_trials_wanted, own_point, require_searchable, trial_config


def space(items: dict[str, Any], **settings: Any) -> Space:
    return Space(config_of(items, **settings))


def config_of(items: dict[str, Any], **settings: Any) -> PipelineConfig:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return debug_tiny().with_settings({"tune.space": items, **named})


LOG = {"min": 1e-4, "max": 1e-1, "log": True}
MIXED = {"model.k": [8, 16], "train.learning_rate": LOG, "augment.flip": [False, True]}


def test_a_point_follows_from_the_seed_and_its_number() -> None:
    first = space(MIXED).first_points(9, search="random")
    assert space(MIXED).first_points(4, search="random") == first[:4]
    assert space(dict(reversed(MIXED.items()))).first_points(9, search="random") == first
    assert space(MIXED, seed=1).first_points(9, search="random")[1:] != first[1:]


def test_a_setting_that_joins_the_space_leaves_the_others_draws() -> None:
    wider = space(MIXED | {"train.momentum": {"min": 0, "max": 0.5}}).first_points(9, search="random")
    rates = [point["train.learning_rate"] for point in space(MIXED).first_points(9, search="random")]
    assert set(rates[1:]) <= {point["train.learning_rate"] for point in wider}


def test_the_configs_own_point_is_first_where_it_is_inside() -> None:
    inside = {"model.k": [8, 16], "train.learning_rate": {"min": 0.01, "max": 0.03}}
    for search in ("random", "tpe"):
        assert space(inside).first_points(3, search=search)[0] == {"model.k": 8, "train.learning_rate": 0.02}
    outside = space({"model.k": [16, 32], "train.learning_rate": LOG})
    assert own_point(debug_tiny()) | {"model.k": 8} not in outside.first_points(5, search="random")
    assert {point["model.k"] for point in outside.first_points(5, search="random")} <= {16, 32}


def test_a_step_decides_whether_a_value_is_inside() -> None:
    rate = {"min": 0.01, "max": 0.05, "step": 0.01}
    values = space({"train.learning_rate": rate}).domains["train.learning_rate"].values()
    assert list(values or []) == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert {"train.learning_rate": 0.03} in space({"train.learning_rate": rate})
    assert {"train.learning_rate": 0.035} not in space({"train.learning_rate": rate})


def test_a_grid_has_each_point_once() -> None:
    grid = space({"model.k": {"min": 2, "max": 8, "step": 2}, "model.t": [0, 1], "train.momentum": [0.5, 0.9]})
    assert grid.size == 16
    points = grid.first_points(99, search="grid")
    assert len(points) == 16
    assert points[0] == {"model.k": 8, "model.t": 1, "train.momentum": 0.9}  # the config's own
    assert set(Counter(tuple(point.values()) for point in points).values()) == {1}


def test_a_fine_step_is_not_listed() -> None:
    rate = {"min": 0, "max": 1, "step": 1e-9}  # a list of it would take 32 GB
    fine = space({"train.momentum": {"min": 0, "max": 0.5, "step": 1e-9}, "train.weight_decay": rate})
    assert fine.size == 500_000_001 * 1_000_000_001
    assert {"train.momentum": 0.123456789, "train.weight_decay": 1.0} in fine
    assert {"train.momentum": 0.1234567891, "train.weight_decay": 1.0} not in fine
    assert fine.first_points(2, search="grid") == [
        {"train.momentum": 0.0, "train.weight_decay": 0.0},
        {"train.momentum": 0.0, "train.weight_decay": 1e-9},
    ]
    assert all(point in fine for point in fine.first_points(9, search="random"))


def test_a_step_too_small_to_count_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.momentum\.step = 1e-12 is too small for the range"):
        space({"train.momentum": {"min": 0, "max": 0.5, "step": 1e-12}})


def test_the_nearest_point_has_no_rounding_of_another_librarys_arithmetic() -> None:
    domain = space({"train.momentum": {"min": 0.1, "max": 0.55, "step": 0.1}}).domains["train.momentum"]
    assert domain.nearest(0.1 + 2 * 0.1) == 0.3
    assert [domain.nearest(value) for value in (0, 0.55)] == [0.1, 0.5]


def test_a_small_space_ends_a_random_search_and_no_point_is_drawn_twice() -> None:
    config = config_of({"model.t": [0, 1, 2]}, tune__num_trials=8)
    points = Space(config).first_points(8, search="random")
    assert sorted(int(point["model.t"]) for point in points) == [0, 1, 2]
    assert num_trials_wanted(config) == 3
    assert num_trials_wanted(config_of(MIXED, tune__num_trials=8)) == 8


def test_draws_cover_a_range_evenly_in_its_logarithm() -> None:
    points = space({"train.learning_rate": LOG}).first_points(600, search="random")
    rates = [float(point["train.learning_rate"]) for point in points]
    assert 1e-4 <= min(rates) < max(rates) <= 1e-1
    decades = Counter(f"{rate:.0e}".partition("e")[2] for rate in rates)
    assert all(150 < decades[decade] < 250 for decade in ("-04", "-03", "-02"))


def test_whole_numbers_of_a_logarithmic_range_reach_both_ends() -> None:
    domain = space({"model.k": {"min": 1, "max": 64, "log": True}}).domains["model.k"]
    assert list(domain.values() or []) == list(range(1, 65))
    points = space({"model.k": {"min": 1, "max": 64, "log": True}}).first_points(64, search="random")
    assert {point["model.k"] for point in points} == set(range(1, 65))
    assert all(type(point["model.k"]) is int for point in points)


def test_a_trial_has_the_settings_of_its_point_and_its_own_length() -> None:
    base = config_of({"train.weight_decay": [0.0, 0.1], "augment.max_shift": [1, 2]}, tune__epochs=5)
    trial = trial_config(base, Choice({"train.weight_decay": 0.1, "augment.max_shift": 2}), seed=7)
    assert (trial.train.weight_decay, trial.augment.max_shift) == (0.1, 2)
    assert (trial.train.epochs, trial.train.num_rows, trial.seed) == (5, 160, 7)
    assert trial.data == base.data


def test_settings_that_exclude_each_other_are_refused_before_the_trial() -> None:
    config = config_of({"train.batch_size": [15, 16]}, tune__workers_per_trial=2)
    with pytest.raises(ConfigError, match=r"train\.batch_size = 15 does not divide"):
        trial_config(config, Choice({"train.batch_size": 15}), seed=0)


def test_a_network_that_does_not_read_what_is_searched_is_refused_even_where_the_search_is_off() -> None:
    unset = {"model.network": "nin", "model.k": 32, "model.t": 3, "model.dropout": 0.2, "tune.enabled": False}
    config = debug_tiny().with_settings(unset)
    with pytest.raises(ConfigError, match=r"tune\.space has model\.k, which model\.network = 'nin' does not read"):
        require_searchable(config)
    with pytest.raises(ConfigError, match=r"leave it out, or set tune\.enabled to false"):
        config.with_settings({"tune.enabled": True})
    require_searchable(config.with_settings({"tune.space": {"train.momentum": [0.5, 0.9]}}))


def test_every_network_that_is_searched_must_read_the_other_settings() -> None:
    networks = {"model.network": ["rcnn", "rcnn_bn"], "model.k": [8, 16]}
    assert space(networks).size == 4
    with pytest.raises(ConfigError, match=r"which model\.network = 'wide' does not read"):
        config_of({"model.network": ["rcnn", "wide"], "model.t": [1, 2]})


def test_a_choice_prints_short_names() -> None:
    choice = Choice({"model.k": 32, "model.t": 3, "train.learning_rate": 0.0312345, "augment.flip": True})
    assert str(choice) == "K 32, T 3, learning rate 0.0312, augment.flip true"
    assert Choice.model_validate_json(choice.model_dump_json()) == choice


def test_a_range_in_a_recipe_is_the_one_that_a_user_may_type() -> None:
    assert debug_tiny().tune.space["train.learning_rate"] == Range(min=0.005, max=0.1, log=True)


def test_a_trial_never_learns_the_rows_by_which_it_is_chosen() -> None:
    config = config_of(
        {"model.k": [8, 16]}, train__with_validation=True, train__schedule="one_cycle", train__num_rows=0
    )
    assert not trial_config(config, Choice({"model.k": 8}), seed=0).train.with_validation
    assert config.train.with_validation
