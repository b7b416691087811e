"""Everything that a user can set, as one frozen tree.

In: a complete config (a recipe), and on top of it a file, environment variables and `--set` values, in that order.
Out: a validated `PipelineConfig`, which goes to every stage as it is, beside every checkpoint and into every MLflow run.
"""

import difflib
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from rcnn.errors import ConfigError

ENV_PREFIX = "RCNN_"


class Section(BaseModel):
    """A part of the config: frozen, and with no room for a misspelt name."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def _require_no_credentials(setting: str, uri: str) -> None:
    """Settings go to logs and to MLflow: a key in them would too."""
    if re.search(r"://[^/?]*@|[?&](access_key|secret_key|session_token)=", uri):
        raise ValueError(f"{setting} holds credentials; give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


IMAGE_FILE_SOURCES = ("folder", "parquet")
"""The sources of encoded images (PNG, JPEG, ...): they need `data.root`, and may be of any size."""


class DataConfig(Section):
    """Where images come from, what they are made into, and how they are split."""

    source: Literal["mnist-sample", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "folder", "parquet"] = (
        Field("mnist-sample", description="Data set, or kind of data set; `rcnn sources` lists them.")
    )
    name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        description="Name in MLflow; empty: the source's, or for folder and parquet the last part of data.root.",
    )
    root: str = Field(
        "",
        description="Folder with the source's own files (folder, parquet: the images; a glob or s3://... for parquet); "
        "empty: download into the storage.",
    )
    mirror: str = Field("", description="Base URL to download from in place of the official one.")
    svhn_extra: bool = Field(False, description="svhn: train on the 531,131 images of its extra part too.")
    image_size: int = Field(
        0,
        ge=0,
        le=512,
        description="folder, parquet: side of the stored images, pixels; 0: all are of one size already.",
    )
    resize: Literal["crop", "pad", "stretch"] = Field(
        "crop",
        description="How image_size is reached (bilinear): crop: shorter side to size, then the centre; pad: longer "
        "side to size, black around it; stretch: each side to size.",
    )
    color: Literal["auto", "grey", "rgb"] = Field(
        "auto", description="folder, parquet: what images are converted to; auto: grey if the first one is grey."
    )
    max_megapixels: int = Field(64, ge=1, le=175, description="folder, parquet: larger images are refused, undecoded.")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="folder, parquet: what a bad image does; skip: it is left out and listed in the manifest."
    )
    val_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of the training rows held out for validation, where the source has none."
    )
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of all rows held out for testing, where the source has no test split."
    )
    split_seed: int = Field(0, ge=0, description="Seed that decides which row goes to which split.")
    shard_megabytes: int = Field(64, ge=1, le=256, description="Size of a Parquet shard, MB of uncompressed pixels.")

    @model_validator(mode="after")
    def _settings_fit_the_source(self) -> Self:
        if self.source in IMAGE_FILE_SOURCES and not self.root:
            raise ValueError(f"source = {self.source!r} needs data.root; set it to where the images are")
        _require_no_credentials("root", self.root)
        _require_no_credentials("mirror", self.mirror)
        if self.source == "mnist-sample" and self.root:
            raise ValueError(
                f"root = {self.root!r} means nothing to the source 'mnist-sample'; set data.source to folder, parquet, ..."
            )
        for name in ("image_size", "resize", "color", "max_megapixels", "on_error"):
            default, value = type(self).model_fields[name].default, getattr(self, name)
            if self.source not in IMAGE_FILE_SOURCES and value != default:
                raise ValueError(
                    f"{name} = {value!r} is for the sources folder and parquet, and source is {self.source!r}; "
                    f"leave it at {default!r}"
                )
        return self

    @property
    def dataset(self) -> str:
        """The data set's name: names experiments and models."""
        if self.name or self.source not in IMAGE_FILE_SOURCES:
            return self.name or self.source
        path = self.root.partition("?")[0] if "://" in self.root else self.root
        last = re.sub(r"(^|/)[^/]*[*?].*$", "", path).rstrip("/").rpartition("/")[2].removesuffix(".parquet")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or self.source


class ModelConfig(Section):
    """The network of Liang and Hu (2015), in the paper's own letters."""

    k: int = Field(32, ge=1, le=2048, description="K: feature maps of every hidden layer.")
    t: int = Field(3, ge=0, le=32, description="T: recurrent steps of every recurrent convolutional layer.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate after each RCL but the last (unverified value).")
    lrn_alpha: float = Field(0.001, ge=0, description="Alpha of the local response normalisation.")
    lrn_beta: float = Field(0.75, ge=0, description="Beta of the local response normalisation.")
    normalise: Literal["pixel_mean", "channel"] = Field(
        "pixel_mean",
        description="pixel_mean: remove the mean of each pixel, as published, and divide by one standard deviation; "
        "channel: the mean and standard deviation of each channel.",
    )
    crop: int = Field(
        0,
        ge=0,
        description="Side of the window that the network sees, pixels: cut at random in training (published: 24), "
        "from the centre elsewhere; 0: the whole image.",
    )


class TrainConfig(Section):
    """Stochastic gradient descent: how long, how fast, on how many workers."""

    epochs: int = Field(10, ge=1, description="Passes over the training rows.")
    batch_size: int = Field(64, ge=1, description="Images per step, all workers together.")
    learning_rate: float = Field(0.01, gt=0, le=10, description="Initial rate (plateau) or peak rate (one-cycle).")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of the SGD step.")
    nesterov: bool = Field(False, description="Whether the momentum is Nesterov's.")
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty on all weights.")
    schedule: Literal["plateau", "one_cycle"] = Field(
        "plateau",
        description="plateau: cut the rate when validation error stalls, as published; one_cycle: up, then down.",
    )
    plateau_factor: float = Field(0.1, gt=0, lt=1, description="The plateau schedule multiplies the rate by this.")
    plateau_patience: int = Field(3, ge=0, description="Epochs without a better validation error before a cut.")
    one_cycle_warmup: float = Field(0.25, gt=0, lt=1, description="Share of all steps in which one_cycle rises.")
    max_shift: int = Field(
        0, ge=0, le=16, description="Augmentation: black pixels put around images before a window is cut; 0: none."
    )
    flip: bool = Field(
        False, description="Augmentation: mirror left to right, half of all images, drawn anew each epoch."
    )
    cutout: int = Field(0, ge=0, description="Augmentation: side of a square that is blackened, pixels; 0: none.")
    loader: Literal["auto", "resident", "streaming"] = Field(
        "auto",
        description="resident: all rows on the training device; streaming: read ahead from the shards; "
        "auto: streaming where the rows exceed resident_megabytes.",
    )
    resident_megabytes: int = Field(4096, ge=1, description="Largest training split that auto keeps on the device, MB.")
    clip_norm: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0: no clipping.")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="Decay per step of the averaged weights; 0: no averaging.")
    num_rows: int = Field(0, ge=0, description="Training rows to use; 0: all of them.")
    keep_checkpoints: int = Field(2, ge=1, description="Best checkpoints to keep; the last one is always kept.")
    num_workers: int = Field(1, ge=1, description="Ray Train workers; batch_size must divide by it.")
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores (and threads) of each worker.")
    use_gpu: bool = Field(False, description="Whether each worker takes one GPU.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of the arithmetic; weights are float32 always. bfloat16 is faster where the processor has "
        "instructions for it; auto: bfloat16 on such a GPU, float32 elsewhere.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether torch compiles the step, which takes a minute at the start; auto: in long runs on a GPU.",
    )
    deterministic: bool = Field(
        False, description="Whether two runs on one machine give the same bits; torch refuses what cannot."
    )
    recompute: bool = Field(
        False,
        description="Trades time for memory: the backward pass computes each recurrent step's activations once more.",
    )
    triton: bool = Field(
        False,
        description="Whether a Triton kernel normalises on the GPU, for K up to 128; checked against the equation at "
        "the start.",
    )
    max_failures: int = Field(2, ge=0, description="Worker failures after which training resumes from a checkpoint.")

    @model_validator(mode="after")
    def _triton_has_a_gpu(self) -> Self:
        if self.triton and not self.use_gpu:
            raise ValueError("triton = true needs a GPU; set use_gpu to true, or triton to false")
        return self

    @model_validator(mode="after")
    def _batch_divides_by_workers(self) -> Self:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"batch_size = {self.batch_size} does not divide by num_workers = {self.num_workers}; "
                f"set batch_size to {self.num_workers * max(1, self.batch_size // self.num_workers)}"
            )
        return self


class TuneConfig(Section):
    """The search over K, T and the learning rate: random draws, the worse ones stopped early (ASHA)."""

    enabled: bool = Field(True, description="Whether to search at all; if not, `model` and `train` hold as they are.")
    num_trials: int = Field(8, ge=1, description="Configurations to draw.")
    k: tuple[Annotated[int, Field(ge=1, le=2048)], ...] = Field((16, 32), min_length=1, description="K to choose from.")
    t: tuple[Annotated[int, Field(ge=0, le=32)], ...] = Field((1, 2, 3), min_length=1, description="T to choose from.")
    learning_rate_min: float = Field(1e-3, gt=0, description="Lower end of the rate, drawn log-uniformly.")
    learning_rate_max: float = Field(1e-1, gt=0, le=10, description="Upper end of the rate.")
    epochs: int = Field(3, ge=1, description="Epochs of a trial that is not stopped.")
    grace_epochs: int = Field(1, ge=1, description="Epochs that each trial gets before it may be stopped.")
    reduction_factor: int = Field(2, ge=2, description="At each rung one trial in so many goes on.")
    num_rows: int = Field(0, ge=0, description="Training rows of a trial; 0: all of them.")
    max_concurrent_trials: int = Field(0, ge=0, description="Trials at a time; 0: as many as the cluster has room for.")
    cpus_per_trial: int = Field(1, ge=1, description="CPU cores (and threads) of each trial.")
    gpus_per_trial: float = Field(0, ge=0, description="GPUs of each trial; 0.5 puts two on one.")

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        if self.learning_rate_min >= self.learning_rate_max:
            raise ValueError(
                f"learning_rate_min = {self.learning_rate_min} is not below "
                f"learning_rate_max = {self.learning_rate_max}; lower the one or raise the other"
            )
        if self.grace_epochs > self.epochs:
            raise ValueError(
                f"grace_epochs = {self.grace_epochs} exceeds epochs = {self.epochs}; set it to {self.epochs} or less"
            )
        return self


class EvaluateConfig(Section):
    """How the test rows are scored."""

    batch_size: int = Field(256, ge=1, description="Images per forward pass.")


class RayConfig(Section):
    """Where the heavy stages run."""

    address: str = Field(
        "",
        pattern=r"^(auto|https?://.+)?$",
        description="Empty: start Ray here; auto: join this machine's cluster; http://head:8265: submit Ray jobs.",
    )
    num_cpus: int = Field(0, ge=0, description="Cores of a Ray that is started here; 0: all of them.")


class TrackingConfig(Section):
    """Where MLflow keeps runs and models."""

    uri: str = Field("", description="MLflow tracking URI; empty: mlflow.db (SQLite) in the storage.")
    experiment: str = Field("", description="Experiment; empty: rcnn/<data set>.")
    model_name: str = Field("", description="Registered model; empty: rcnn-<data set>.")


class PipelineConfig(Section):
    """The whole pipeline: data, model, training, tuning, evaluation, and where all that runs."""

    recipe: str = Field("custom", description="Name of the recipe that this config grew from.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of weights, shuffling, dropout and the search.")
    storage: str = Field(
        "storage", min_length=1, description="Folder or URI (s3://...) of data sets, runs and reports."
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _storage_is_free_of_secrets(self) -> Self:
        _require_no_credentials("storage", self.storage)
        return self

    def hash(self, *sections: str) -> str:
        """The first 12 hex digits of the SHA-256 of the named parts of the tree, or of all of them.

        Where things run and are kept (storage, ray, tracking) is no part of it: moving a run does not rename it.
        """
        tree = self.model_dump(mode="json", exclude={"recipe", "storage", "ray", "tracking"})
        chosen = {name: value for name, value in tree.items() if not sections or name in sections}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]

    def with_settings(self, settings: Mapping[str, Any]) -> "PipelineConfig":
        """A copy with dotted settings changed, e.g. `{"model.k": 64}`, and all bounds checked anew."""
        return _validated(_merged(self.model_dump(mode="json"), _nested(settings, origin="settings")), "settings")

    def rooted(self) -> "PipelineConfig":
        """A copy in which a local `data.root` is an absolute path: stages may run in other folders, and it is in their key."""
        root = self.data.root
        if not root or "://" in root:
            return self
        return self.with_settings({"data.root": os.path.abspath(os.path.expanduser(root))})

    def placed_by(self, environ: Mapping[str, str]) -> "PipelineConfig":
        """A copy in which the environment says where things run and are kept, unless the config says it already.

        For deployments: a worker knows its own cluster (`ray`), storage and MLflow (`tracking`).
        """
        places = ("storage", "ray.", "tracking.")
        return self.with_settings(
            {
                name: value
                for name, value in _environment_settings(environ).items()
                if name.startswith(places) and _lookup(self, name) == _lookup(PipelineConfig(), name)
            }
        )


def build_config(
    base: PipelineConfig,
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Iterable[str] = (),
) -> PipelineConfig:
    """Lays a TOML or YAML file, `RCNN_SECTION__FIELD` variables and `section.field=value` strings over `base`.

    Raises:
        ConfigError: a name is unknown or a value out of bounds; the message names the setting and where it was set.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if file is not None:
        tree = read_config_file(file)
        tree.pop("recipe", None)  # it chose `base`
        layers.append((str(file), tree))
    if environ:
        layers.append(("the environment", _nested(_environment_settings(environ), origin="the environment")))
    assignments = dict(_parse_override(text) for text in overrides)
    layers.append(("--set", _nested(assignments, origin="--set")))
    merged = base.model_dump(mode="json")
    for _, tree in layers:
        merged = _merged(merged, tree)
    # Checked together, since a rule over two settings may need both layers; the blame goes to the last one at fault.
    try:
        return PipelineConfig.model_validate(merged)
    except ValidationError as error:
        path = error.errors()[0]["loc"]
        origin = next((name for name, tree in reversed(layers) if _holds(tree, path)), layers[-1][0])
        raise _readable(error, origin) from error


def read_config_file(file: str | Path) -> dict[str, Any]:
    """The tree in a `.toml`, `.yaml`, `.yml` or `.json` file.

    Raises:
        ConfigError: the file is missing, cannot be parsed, or does not hold a table.
    """
    path = Path(file)
    remedy = "Write TOML (.toml), YAML (.yaml) or JSON (.json); `rcnn config --recipe demo` prints an example"
    try:
        text = path.read_text()
        tree = _parse_tree(path.suffix, text)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=str(path), remedy="Check the path") from error
    except ValueError as error:
        raise ConfigError(f"cannot be parsed: {_one_line(error)}", where=str(path), remedy=remedy) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"holds a {type(tree).__name__}, not a table of settings", where=str(path), remedy=remedy)
    return tree


def setting_names() -> Iterator[str]:
    """The dotted name of every setting, in the tree's order."""
    return (name for name, _ in _fields(PipelineConfig, "") if name != "recipe")


def explain_settings() -> list[dict[str, str]]:
    """Each setting with its default, its bounds and its meaning."""
    return [
        {
            "setting": name,
            "default": json.dumps(field.get_default(), default=str),
            "bounds": ", ".join(str(bound) for bound in field.metadata),
            "meaning": field.description or "",
        }
        for name, field in _fields(PipelineConfig, "")
        if name != "recipe"
    ]


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _parse_tree(suffix: str, text: str) -> Any:
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix == ".json":
        return json.loads(text)
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    raise ValueError(f"the ending {suffix!r} is unknown")


def _parse_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} has no '='", where="--set", remedy="Write --set section.field=value")
    return name.strip(), _parse_value(value.strip())


def _parse_value(text: str) -> Any:
    """The TOML value that `text` spells, or else the bare string: a path or a name needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _environment_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        name.removeprefix(ENV_PREFIX).lower().replace("__", "."): _parse_value(value)
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX)
    }


def _nested(settings: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    known = set(setting_names())
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise _unknown_setting(name, origin)
        *path, leaf = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return tree


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both_are_tables = isinstance(value, dict) and isinstance(below.get(name), dict)
        merged[name] = _merged(below[name], value) if both_are_tables else value
    return merged


def _lookup(config: PipelineConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        if part not in type(value).model_fields:
            raise _unknown_setting(name, "the environment")
        value = getattr(value, part)
    return value


def _holds(tree: Any, path: tuple[int | str, ...]) -> bool:
    """Whether a layer sets what the path names, or for a rule over a section, anything in it."""
    for part in path:
        if not isinstance(tree, dict):
            return True
        if part not in tree:
            return False
        tree = tree[part]
    return True


def _validated(tree: dict[str, Any], origin: str) -> PipelineConfig:
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise _readable(error, origin) from error


def _readable(error: ValidationError, origin: str) -> ConfigError:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_setting(name, origin)
    message = first["msg"].removeprefix("Value error, ")
    # A rule over several fields already says what was found; a single field's message does not.
    found = "" if first["type"] == "value_error" else f" is {first['input']!r}:"
    more = f" ({error.error_count() - 1} more settings are wrong)" if error.error_count() > 1 else ""
    what = f"{name}{found} {message[0].lower() + message[1:]}{more}".replace("  ", " ")
    return ConfigError(what, where=origin, remedy="`rcnn config --explain` lists each setting with its bounds")


def _unknown_setting(name: str, origin: str) -> ConfigError:
    if name == "recipe":
        return ConfigError("'recipe' chooses where settings start", where=origin, remedy="Use --recipe NAME")
    near = difflib.get_close_matches(name, list(setting_names()), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else ""
    remedy = f"{hint} `rcnn config --explain` lists them all".strip()
    return ConfigError(f"there is no setting {name!r}", where=origin, remedy=remedy)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
