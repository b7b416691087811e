"""`rcnn compare`: what stands in the table, who is on the Pareto front, and what differs between two models."""

import csv
import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rcnn.cli import main
from rcnn.compare.models import models_of
from rcnn.compare.table import as_csv, as_parquet, as_rows, groups_of, records
from tests.compare.scene import Scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def compare(scene: Scene, *words: str) -> int:
    return main(["compare", *words, "--set", f"storage={scene.storage.root}"])


def test_seeds_are_one_row_with_mean_and_spread_and_other_settings_another(scene: Scene) -> None:
    for name, wrong, settings in (("a", 10, {"seed": 0}), ("b", 20, {"seed": 1}), ("c", 5, {"model__k": 16})):
        scene.add(name, **settings)
        scene.evaluate(name, wrong)
    scene.add("d", model__k=32)
    rows = as_rows(groups_of(models_of(scene.storage)))
    assert [row["network"] for row in rows] == ["RCNN-16, T = 1", "RCNN-8, T = 1", "RCNN-32, T = 1"]
    assert [row["test error, %"] for row in rows] == ["1.00 (0.43-2.32)", "3.00 ± 1.41", "-"]
    assert [row["seeds"] for row in rows] == ["1", "2", "1"]
    assert {row["data set"] for row in rows} == {"digits"}


def test_the_pareto_front_is_marked_for_each_cost_and_each_set_of_test_rows(scene: Scene) -> None:
    models = {  # errors, parameters, seconds
        "small": (30, 10, 100), "fast": (30, 20, 50), "best": (10, 30, 200), "dominated": (30, 40, 200), "slow": (10, 30, 300),
    }  # fmt: skip
    for number, (name, (wrong, parameters, seconds)) in enumerate(models.items()):
        scene.add(name, num_parameters=parameters, seconds=seconds, model__k=number + 1)
        scene.evaluate(name, wrong)
    scene.add("elsewhere", num_parameters=10**6, seconds=10**6, model__k=99)
    scene.evaluate("elsewhere", 400, test_digest="u" * 64)
    best = {group.first.name: group.best_by for group in groups_of(models_of(scene.storage))}
    assert best == {
        "train-small": ("size",), "train-fast": ("time",), "train-best": ("size", "time"), "train-dominated": (),
        "train-slow": ("size",), "train-elsewhere": ("size", "time"),
    }  # fmt: skip


def test_csv_and_parquet_have_every_model_with_its_settings(scene: Scene, tmp_path: Path) -> None:
    scene.add("a")
    scene.evaluate("a", 10)
    scene.add("b", model__k=16)
    rows = records(groups_of(models_of(scene.storage)))
    table = {row["model"]: row for row in csv.DictReader(io.StringIO(as_csv(rows)))}
    assert (table["train-a"]["test_error"], table["train-a"]["model.k"]) == ("0.02", "8")
    assert table["train-b"]["test_error"] == ""
    assert {row["model"]: row["model.k"] for row in pq.read_table(io.BytesIO(as_parquet(rows))).to_pylist()} == {
        "train-a": 8, "train-b": 16,
    }  # fmt: skip
    assert compare(scene, "--csv", str(tmp_path / "out.csv"), "--parquet", str(tmp_path / "out.parquet")) == 0
    assert (tmp_path / "out.csv").read_text() == as_csv(rows)
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 2


def test_two_models_show_what_differs_and_a_paired_test(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.add("first0")
    scene.evaluate("first0", 10)
    scene.add("second", model__k=16, train__epochs=9)
    scene.evaluate("second", 25)
    assert compare(scene, "train-first0", "runsecond") == 0
    told = capsys.readouterr().out
    for text in ("model.k", "train.epochs", "2.00 %", "5.00 %"):
        assert text in told
    assert "model.t" not in told
    # 15 rows that only one gets right, all in its favour: p = 2 ** -15
    expected = "3.00 points fewer errors: on 500 test rows, 15 are right only there, and 0 only with train-second"
    assert expected in told
    assert "p = 3.05e-05" in told


def test_models_on_other_test_rows_are_not_tested(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    for name, digest in (("first0", "t" * 64), ("second", "u" * 64)):
        scene.add(name)
        scene.evaluate(name, 10, test_digest=digest)
    scene.add("third0")
    assert compare(scene, "train-first0", "train-second") == 0
    assert "no paired test: train-first0, train-second: they were evaluated on different" in capsys.readouterr().out
    assert compare(scene, "train-first0", "train-third0") == 0
    assert "train-third0 was not evaluated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet"], "compare resnet: fits no trained model. `rcnn compare` lists them"),
        (["train-a"], "compare train-a: fits 2: train-abcdef, train-abcxyz"),
    ],
)
def test_a_name_that_fits_none_or_several_is_one_line(
    scene: Scene, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("abcxyz", "abcdef"):
        scene.add(name)
    assert compare(scene, *words) == 2
    assert message in capsys.readouterr().err


def test_a_storage_without_models_says_what_to_do(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(scene) == 2
    assert "there is no trained model. Run `rcnn pipeline` first" in capsys.readouterr().err


def test_a_damaged_result_is_left_out(scene: Scene) -> None:
    scene.add("a")
    scene.add("b", model__k=16)
    scene.storage.write_text("runs/train-b/_result.json", "{")
    assert [model.name for model in models_of(scene.storage)] == ["train-a"]
