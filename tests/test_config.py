from pathlib import Path

import pytest
from pydantic import ValidationError

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.recipes import RECIPES, demo, describe, resolve_config
from rcnn.settings import config_from_json, setting_names


def test_json_goes_both_ways() -> None:
    for recipe in RECIPES.values():
        config = recipe()
        assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
        assert PipelineConfig.model_validate(config.model_dump(mode="json")) == config
        assert config_from_json(config.model_dump_json(), origin="--config") == config


def test_hash_follows_what_matters_and_nothing_else() -> None:
    config = demo()
    assert config.hash() == config.with_settings({"storage": "elsewhere", "ray.address": "auto"}).hash()
    assert config.hash() != config.with_settings({"train.momentum": 0.8}).hash()
    assert config.hash() == config.with_settings({"execution.num_workers": 2}).hash()


def test_values_are_named_by_section_or_one_by_one_and_some_are_left_out() -> None:
    config = demo()
    assert config.values_of("seed", "model.k") == {"seed": 0, "model.k": 32}
    assert config.values_of("augment") == {
        "augment.max_shift": 2, "augment.flip": False, "augment.alternate_flips": False, "augment.cutout": 0
    }  # fmt: skip
    assert "data.mirror" not in config.values_of("data", "-data.mirror")


@pytest.mark.parametrize(
    ("settings", "shown", "hidden"),
    [
        ({}, "train.plateau_factor", "train.one_cycle_warmup"),
        ({"train.schedule": "one_cycle"}, "train.one_cycle_warmup", "train.plateau_patience"),
        ({"model.network": "nin", "tune.enabled": False}, "model.crop", "model.t"),
        ({"model.network": "rcnn_bn"}, "model.k", "execution.convolution"),
        ({}, "data.val_fraction", "data.image_size"),
        ({"data.source": "folder", "data.root": "x"}, "data.image_size", "data.label_column"),
        ({"tune.early_stopping": "median"}, "tune.grace_epochs", "tune.reduction_factor"),
        ({"tune.early_stopping": "none"}, "tune.num_trials", "tune.grace_epochs"),
        ({"tune.seeds": 2}, "tune.num_finalists", "train.one_cycle_warmup"),
        ({}, "tune.space", "tune.num_finalists"),
    ],
)
def test_settings_without_effect_do_not_apply(settings: dict[str, object], shown: str, hidden: str) -> None:
    config = PipelineConfig().with_settings(settings)
    found = config.applicable("model", "train", "data", "tune", "execution")
    assert shown in found
    assert hidden not in found
    assert hidden in config.values_of("model", "train", "data", "tune", "execution")


def test_the_environment_places_a_run_and_changes_nothing_else() -> None:
    config = PipelineConfig().with_settings({"storage": "mine"})
    environ = {"RCNN_MODEL__K": "8", "RCNN_RAY__ADDRESS": "http://head:8265", "RCNN_STORAGE": "theirs"}
    placed = config.placed_by(environ)
    assert placed == config.with_settings({"ray.address": "http://head:8265"})


def test_every_recipe_says_what_it_costs_and_reaches() -> None:
    for name in RECIPES:
        assert all(describe(name).values())


SMALLEST_WRONG = {
    "data.source": "imagenet", "data.val_fraction": 1.0, "data.test_fraction": 0, "data.split_seed": -1,
    "data.shard_megabytes": 0, "data.name": "a/b", "data.svhn_extra": "perhaps", "data.image_size": -1,
    "data.resize": "squeeze", "data.color": "blue", "data.max_megapixels": 0, "data.on_error": "ignore",
    "data.follow_links": "perhaps", "audit.enabled": "perhaps", "audit.train_rows": "sometimes",
    "model.members": 0, "model.combine": "votes", "model.network": "resnet", "model.width": 0,
    "model.normalise": "whiten", "model.crop": -1,
    "augment.flip": "perhaps", "augment.cutout": -1, "execution.loader": "lazy",
    "execution.resident_megabytes": 0, "model.k": 0, "model.t": -1, "model.dropout": 1.0, "model.lrn_alpha": -0.1,
    "model.lrn_beta": -1, "train.epochs": 0, "train.batch_size": 0, "train.learning_rate": 0, "train.momentum": 1,
    "train.weight_decay": -1, "train.schedule": "cosine", "train.plateau_factor": 1, "train.plateau_patience": -1,
    "train.one_cycle_warmup": 0, "augment.max_shift": -1, "train.clip_norm": -1, "train.ema_decay": 1,
    "train.label_smoothing": 1, "train.with_validation": "perhaps",
    "train.any_t": "perhaps", "train.optimizer": "adam", "train.kernel_rate": 0, "augment.alternate_flips": "perhaps",
    "train.num_rows": -1, "execution.keep_checkpoints": 0, "execution.num_workers": 0,
    "execution.min_workers": -1, "execution.cpus_per_worker": 0,
    "execution.checkpoint_minutes": 0, "train.num_shares": -1,
    "execution.max_failures": -1, "execution.use_gpu": "perhaps", "train.precision": "float8",
    "train.on_divergence": "go", "execution.compile": "perhaps",
    "train.deterministic": "perhaps", "execution.recompute": "perhaps", "execution.convolution": "fast",
    "train.nesterov": "perhaps", "train.max_minutes": -1, "tune.enabled": "perhaps",
    "tune.num_trials": 0, "tune.space": {"model.k": []}, "tune.search": "best", "tune.early_stopping": "perhaps",
    "tune.seeds": 0, "tune.num_finalists": 0, "tune.max_minutes": -1, "tune.trial_minutes": -1,
    "tune.workers_per_trial": 0, "tune.epochs": 0, "tune.grace_epochs": 0, "tune.reduction_factor": 1, "tune.num_rows": -1,
    "tune.max_concurrent_trials": -1, "tune.cpus_per_trial": 0, "tune.gpus_per_trial": -1, "evaluate.batch_size": 0,
    "evaluate.steps": "perhaps", "evaluate.views": ["rotated"], "evaluate.robustness": "perhaps", "evaluate.sample_rows": -1,
    "ray.address": "ray://head:10001", "ray.num_cpus": -1, "ray.send_code": "perhaps",
    "ray.reconnect_minutes": -1, "tracking.wait_minutes": -1, "seed": -1,
    "storage": "", "tracking.export": "pickle",
}  # fmt: skip
FREE_TEXT = {
    "data.root",
    "data.mirror",
    "data.image_column",
    "data.label_column",
    "tracking.uri",
    "tracking.experiment",
    "tracking.model_name",
}


@pytest.mark.parametrize("name", sorted(set(setting_names()) - FREE_TEXT))
def test_a_value_out_of_bounds_is_named_with_its_setting(name: str) -> None:
    value = SMALLEST_WRONG[name]
    with pytest.raises(ConfigError) as caught:
        demo().with_settings({name: value})
    message = str(caught.value)
    assert name.split(".")[0] in message
    assert name.split(".")[-1] in message
    assert "\n" not in message
    assert "explain" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.kk=3"], "there is no setting 'model.kk'. Did you mean 'model.k'?"),
        (["model.k"], "has no '='"),
        (
            ["train.batch_size=10", "execution.num_workers=3"],
            "batch_size = 10 does not divide by execution.num_workers = 3",
        ),
        (["tune.k=[16]"], "'tune.k' is now called 'tune.space.model.k'"),
        (
            ["tune.search=grid"],
            "tune.search = 'grid' has no end where space gives train.learning_rate a range without a step",
        ),
        (["tune.space={}"], "tune.space is empty; name a setting in it, or set tune.enabled to false"),
        (
            ["model.network=wide", "model.t=3"],
            "tune.space has model.t, which model.network = 'wide' does not read (it reads k, dropout, lrn_alpha, lrn_beta)",
        ),
        (["tune.grace_epochs=9"], "set it to 3 or less"),
        (["evaluate.views=[crops]"], "evaluate.views has 'crops', and the network sees whole images (model.crop = 0)"),
        (
            ["train.any_t=true", "model.network=rcnn_bn"],
            "model.network = 'rcnn_bn' with model.t = 1 has none that share their weights; choose rcnn or recursive",
        ),
        (
            ["train.any_t=true", "model.t=0"],
            "model.network = 'rcnn' with model.t = 0 has none that share their weights",
        ),
        (
            ["model.members=2", "train.max_minutes=5"],
            "train.max_minutes = 5 limits one training, and model.members = 2",
        ),
        (["augment.alternate_flips=true"], "alternate_flips is on and flip is off; set flip to true"),
        (["recipe=demo"], "Use --recipe NAME"),
        (["model.k=many"], "model.k is 'many'"),
        (["train.learning_rate=nan"], "train.learning_rate is nan"),
        (["data.source=folder"], "data.source = 'folder' needs data.root"),
        (["data.root=photos"], "data.root = 'photos' is for the sources mnist, fashion-mnist, cifar10, "),
        (["data.source=mnist", "data.mirror=https://me:secret@host/"], "data.mirror holds credentials"),
        (["data.on_error=skip"], "data.on_error = 'skip' is for the sources folder and parquet"),
        (["data.follow_links=true"], "data.follow_links = True is for the source folder"),
        (["data.image_column=x"], "data.image_column = 'x' is for the source parquet, and source is 'mnist-sample'"),
        (
            ["data.source=folder", "data.root=x", "data.label_column=y"],
            "data.label_column = 'y' is for the source parquet",
        ),
        (["storage=s3://key:secret@bucket/x"], "storage holds credentials"),
        (
            ["tracking.uri=https://me:secret@host"],
            "tracking.uri holds credentials; give them by MLFLOW_TRACKING_USERNAME",
        ),
        (["tracking.uri=postgresql://me:secret@host/mlflow"], "tracking.uri holds credentials"),
        (
            ["ray.address=http://me:secret@head:8265"],
            "ray.address holds credentials; give Ray's token by RAY_AUTH_MODE",
        ),
        (["data.svhn_extra=true"], "data.svhn_extra = True is for the source svhn, and source is 'mnist-sample'"),
        (["train.with_validation=true", "train.schedule=plateau"], "with_validation leaves no rows by which schedule"),
        (["train.with_validation=true", "train.num_rows=9"], "with_validation takes all rows, and num_rows is 9"),
        (["data.image_size=32"], "data.image_size = 32 is for the sources folder and parquet"),
        (["model.network=resnet"], "model.network is 'resnet': should be one of rcnn, recursive, wide, rcnn_bn, nin"),
        (["model.network=nin", "model.t=2"], "model.t = 2 is not read by network = 'nin'; leave it at 3"),
        (["model.network=wide", "model.dropout=0.2", "model.t=0"], "model.t = 0 is not read by network = 'wide'"),
    ],
)
def test_messages_of_wrong_overrides(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match="--set") as caught:
        resolve_config("demo", overrides=overrides)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_refused_secret_is_not_in_the_error_that_prefect_shows() -> None:
    with pytest.raises(ValidationError, match=r"tracking\n.*uri holds credentials") as caught:
        PipelineConfig.model_validate({"tracking": {"uri": "https://me:secret@host"}})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "mnist-sample"),
        ({"data.source": "svhn", "data.root": "/somewhere"}, "svhn"),
        ({"data.source": "folder", "data.root": "/photos/My cats & dogs/"}, "My-cats-dogs"),
        ({"data.source": "parquet", "data.root": "s3://bucket/flowers/train-*.parquet"}, "flowers"),
        ({"data.source": "parquet", "data.root": "/x/digits.parquet"}, "digits"),
        ({"data.source": "parquet", "data.root": "/x/DIGITS.PARQUET"}, "DIGITS"),
        ({"data.source": "folder", "data.root": "/photos", "data.name": "mine"}, "mine"),
    ],
)
def test_a_data_set_is_named_after_what_it_is(settings: dict[str, object], name: str) -> None:
    assert PipelineConfig().with_settings(settings).data.dataset == name


def test_a_relative_root_becomes_the_one_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def rooted(root: str) -> str:
        return PipelineConfig().with_settings({"data.source": "parquet", "data.root": root}).rooted().data.root

    assert rooted("photos/*.parquet") == str(tmp_path / "photos" / "*.parquet")
    assert rooted("s3://bucket/x") == "s3://bucket/x"
    assert PipelineConfig().rooted() == PipelineConfig()


def test_a_range_of_workers_sets_both_ends(tiny_config: PipelineConfig) -> None:
    config = resolve_config("debug_tiny", overrides=["train.num_shares=8", "execution.num_workers=2..8"])
    assert (config.execution.min_workers, config.execution.num_workers) == (2, 8)
    assert resolve_config("debug_tiny", overrides=["execution.num_workers=2"]).execution.min_workers == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["execution.num_workers=2..8"],
            "execution.min_workers = 2 needs a result that does not depend on the number of",
        ),
        (
            ["execution.num_workers=8..2", "train.num_shares=8"],
            "execution.min_workers = 8 is more than num_workers = 2",
        ),
        (
            ["execution.num_workers=a..2", "train.num_shares=8"],
            "execution.min_workers is 'a': should be a whole number",
        ),
        (["execution.num_workers=2..", "train.num_shares=8"], "execution.num_workers is '': should be a whole number"),
    ],
)
def test_a_range_of_workers_that_cannot_be_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config("debug_tiny", overrides=overrides)
    assert expected in str(caught.value)
