import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.errors import ConfigError, DataError
from rcnn.evaluate import predict
from rcnn.evaluate.image_files import find_images
from rcnn.evaluate.predict import Prediction, Predictor, Unreadable
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.checkpoint import load_model
from rcnn.train.loop import fit


@pytest.fixture(scope="module")
def model(tiny_config: PipelineConfig, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    data = load_training_data(Storage(tiny_config.storage), digits.folder, num_rows=320)
    fit(tiny_config.with_settings({"train.epochs": 1}), data, lambda metrics: None).save_best(folder)
    return folder


def write_images(folder: Path, count: int) -> list[Path]:
    """Random grey images of 28x28."""
    rng = np.random.default_rng(0)
    files = [folder / f"{number:03d}.png" for number in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(file)
    return files


def test_any_size_and_colour_of_image_gets_a_class(model: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:28, :28, 0]).save(tmp_path / "b.jpg")
    for answer in Predictor(model).predict([tmp_path / "a.png", tmp_path / "b.jpg"]):
        assert isinstance(answer, Prediction)
        assert answer.label in "0123456789"
        assert 0.1 <= answer.probability <= 1
        assert str(answer).startswith(f"{answer.file}: {answer.label} (")


def test_batches_answer_as_the_model_does_for_each_image(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(predict, "BATCH_SIZE", 4)
    files = write_images(tmp_path, 11)
    network, description = load_model(model)
    answers = list(Predictor(model).predict(files))
    assert [answer.file for answer in answers] == files
    for answer in answers:
        assert isinstance(answer, Prediction)
        with Image.open(answer.file) as image, torch.inference_mode():
            probabilities = network(torch.from_numpy(np.array(image))[None, None]).softmax(1)[0]
        assert answer.label == description["classes"][int(probabilities.argmax())]
        assert answer.probability == pytest.approx(float(probabilities.max()), rel=1e-4)


def test_a_bad_file_is_reported_and_the_others_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_images(tmp_path, 2)
    (tmp_path / "bad\n.png").write_bytes(b"no image")
    arguments = [str(good[0]), str(tmp_path / "bad\n.png"), str(tmp_path / "absent.png"), str(good[1])]
    assert main(["predict", "--model", str(model), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == f"model: {model}, trained on mnist-sample"
    assert [line.partition(": ")[0] for line in printed.out.splitlines()[1:]] == list(map(str, good))
    bad, absent, summary = printed.err.splitlines()
    assert "bad\\n.png: is " in bad
    assert "absent.png: does not exist" in absent
    assert summary == "rcnn: 2 of 4 files could not be read"


def test_nothing_but_bad_files_is_reported_too(model: Path, tmp_path: Path) -> None:
    assert [type(answer) for answer in Predictor(model).predict([tmp_path / "absent.png"])] == [Unreadable]


def test_folders_and_globs_are_searched_and_hidden_files_stay_out(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/deep/2.jpg", "a/.hidden/3.png", "a/.4.png", "b/5.png", "x[1].png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    os.chdir(tmp_path)
    assert list(map(str, find_images(["a"]))) == ["a/1.png", "a/deep/2.jpg"]
    assert list(map(str, find_images(["*/*.png", "b/5.png"]))) == ["a/1.png", "b/5.png", "b/5.png"]
    assert list(map(str, find_images(["**/*.jpg"]))) == ["a/deep/2.jpg"]
    assert list(map(str, find_images(["x[1].png", "absent.png"]))) == ["x[1].png", "absent.png"]
    (tmp_path / "empty").mkdir()
    for argument in ("empty", "*.gif", ""):
        with pytest.raises(ConfigError, match="no image files found"):
            find_images([argument])


def test_pipes_and_folders_that_are_not_searched_are_reported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    write_images(tmp_path / "in" / "deep", 1)
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    assert main(["predict", "--model", str(model), str(tmp_path / "in")]) == 1
    printed = capsys.readouterr()
    assert "000.png: " in printed.out
    pipe, link, summary = sorted(printed.err.splitlines(), key=lambda line: "pipe.png" not in line)
    assert "pipe.png: is not a regular file" in pipe
    assert "link: is a folder that was not searched" in link
    assert summary == "rcnn: 2 of 3 files could not be read"
    assert main(["predict", "--model", str(model), str(tmp_path / "in" / "d*")]) == 0


def test_large_images_are_predicted_without_a_warning(model: Path, tmp_path: Path) -> None:
    Image.new("L", (9500, 9500)).save(tmp_path / "large.png")  # Pillow warns above 89 million pixels
    predictor = Predictor(model)
    assert predictor.description["config"]["data"]["max_megapixels"] < 90  # a limit of training, not of use
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [answer] = predictor.predict([tmp_path / "large.png"])
    assert isinstance(answer, Prediction)


def test_the_folder_of_a_training_will_do(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "train-x" / "model")
    [image] = write_images(tmp_path, 1)
    assert main(["predict", "--model", str(tmp_path / "train-x"), str(image)]) == 0


def test_a_description_that_lacks_a_key_is_named(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    description = json.loads((folder / "model.json").read_text())
    del description["source"]
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"model\.json lacks source"):
        Predictor(folder)


def test_a_folder_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="does not hold a model"):
        Predictor(tmp_path)
    [image] = write_images(tmp_path, 1)
    for wanted in (str(tmp_path), "runs/absent/model"):
        assert main(["predict", "--model", wanted, str(image)]) == 2
        error = capsys.readouterr().err
        assert f"{wanted}: does not hold a model" in error
        assert error.count("\n") == 1


def test_the_most_probable_classes_are_shown_with_bars(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [file] = write_images(tmp_path, 1)
    assert main(["predict", "--model", str(model), "--top", "3", str(file)]) == 0
    _, answer, *bars = capsys.readouterr().out.splitlines()
    assert len(bars) == 3
    shares = [float(line.split()[1]) for line in bars]
    assert shares == sorted(shares, reverse=True)
    assert f"({shares[0]} %)" in answer
    assert [line.count("█") for line in bars] == [int(30 * share / 100 + 1 / 16) for share in shares]
    assert main(["predict", "--model", str(model), "--top", "0", str(file)]) == 2
    assert "--top: is 0. Use 1 or more" in capsys.readouterr().err


def test_json_has_a_line_for_each_file_the_unreadable_ones_included(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [*write_images(tmp_path, 2), tmp_path / "absent.png"]
    assert main(["predict", "--model", str(model), "--json", *map(str, files)]) == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["file"] for answer in answers] == list(map(str, files))
    assert [len(answer["top"]) for answer in answers[:2]] == [5, 5]
    assert answers[0]["label"] == answers[0]["top"][0]["label"]
    assert "error" in answers[2]
