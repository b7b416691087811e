import json
import subprocess
import sys
from pathlib import Path

import pytest

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.recipes import demo

pytestmark = pytest.mark.long


def test_config_prints_the_resolved_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--recipe", "demo", "--set", "model.k=12", "--json"]) == 0
    printed = PipelineConfig.model_validate_json(capsys.readouterr().out)
    assert printed == demo().with_settings({"model.k": 12})


def test_what_config_prints_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "--recipe", "mnist_rcnn64"])
    first = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(first)
    main(["config", "--config", str(tmp_path / "mine.yaml")])
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("command", [["recipes"], ["sources"], ["config", "--explain"]])
def test_lists_are_printed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) > 4


def test_explain_takes_a_setting_or_a_section_and_shows_the_value_of_a_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rows(*options: str) -> list[list[str]]:
        assert main(["config", "--explain", *options]) == 0
        lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        return [[cell.strip() for cell in line] for line in lines if line[0].strip()]

    assert [row[:3] for row in rows("model.k")] == [["model.k", "32", "1 to 2048"]]
    assert [row[:3] for row in rows("model.k", "--recipe", "cifar10_rcnn96")] == [["model.k", "32", "96"]]
    assert [row[0] for row in rows("augment")] == [
        "augment.max_shift", "augment.flip", "augment.alternate_flips", "augment.cutout"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--explain", "--recipe", "nope"], "there is no recipe 'nope'"),
        (["--explain", "model.k", "--set", "model.k=0"], "model.k is 0"),
        (["--explain", "train.lr"], "--explain: there is no setting 'train.lr'. Did you mean 'train.learning_rate'?"),
    ],
)
def test_explain_refuses_what_is_not_there(options: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *options]) == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1


def test_explain_works_beside_a_wrong_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RCNN_MODEL__K", "0")  # whose error names this command
    assert main(["config", "--explain"]) == 0
    assert "model.k" in capsys.readouterr().out


def test_a_wrong_setting_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--set", "model.k=0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rcnn: ConfigError: --set: model.k is 0: ")
    assert error.count("\n") == 1


def test_debug_shows_where_it_came_from() -> None:
    call = [sys.executable, "-m", "rcnn.cli", "config", "--set", "model.k=0", "--debug"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


def test_a_stage_prints_its_result_and_skips_it_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ingest", "--recipe", "debug_tiny", "--set", f"storage={tmp_path}"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["rows"] == {"train": 4050, "val": 450, "test": 500}
    assert main(command) == 0
    second = capsys.readouterr()
    assert json.loads(second.out) == first
    assert "ingest: nothing to do" in second.err


@pytest.mark.parametrize("command", [["registry"], ["predict", "x.png"]])
def test_without_a_registry_the_remedy_is_named(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--set", f"storage={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "there is no registered model" in error
    assert "Run `rcnn pipeline` first" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "exit_code"), [("--json", 141), ("--explain", 1)])  # 1: as Rich ends
def test_a_reader_that_leaves_early_sees_no_traceback(option: str, exit_code: int) -> None:
    command = [sys.executable, "-m", "rcnn.cli", "config", option]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == exit_code


def test_stop_running_is_refused_without_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "--stop-running"]) == 2
    assert "--stop-running: needs --fresh" in capsys.readouterr().err


@pytest.mark.long
def test_a_command_that_loads_triton_ends_without_reports_of_leaks() -> None:
    code = "import sys, triton; from rcnn.cli import main; sys.exit(main(['sources']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "nanobind" not in done.stderr + done.stdout
