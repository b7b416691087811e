"""`rcnn config --diff`: recipes, files and runs."""

import json
import shutil
from pathlib import Path

import pytest

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.config_diff import differences, find_config
from rcnn.recipes import demo
from rcnn.storage import Storage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run's folder in a storage, with the description of its model."""
    folder = tmp_path / "storage" / "runs" / "train-0123456789ab"
    (folder / "model").mkdir(parents=True)
    config = demo().with_settings({"model.k": 16, "storage": str(tmp_path / "storage")})
    (folder / "model" / "model.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    return folder


def test_only_the_settings_that_differ_are_given_as_they_would_be_typed() -> None:
    other = demo().with_settings({"model.k": 64, "train.nesterov": True, "data.name": "mine"})
    assert differences(demo(), other) == [
        ("data.name", '""', "mine"), ("model.k", "32", "64"), ("train.nesterov", "false", "true")
    ]  # fmt: skip
    assert differences(demo(), demo().model_copy(update={"recipe": "custom"})) == []


def test_the_command_compares_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--diff", "cifar10_rcnn96", "cifar10_augmented_rcnn160"]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["model.k", "96", "160"], ["model.crop", "0", "24"], ["augment.flip", "false", "true"],
        ["evaluate.views", "[]", "[crops]"], ["evaluate.sample_rows", "1000", "0"],
    ]  # fmt: skip
    assert main(["config", "--diff", "demo", "demo"]) == 0
    assert capsys.readouterr().out == "no differences\n"


def test_a_run_is_named_by_its_folder_or_its_name_in_the_storage(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(str(tmp_path / "storage"))
    by_path = find_config(str(run), storage)
    assert by_path.model.k == 16
    assert [find_config(name, storage) for name in (str(run / "model"), run.name, f"runs/{run.name}")] == [by_path] * 3
    checkpoint = shutil.copytree(run / "model", tmp_path / "checkpoint_000001")
    assert find_config(str(checkpoint), storage) == by_path
    place = ["--set", f"storage={storage.root}"]
    assert main(["config", "--diff", "demo", run.name, *place]) == 0
    printed = capsys.readouterr().out
    assert "model.k" in printed
    assert "learning_rate" not in printed


def test_files_are_laid_on_their_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('recipe = "debug_tiny"\n[train]\nepochs = 9\n')
    config = find_config(str(tmp_path / "mine.toml"), Storage(str(tmp_path)))
    assert (config.train.epochs, config.model.k) == (9, 8)
    assert differences(config, PipelineConfig())


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("demoo", "--diff: there is no recipe, file or run 'demoo'. `rcnn recipes`"),
        ("", "--diff: there is no recipe, file or run ''"),
        ("/nowhere/x", "there is no recipe, file or run '/nowhere/x'"),
        ("empty", "empty: holds no model, beside which its config would lie. Name the folder of a training run"),
        ("no-config", "no-config/model.json: holds no config"),
        ("no-json", "no-json/model.json: holds no config"),
        ("old", "old/model.json: there is no setting 'model.maps'"),
        ("broken.toml", "broken.toml: cannot be parsed"),
    ],
)
def test_what_cannot_be_compared_is_one_line(name: str, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"no-config": "{}", "no-json": "x", "old": '{"config": {"model": {"maps": 3}}}'}
    for folder, text in texts.items():
        Path(folder).mkdir()
        Path(folder, "model.json").write_text(text)
    Path("empty").mkdir()
    Path("broken.toml").write_text("[")
    for pair in ([name, "demo"], ["demo", name]):
        assert main(["config", "--diff", *pair]) == 2
        error = capsys.readouterr().err
        assert fault in error
        assert error.count("\n") == 1
