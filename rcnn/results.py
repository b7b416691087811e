"""What each stage hands to the next: small references that go through JSON, in the order of the pipeline. Never tensors."""

from pydantic import BaseModel, ConfigDict

from rcnn.config import PipelineConfig


class StageResult(BaseModel):
    """What all of them carry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mlflow_run_id: str = ""


class IngestResult(StageResult):
    """A data set: its folder in the storage, and its identity."""

    folder: str
    digest: str
    test_digest: str
    source: str
    rows: dict[str, int]


class Choice(BaseModel):
    """One point of the search space."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int
    t: int
    learning_rate: float

    def applied_to(self, config: PipelineConfig) -> PipelineConfig:
        """The config with these three settings."""
        return config.with_settings({"model.k": self.k, "model.t": self.t, "train.learning_rate": self.learning_rate})

    def __str__(self) -> str:
        return f"K={self.k} T={self.t} lr={self.learning_rate:.3g}"


class Trial(BaseModel):
    """One configuration that was tried, and how far it came."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    choice: Choice
    val_error: float
    epochs: int
    outcome: str
    """finished, stopped early, diverged or failed."""


class TuneResult(StageResult):
    """The best configuration, and all that were tried."""

    best: Choice
    best_trial: str
    val_error: float
    trials: tuple[Trial, ...]


class TrainResult(StageResult):
    """A finished model, and the figures of its training."""

    folder: str
    """Holds `model/` (weights and description) and `history.json` (metrics of each epoch)."""
    weights_sha256: str
    val_error: float
    best_epoch: int
    epochs: int
    num_parameters: int
    images_per_second: float
    seconds: float


class EvaluateResult(StageResult):
    """The figures on the test rows, and the folder of the report."""

    folder: str
    test_error: float
    test_loss: float
    accuracy_per_class: dict[str, float | None]
    """None for a class without test rows."""
    rows: int
    images_per_second: float
    test_digest: str


class RegisterResult(StageResult):
    """A version in the model registry, and why it is the champion or not."""

    model_name: str
    version: int
    alias: str
    reason: str
    model_uri: str
