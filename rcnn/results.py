"""What each stage hands to the next: small references that go through JSON, in the order of the pipeline. Never tensors."""

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, RootModel

from rcnn.config import PipelineConfig
from rcnn.ranges import Scalar
from rcnn.scores import written_metrics
from rcnn.section import as_typed
from rcnn.text import printable

Locate = Callable[[str], str]
"""Writes the name of a file in the storage as a person would."""


class StageResult(BaseModel):
    """What all of them carry, and what is shown of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mlflow_run_id: str = ""
    """Empty: MLflow was away when the stage ended; the tag `rcnn.stage_key` finds the run."""
    seconds: float = 0.0
    """Of this stage, since the last resumption; 0: made before this was kept."""
    predicted_seconds: float = 0.0
    """The same, as predicted before it, or after its first steps; 0: not predicted."""

    @property
    def duration(self) -> str:
        """The stage's time beside the prediction."""
        predicted = f" ({self.predicted_seconds:.0f} s predicted)" if self.predicted_seconds else ""
        return f"{self.seconds:.0f} s{predicted}"

    def timed(self, seconds: float, predicted_seconds: float) -> Self:
        """A copy with the stage's time and its prediction, unless the stage measured or predicted its own."""
        times = {"seconds": self.seconds or round(seconds, 1)}
        times["predicted_seconds"] = self.predicted_seconds or round(predicted_seconds, 1)
        return self.model_copy(update=times)

    def applied_to(self, config: PipelineConfig) -> PipelineConfig:
        """The config for the stages behind this one."""
        return config

    def tags(self) -> dict[str, str]:
        """Labels for the MLflow runs of the stages behind this one."""
        return {}

    @property
    def unfinished(self) -> str:
        """Why the stage could do more, e.g. with a higher time limit; empty where nothing is left."""
        return ""

    def highlights(self, locate: Locate) -> dict[str, str]:
        """What a person wants to see at the end of a pipeline, by label."""
        return {}

    def figures(self) -> dict[str, str]:
        """What the Prefect UI shows of the stage, by label; more than the highlights."""
        return self.highlights(lambda name: name)

    def table(self) -> list[dict[str, Any]]:
        """Rows for the Prefect UI, where there are some; they take the place of the figures."""
        return []

    @property
    def headline(self) -> str:
        """What the name of the stage's run ends with; empty: nothing."""
        return ""

    def row(self) -> dict[str, float]:
        """Figures for a row of MLflow's table of runs, by the names of metrics."""
        return {}


class IngestResult(StageResult):
    """A data set: its folder in the storage, and its identity."""

    folder: str
    digest: str
    test_digest: str
    source: str
    rows: dict[str, int]

    def tags(self) -> dict[str, str]:
        """The data set that later stages read."""
        return {"rcnn.data_digest": self.digest}

    def figures(self) -> dict[str, str]:
        """Folder, identity, and rows of each split."""
        rows = {f"{split} rows": f"{count:,}" for split, count in self.rows.items()}
        return {"data set": self.folder, "digest": f"`{self.digest[:16]}`", **rows}


class Choice(RootModel[dict[str, Scalar]]):
    """One point of the search space: values by dotted setting name."""

    model_config = ConfigDict(frozen=True)

    def applied_to(self, config: PipelineConfig) -> PipelineConfig:
        """The config with these settings."""
        return config.with_settings(self.root)

    def __str__(self) -> str:
        return ", ".join(f"{SHORT_NAMES.get(name, name)} {_short(value)}" for name, value in self.root.items())


SHORT_NAMES = {"model.k": "K", "model.t": "T", "train.learning_rate": "learning rate"}


def _short(value: Scalar) -> str:
    return f"{value:.3g}" if isinstance(value, float) else as_typed(value)


Outcome = Literal["finished", "stopped early", "out of time", "diverged", "failed", "cut off"]
"""How a trial ended. Out of time: at `tune.trial_minutes`. Cut off: the search ended (`tune.max_minutes`); a longer search
trains it again."""


class Trial(BaseModel):
    """One configuration that was tried, and how far it came."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    choice: Choice
    seed: int = 0
    val_error: float
    """Of the last epoch; 1.0 where none was finished."""
    epochs: int
    outcome: Outcome
    seconds: float = 0.0
    images_per_second: float = 0.0

    @property
    def is_usable(self) -> bool:
        """Whether its error says something about its settings."""
        return self.epochs > 0 and self.outcome not in ("diverged", "failed")


MAX_LISTED = 100
"""Trials that a result lists; it goes through a command line, which has a limit. `trials.parquet` has all of them."""


class TuneResult(StageResult):
    """The best configuration, and the best of those that were tried."""

    folder: str = ""
    """Holds `trials.parquet` (all trials) and `pictures/`."""
    best: Choice
    best_trial: str
    val_error: float
    """Of the best trial; with several seeds their mean."""
    spread: float | None = None
    """Standard deviation over the seeds, where there are several."""
    trials: tuple[Trial, ...]
    """The first 100, the repeats of the finalists at the end."""
    outcomes: dict[str, int] = {}
    """Number of trials by outcome."""
    seeds: int = 1
    """With how many seeds each finalist was trained: fewer than wanted where trainings failed."""
    num_finalists: int = 0
    minutes_allowed: float = 0.0
    """The limit that ended the search, `tune.max_minutes`; 0: it ended by itself."""
    trial_minutes: float = 0.0
    """The limit of each trial; 0: far more than its first steps predict."""
    num_grid_points: int = 0
    """All points of a grid, of which `tune.num_trials` may leave some out; 0: the search is not a grid."""

    @property
    def num_trials(self) -> int:
        """Configurations that were tried."""
        return sum(self.outcomes.values())

    def applied_to(self, config: PipelineConfig) -> PipelineConfig:
        """The config with the best trial's settings."""
        return self.best.applied_to(config)

    def highlights(self, locate: Locate) -> dict[str, str]:
        """The best trial, and how the others ended."""
        error = f"{100 * self.val_error:.2f} % validation error"
        if self.spread is not None:
            error = f"{100 * self.val_error:.2f} ± {100 * self.spread:.2f} % validation error over {self.seeds} seeds"
        others = ", ".join(
            f"{num} {outcome}" for outcome, num in self.outcomes.items() if num and outcome != "finished"
        )
        ended = f"; the search ended after {self.minutes_allowed:g} min" if self.minutes_allowed else ""
        details = f" ({others}{ended})" if others or ended else ""
        grid = f" (the grid has {self.num_grid_points:,} points)" if self.num_grid_points > self.num_trials else ""
        best = {"best trial": f"{self.best_trial} of {self.num_trials}{grid}: {self.best!s}, {error}{details}"}
        return best | ({"search": self.duration} if self.seconds else {})

    @property
    def headline(self) -> str:
        """The validation error."""
        return f"{100 * self.val_error:.2f} % val"

    def row(self) -> dict[str, float]:
        """The number of trials."""
        return {"tune/trials": self.num_trials}

    def table(self) -> list[dict[str, Any]]:
        """A row for each trial."""
        return [
            {"trial": trial.name, **trial.choice.root, **trial.model_dump(exclude={"name", "choice"})}
            for trial in self.trials
        ]


class TrainResult(StageResult):
    """A finished model, and the figures of its training."""

    folder: str
    """Holds `model/` (weights and description) and `history.json` (metrics of each epoch)."""
    weights_sha256: str
    val_error: float
    best_epoch: float
    epochs: float
    """A fraction where a time limit ended the last one early."""
    num_parameters: int
    images_per_second: float
    peak_bytes: int = 0
    """Most memory of the first worker: its process, or the tensors on its GPU."""
    predicted_peak_bytes: int = 0
    with_validation: bool = False
    """Whether the validation rows were learned too, so that the validation error says nothing."""
    limit_minutes: float = 0.0
    """The `train.max_minutes` that ended the training before its last epoch; 0: it was not ended by a limit."""

    def highlights(self, locate: Locate) -> dict[str, str]:
        """The model's size, and the speed of its training."""
        return {
            "parameters": f"{self.num_parameters:,}",
            "training": f"{self.images_per_second:,.0f} images/s, {self.duration}",
            **({"ended early": self.unfinished} if self.unfinished else {}),
            "memory": self.memory,
            "model": locate(f"{self.folder}/model"),
            "MLflow run": self.mlflow_run_id or f"the one with the tag rcnn.stage_key = {self.folder}",
        }

    def figures(self) -> dict[str, str]:
        """Also the validation error."""
        return {"validation error": self.written_val_error} | super().figures()

    @property
    def headline(self) -> str:
        """The best epoch's validation error, if it says something."""
        return "" if self.with_validation else f"{100 * self.val_error:.2f} % val"

    def row(self) -> dict[str, float]:
        """The best epoch's error, not the last one's, and the size."""
        error = {} if self.with_validation else {"best/val/error": self.val_error}
        return error | {"model/parameters": self.num_parameters}

    def tags(self) -> dict[str, str]:
        """The training that later stages are about."""
        return {"rcnn.train": self.folder}

    @property
    def written_val_error(self) -> str:
        """The validation error, and the epoch that had it."""
        if self.with_validation:
            return "none: trained on the validation rows too"
        return f"{100 * self.val_error:.2f} % (epoch {self.best_epoch:g} of {self.epochs:g})"

    @property
    def memory(self) -> str:
        """The most memory of a worker beside the prediction."""
        predicted = f" ({self.predicted_peak_bytes / 1e6:,.0f} MB predicted)" if self.predicted_peak_bytes else ""
        return f"{self.peak_bytes / 1e6:,.0f} MB a worker{predicted}"

    @property
    def unfinished(self) -> str:
        """Why more could be trained; empty where nothing is left."""
        if not self.limit_minutes:
            return ""
        return f"train.max_minutes = {self.limit_minutes:g} ended it after {self.epochs:g} epochs"


class ClassFigures(BaseModel):
    """How well one class is recognised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_rows: int
    """Test rows of this class."""
    precision: float | None
    """Share of the answers with this class that are right; None without such an answer."""
    recall: float | None
    """Share of the class's rows that were recognised; None without test rows."""
    f1: float | None
    """The harmonic mean of both; None where the class occurs neither in the rows nor in the answers."""

    def cells(self) -> list[str]:
        """A row of a table: test rows, then precision, recall and F1 in per cent."""
        shares = (self.precision, self.recall, self.f1)
        return [f"{self.num_rows:,}", *("-" if share is None else f"{100 * share:.2f}" for share in shares)]


class StudyRow(BaseModel):
    """The model under one condition, beside itself as it is, on the same test rows.

    A condition is a set of views (`mirrored`), a corruption with its strength (`noise/3`), or a number of steps (`1`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    condition: str
    num_rows: int
    error: float
    error_interval: tuple[float, float]
    gain: float
    """How much lower the error is than that of the model as it is, a share of the rows."""
    gain_interval: tuple[float, float]
    """Of 95 %, for matched pairs."""
    passes: float
    """Forward passes of the whole network per image."""


class EvaluateResult(StageResult):
    """The figures on the test rows, and the folder of the report."""

    folder: str
    metrics: dict[str, float]
    """The metrics of `Figures` by name, over all test rows."""
    error_interval: tuple[float, float] = (0.0, 1.0)
    """Of 95 %, for the test error."""
    classes: dict[str, ClassFigures]
    """By name, in the order of the labels."""
    num_rows: int
    images_per_second: float
    """Of the last attempt; 0 where an earlier one had scored all rows."""
    test_digest: str
    predictions_sha256: str = ""
    """Of `predictions.parquet` in the folder, from which the metrics were computed."""
    temperature: float = 1.0
    """What divides the logits for calibrated probabilities; fitted to validation rows."""
    calibrated: dict[str, float] = {}
    """The metrics that it changes (loss, calibration_error, brier_score), on all test rows."""
    studies: dict[str, tuple[StudyRow, ...]] = {}
    """What was measured besides, by name: steps, views, robustness."""

    @property
    def test_error(self) -> float:
        """Share of the test rows that were classified wrongly."""
        return self.metrics["error"]

    @property
    def headline(self) -> str:
        """The test error."""
        return f"{100 * self.test_error:.2f} %"

    def row(self) -> dict[str, float]:
        """The test error with the ends of its interval."""
        low, high = self.error_interval
        return {"test/error": self.test_error, "test/error_low": low, "test/error_high": high}

    @property
    def speed(self) -> str:
        """The speed of scoring; empty where it is not known."""
        return f"{self.images_per_second:,.0f} images/s" if self.images_per_second else ""

    @property
    def inference(self) -> str:
        """The speed of scoring, and the time of the stage beside the prediction."""
        return ", ".join(filter(None, [self.speed, self.duration if self.seconds else ""]))

    def written_metrics(self) -> dict[str, str]:
        """The metrics by label, as people read them."""
        return written_metrics(self.metrics, "test") | {"test error": self.written_error}

    @property
    def written_error(self) -> str:
        """The test error with its interval."""
        low, high = (f"{100 * bound:.2f}" for bound in self.error_interval)
        return f"{100 * self.test_error:.2f} % of {self.num_rows:,} rows (95 %: {low} to {high} %)"

    def highlights(self, locate: Locate) -> dict[str, str]:
        """The metrics on all test rows, and where the report is."""
        return {
            **self.written_metrics(),
            "inference": self.inference,
            "report": locate(f"{self.folder}/report.md"),
        }

    def figures(self) -> dict[str, str]:
        """Also the recall of each class."""
        return super().figures() | {
            f"recall of {printable(name)}": "no test rows" if each.recall is None else f"{100 * each.recall:.1f} %"
            for name, each in self.classes.items()
        }


class AuditResult(StageResult):
    """The rows whose labels look wrong, by split, and the folder with the list of all rows."""

    folder: str
    """Holds `suspects.parquet` (all rows that were scored, ranked) and contact sheets of the first ones."""
    num_rows: dict[str, int]
    """Rows that were scored, by split."""
    suspects: dict[str, int]
    """Those whose label the model contradicts, by split."""
    skipped: str = ""
    """Why the training rows were not scored; empty where they were."""
    near_duplicates: int | None = None
    """Test rows that are among the training rows, nearly or exactly; None: ingest did not look for them."""

    @property
    def written_suspects(self) -> str:
        """The suspects of each split."""
        names = {"train": "training rows (seen in training)", "val": "validation rows", "test": "test rows"}
        counts = (f"{count:,} of {self.num_rows[split]:,} {names[split]}" for split, count in self.suspects.items())
        return ", ".join(counts)

    def highlights(self, locate: Locate) -> dict[str, str]:
        """How many rows look wrong, and where they are listed."""
        found = {"suspect labels": self.written_suspects}
        if self.near_duplicates:
            found["near-duplicates"] = f"{self.near_duplicates:,} test rows are among the training rows"
        return found | {"suspects": locate(f"{self.folder}/suspects.png")}

    def figures(self) -> dict[str, str]:
        """Also why training rows were left out."""
        return super().figures() | ({"training rows": self.skipped} if self.skipped else {})


class RegisterResult(StageResult):
    """A version in the model registry, and why it is the champion or not."""

    model_name: str
    version: int
    alias: str
    reason: str
    model_uri: str
    report: str = ""
    """An HTML file in the storage."""
    experiment_id: str = ""
    """MLflow's ids of the experiment, of the model, and of the training run, which has the report too; empty: registered
    before this was kept."""
    model_id: str = ""
    run_id: str = ""

    def highlights(self, locate: Locate) -> dict[str, str]:
        """The version, the gate's verdict, and the report."""
        report = {"report (HTML)": locate(self.report)} if self.report else {}
        return {"registered": f"{self.model_name} version {self.version}, {self.alias}: {self.reason}"} | report
