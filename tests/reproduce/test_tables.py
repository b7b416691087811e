"""The tables of the paper: complete, with configs that only their own settings and the user's change."""

import pytest

from rcnn.errors import ConfigError
from rcnn.recipes import EXPERIMENTS, RECIPES
from rcnn.reproduce.cells import parameters_of
from rcnn.reproduce.tables import TABLES, cells_of, num_parallel


def test_every_published_figure_stands_in_a_table() -> None:
    shown = {name for table in TABLES.values() for name in table.names}
    assert {each.name for group in EXPERIMENTS.values() for each in group} == shown


@pytest.mark.parametrize("name", TABLES)
def test_the_full_budget_trains_the_recipes_as_they_are(name: str) -> None:
    for cell in cells_of(name, budget="full"):
        assert cell.config == RECIPES[cell.experiment.name]()
        assert cell.is_comparable


@pytest.mark.parametrize("name", TABLES)
def test_the_small_budget_runs_on_a_cpu_with_one_schedule_for_all(name: str) -> None:
    cells = cells_of(name, budget="small", num_seeds=2)
    assert {cell.config.seed for cell in cells} == {0, 1}
    assert not any(cell.config.execution.use_gpu for cell in cells)
    for is_modern in {cell.experiment.is_modern for cell in cells}:
        trained = [cell.config.train for cell in cells if cell.experiment.is_modern is is_modern]
        assert len({(train.epochs, train.learning_rate) for train in trained}) == 1


def test_the_small_ablation_compares_networks_of_one_size() -> None:
    """All but the one without recurrent steps, which is the same network with half of its kernels unused."""
    cells = cells_of("t-ablation", budget="small")
    sizes = {cell.experiment.name: parameters_of(cell.config, (32, 32, 3), 10) for cell in cells}
    rcnn = sizes.pop("cifar10_rcnn96")
    del sizes["cifar10_rcnn96_t0"]
    assert set(sizes) >= {"cifar10_nin", "cifar10_maxout", "cifar10_wide128", "cifar10_rcnn_bn96"}
    assert all(abs(size / rcnn - 1) < 0.1 for size in sizes.values()), sizes


def test_each_seed_of_an_experiment_is_a_result_of_its_own() -> None:
    cells = cells_of("mnist", num_seeds=3)
    assert len({cell.config.hash() for cell in cells}) == len(cells)
    assert [cell.config.seed for cell in cells] == sorted(cell.config.seed for cell in cells)


@pytest.mark.parametrize(
    ("name", "overrides", "is_comparable"),
    [
        ("mnist", (), True),  # the network and the images are the paper's, in fewer epochs
        ("mnist", ("data.source=mnist-sample",), False),
        ("mnist", ("train.num_rows=1000", "train.with_validation=false"), False),
        ("t-ablation", (), False),  # a third of the feature maps
        ("svhn", (), False),  # without the extra images
    ],
)
def test_other_images_or_a_smaller_network_are_not_comparable(
    name: str, overrides: tuple[str, ...], is_comparable: bool
) -> None:
    networks = [cell for cell in cells_of(name, budget="small", overrides=overrides) if cell.experiment.k]
    assert {cell.is_comparable for cell in networks} == {is_comparable}


def test_only_some_experiments_are_chosen_by_name_or_pattern() -> None:
    chosen = cells_of("mnist", budget="full", only=("*rcnn32", "mnist_nin"))
    assert [cell.experiment.name for cell in chosen] == ["mnist_rcnn32", "mnist_modern_rcnn32", "mnist_nin"]


@pytest.mark.parametrize("text", ["model.k=8", "seed=4", "recipe=demo"])
def test_settings_that_differ_between_cells_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {text}: differs from cell to cell"):
        cells_of("mnist", overrides=(text,))


def test_a_pattern_that_fits_nothing_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"--only \*resnet\*: fits none of mnist_rcnn32, "):
        cells_of("mnist", only=("*resnet*",))


def test_a_setting_of_the_user_holds_over_the_budget() -> None:
    [cell, *_] = cells_of("mnist", budget="small", overrides=("train.epochs=3",))
    assert cell.config.train.epochs == 3


def test_cells_beside_each_other_follow_from_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    [cell, *_] = cells_of("mnist", budget="small")
    assert num_parallel(cell.config) == 8  # each has one core
