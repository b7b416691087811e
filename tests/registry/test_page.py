"""The report as a person and a browser get it: one file, nothing outside it, and names of the user's escaped."""

import base64
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.evaluate.paired import Paired
from rcnn.evaluate.report import run_evaluate
from rcnn.recipes import resolve_config
from rcnn.registry.card import MAX_CARD, model_card
from rcnn.registry.gate import Standing, judge
from rcnn.registry.ledger import Look
from rcnn.registry.page import PICTURES, Subject, write_page
from rcnn.results import RegisterResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from tests.evaluate.scene import ingested, many_test_rows, untrained

pytestmark = pytest.mark.long


class Page(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    config: PipelineConfig = many_test_rows(tmp_path_factory.mktemp("page"), **{"model.k": 16, "train.epochs": 3})
    data = ingested(config)
    trained = untrained(config, data)
    storage = Storage(config.storage)
    evaluated = run_evaluate(config, data, trained, StageFolder(storage, "reports/x"), NoTracker())
    paired = Paired(3000, 400, 300)
    verdict = judge(Standing(2, evaluated.test_error, "t"), 1, paired, 3)
    return Subject(
        config=config,
        manifest=require_manifest(storage, data.folder),
        data=data,
        trained=trained,
        evaluated=evaluated,
        registered=RegisterResult(
            model_name="rcnn-<b>", version=2, alias=verdict.alias, reason=verdict.reason, model_uri="models:/rcnn-<b>/2"
        ),
        look=Look.of(Standing(2, 0.9, "t"), 1, 3, paired, verdict),
        environment={"git_commit": "0" * 40, "torch": "2.15.0"},
    )


@pytest.fixture(scope="module")
def page(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Page:
    file = tmp_path_factory.mktemp("written") / "report.html"
    write_page(subject, Storage(subject.config.storage), file)
    assert file.stat().st_size < 3_000_000
    return Page(file)


def test_it_is_whole_and_refers_to_nothing_outside(page: Page) -> None:
    assert page.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [each["alt"] for each in pictures] == [title for _, title, _ in PICTURES if title != "Robustness"]
    for attributes in pictures:
        head, _, content = str(attributes["src"]).partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
        assert attributes["alt"]
    assert not any("href" in attributes for _, attributes in page.tags)


def test_it_begins_with_the_verdict_and_has_the_test_behind_it(page: Page, subject: Subject) -> None:
    assert page.text.index("Version 2 is the champion. Better: ") < page.text.index("Figures")
    for words in ("400", "300", "level of look 3", "+3.33 points", subject.manifest.digest, "rcnn predict --model"):
        assert words in page.text


def test_it_has_the_tables_of_the_studies(page: Page, subject: Subject) -> None:
    plain = subject.evaluated.studies["steps"][-1]
    for words in (
        "Calibration",
        f"temperature {subject.evaluated.temperature:.3f}",
        "Recurrent steps",
        f"{100 * plain.error:.2f}",
    ):
        assert words in page.text


def test_names_cannot_change_the_page(page: Page) -> None:
    assert "rcnn-<b> version 2" in page.text


def test_commands_in_its_sentences_are_code(page: Page) -> None:
    assert "code" in [tag for tag, _ in page.tags]
    assert "rcnn predict --calibrated" in page.text
    assert "<code>" not in page.text


def test_its_command_gives_the_same_model(page: Page, subject: Subject) -> None:
    [line] = re.findall(r"^rcnn pipeline .*$", page.text, re.MULTILINE)
    words = shlex.split(line)[2:]
    settings = [value for name, value in zip(words[::2], words[1::2], strict=True) if name == "--set"]
    assert words[:2] == ["--recipe", "debug_tiny"]
    again = resolve_config("debug_tiny", overrides=settings)
    sections = ("model", "train", "augment", "data", "seed", "evaluate")
    assert again.values_of(*sections) == subject.config.values_of(*sections)
    assert f"git checkout {'0' * 40}" in page.text


def test_the_card_says_what_it_is_how_certain_that_is_and_how_to_load_it(subject: Subject) -> None:
    card = model_card(subject)
    assert card.startswith(f"**RCNN-16, T = 1** on **mnist-sample**: test error {subject.evaluated.written_error}.")
    for words in (
        'model = rcnn.load_model("models:/rcnn-<b>/2")', subject.manifest.digest, "Version 2 is the champion. Better: ",
        "Weakest class: ", f"Only {subject.evaluated.num_rows:,} test rows", "rcnn pipeline --recipe debug_tiny",
    ):  # fmt: skip
        assert words in card
    served = replace(subject, config=subject.config.with_settings({"tracking.uri": "http://mlflow:5000"}))
    assert 'load_model("models:/rcnn-<b>/2", tracking_uri="http://mlflow:5000")' in model_card(served)


@pytest.mark.parametrize("length", [4200, 9000])
def test_a_card_fits_into_mlflow_and_loses_whole_parts_where_it_is_too_long(subject: Subject, length: int) -> None:
    wordy = replace(subject, registered=subject.registered.model_copy(update={"reason": "x" * length}))
    card = model_card(wordy)
    assert len(card) <= MAX_CARD
    assert "### Recipe" not in card
    assert card.count("```") % 2 == 0
    assert ("### Load it" in card) == (length == 4200)


def test_a_first_model_has_no_comparison(subject: Subject, tmp_path: Path) -> None:
    write_page(replace(subject, look=None), Storage(subject.config.storage), tmp_path / "x.html")
    assert "Comparison with the champion" not in Page(tmp_path / "x.html").text
