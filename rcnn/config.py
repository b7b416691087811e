"""Everything that a user can set, as one frozen tree: each setting with its type, bounds and meaning.

In: what a user set; `settings.py` collects it. Out: a validated `PipelineConfig`, which goes to every stage as it is,
beside every checkpoint and into every MLflow run. How a value is read and what errors say is in `section.py`.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rcnn.data.sources import SOURCES, unread_by
from rcnn.model.networks import NETWORKS, title_of, unread_settings
from rcnn.ranges import Range, Values, is_continuous, read_space
from rcnn.section import Given, Section, environment_layer, lay, variable_of

# Bounds of what has no bound of its own: far above any use, and low enough that a slip of the keyboard is refused.
MAX_SEED = 2**31 - 1
MAX_PATH = 4096  # characters of a path or URI, as Linux bounds it
MAX_SIDE = 4096  # pixels
MAX_MEGAPIXELS = 175  # Pillow refuses images of about 179
MAX_EPOCHS = 100_000
MAX_MINUTES = 525_600  # a year
MAX_BATCH = 1_000_000  # images
MAX_ROWS = 1_000_000_000
MAX_CPUS = 4096
MAX_MINUTES = 100_000


def _require_no_credentials(
    setting: str, uri: str, instead: str = "give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
) -> None:
    """Settings go to logs and to MLflow: a key in them would too. The message must not repeat the value."""
    if re.search(
        r"://[^/?]*@|[?&](access_key|secret_key|session_token|user|password|token|api_?key)=", uri, re.IGNORECASE
    ):
        raise ValueError(f"{setting} holds credentials; {instead}")


def _sound_uri(uri: str) -> str:
    """`s3:/bucket` would be a local folder named `s3:`, and ` data` one that looks like another."""
    if uri != uri.strip():
        raise ValueError("should not begin or end with white space")
    slip = re.match(
        r"(?P<scheme>(?i:s3|gs|gcs|hdfs|abfss?|file|https?))(:(?!//)|//)|(?P<other>[\w+.-]{2,}):/(?!/)", uri
    )
    if slip:
        scheme = slip["scheme"] or slip["other"]
        slashes = "///" if scheme.lower() in ("file", "sqlite") else "//"
        meant = f"{scheme}:{slashes}{uri[slip.end() :].lstrip('/')}"
        folder = "" if scheme.lower() in ("http", "https", "sqlite") else f"; a folder of this name is ./{uri}"
        raise ValueError(f"should be {meant}{folder}")
    if re.match(r"(?i:s3|gs|gcs|abfss?|https?)://[/?]|[\w+.-]+://$", uri):
        raise ValueError("should name more than the scheme, as s3://bucket/prefix does")
    return uri


IMAGE_FILE_SOURCES = tuple(name for name, source in SOURCES.items() if source.entries)
"""The sources of the user's own images (PNG, JPEG, ...): they need `data.root`, and may be of any size."""

if TYPE_CHECKING:
    NetworkName = str
    SourceName = str
else:  # the tables' names, so that errors, `--explain` and the form of the Prefect UI list them
    NetworkName = Literal[tuple(NETWORKS)]
    SourceName = Literal[tuple(SOURCES)]


class DataConfig(Section):
    """Where images come from, what they are made into, and how they are split."""

    source: SourceName = Field("mnist-sample", description="Data set, or kind of data set; `rcnn sources` lists them.")
    name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        max_length=100,
        examples=["flowers-2.1"],
        description="Name in MLflow, of letters, digits, dots, - and _; empty: the source's, or for folder and parquet "
        "the last part of data.root.",
    )
    root: str = Field(
        "",
        max_length=MAX_PATH,
        description="Folder with the source's own files (folder, parquet: the images; a glob or s3://... for parquet); "
        "empty: download into the storage.",
    )
    mirror: str = Field("", max_length=MAX_PATH, description="Base URL to download from in place of the official one.")
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
    max_megapixels: int = Field(
        64, ge=1, le=MAX_MEGAPIXELS, description="folder, parquet: larger images are refused, undecoded."
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="folder, parquet: what a bad image does; skip: it is skipped and listed in the manifest."
    )
    follow_links: bool = Field(False, description="folder: whether links that lead out of data.root are followed.")
    image_column: str = Field(
        "", max_length=1000, description="parquet: the column of images; empty: image or img, whichever is there."
    )
    label_column: str = Field(
        "", max_length=1000, description="parquet: the column of labels; empty: label, labels or fine_label."
    )
    val_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of the training rows held out for validation, where the source has none."
    )
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of all rows held out for testing, where the source has no test split."
    )
    split_seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed that decides which row goes to which split.")
    shard_megabytes: int = Field(64, ge=1, le=256, description="Size of a Parquet shard, MB of uncompressed pixels.")

    _uris_are_sound = field_validator("root", "mirror")(_sound_uri)

    @model_validator(mode="after")
    def _settings_fit_the_source(self) -> Self:
        if self.source in IMAGE_FILE_SOURCES and not self.root:
            raise ValueError(f"source = {self.source!r} needs data.root; set it to where the images are")
        _require_no_credentials("root", self.root)
        _require_no_credentials("mirror", self.mirror)
        for name, sources in unread_by(self.source).items():
            default, value = type(self).model_fields[name].default, getattr(self, name)
            if value != default:
                fitting = "source " if len(sources) == 1 else "sources " + "".join(f"{each}, " for each in sources[:-2])
                fitting += " and ".join(sources[-2:])
                raise ValueError(
                    f"{name} = {value!r} is for the {fitting}, and source is {self.source!r}; leave it at {default!r}"
                )
        return self

    @property
    def dataset(self) -> str:
        """The data set's name: names experiments and models."""
        if self.name or self.source not in IMAGE_FILE_SOURCES:
            return self.name or self.source
        path = self.root.partition("?")[0] if "://" in self.root else self.root
        last = re.sub(r"(^|/)[^/]*[*?].*$", "", path).rstrip("/").rpartition("/")[2]
        last = re.sub(r"\.(parquet|pq)$", "", last, flags=re.IGNORECASE)
        return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or self.source


class ModelConfig(Section):
    """The network, and its settings in the paper's own letters."""

    network: NetworkName = Field("rcnn", description="Network; rcnn: Liang and Hu (2015), with LRN, as published.")
    k: int = Field(32, ge=1, le=2048, description="K: feature maps of every hidden layer.")
    t: int = Field(3, ge=0, le=32, description="T: recurrent steps of every recurrent convolutional layer.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate after each RCL but the last (unverified value).")
    width: float = Field(
        1.0, gt=0, le=16, description="Multiplies the feature maps of a network that has no K: nin, nin_svhn, maxout."
    )
    lrn_alpha: float = Field(0.001, ge=0, le=1000, description="Alpha of the local response normalisation.")
    lrn_beta: float = Field(0.75, ge=0, le=10, description="Beta of the local response normalisation.")
    normalise: Literal["pixel_mean", "channel"] = Field(
        "pixel_mean",
        description="pixel_mean: remove the mean of each pixel, as published, and divide by one standard deviation; "
        "channel: the mean and standard deviation of each channel.",
    )
    crop: int = Field(
        0,
        ge=0,
        le=MAX_SIDE,
        description="Side of the window that the network sees, pixels: cut at random in training (published: 24), "
        "from the centre elsewhere; 0: the whole image.",
    )

    @model_validator(mode="after")
    def _settings_are_the_networks(self) -> Self:
        default = type(self).model_construct()
        for name, value in unread_settings(self.network, self.model_dump()).items():
            usual = getattr(default, name)
            if value != usual:
                raise ValueError(f"{name} = {value!r} is not read by network = {self.network!r}; leave it at {usual!r}")
        return self

    members: int = Field(
        1,
        ge=1,
        le=100,
        description="Networks that answer as one, trained with the seeds seed, seed + 1 and so on. Each is a training of its "
        "own, which is found if it was made before.",
    )
    combine: Literal["probabilities", "weights"] = Field(
        "probabilities",
        description="How members answer as one: by the mean of their probabilities, each doing its arithmetic; or as one "
        "network with the mean of their weights, which seldom holds for different seeds.",
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """The settings that the network reads."""
        return NETWORKS[self.network].reads

    @property
    def title(self) -> str:
        """What reports, plots and tags call the network, e.g. `RCNN-96, T = 3`."""
        network = title_of(self.network, self.model_dump())
        if self.members == 1:
            return network
        return f"{self.members} x {network}" if self.combine == "probabilities" else f"mean of {self.members} {network}"

    @property
    def short_title(self) -> str:
        """The same as a part of a name: `RCNN-96 T=3`."""
        return self.title.replace(", T = ", " T=")


DEFAULT_SHARES = 4
SHARE_OF_ALL_STEPS = 0.5
"""Of the training steps with `train.any_t`, those that do all T recurrent steps. Not tuned."""
_OF_SCHEDULES = ("plateau_factor", "plateau_patience", "one_cycle_warmup")
"""Settings that one value of `train.schedule` reads, whose name they begin with."""


class TrainConfig(Section):
    """Stochastic gradient descent: how long, how fast, on which rows."""

    epochs: int = Field(10, ge=1, le=MAX_EPOCHS, description="Passes over the training rows.")
    max_minutes: float = Field(
        0.0,
        ge=0,
        le=MAX_MINUTES,
        description="Ends the train stage within this many minutes with its best result so far; 0: no limit. In no key: "
        "with a higher limit, a run that it ended resumes; a learning rate of one_cycle stays on its way to the last epoch.",
    )
    batch_size: int = Field(64, ge=1, le=MAX_BATCH, description="Images per step, all workers together.")
    optimizer: Literal["sgd", "muon"] = Field(
        "sgd",
        description="sgd: as published; muon: the kernels of the convolutions by torch's Muon, whose updates are orthogonal "
        "matrices (Jordan 2024), and the rest by SGD.",
    )
    learning_rate: float = Field(0.01, gt=0, le=10, description="Initial rate (plateau) or peak rate (one-cycle).")
    kernel_rate: float = Field(
        0.02, gt=0, le=10, description="With muon, the rate of the kernels; learning_rate is that of the rest."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of the SGD step.")
    nesterov: bool = Field(False, description="Whether the momentum is Nesterov's.")
    weight_decay: float = Field(1e-4, ge=0, le=1000, description="L2 penalty on all weights.")
    schedule: Literal["plateau", "one_cycle"] = Field(
        "plateau",
        description="plateau: cut the rate when validation error stalls, as published; one_cycle: up, then down.",
    )
    plateau_factor: float = Field(0.1, gt=0, lt=1, description="The plateau schedule multiplies the rate by this.")
    plateau_patience: int = Field(
        3, ge=0, le=MAX_EPOCHS, description="Epochs without a better validation error before a cut."
    )
    one_cycle_warmup: float = Field(0.25, gt=0, lt=1, description="Share of all steps in which one_cycle rises.")
    clip_norm: float = Field(1.0, ge=0, le=1e6, description="Largest norm of the gradient; 0: no clipping.")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="Decay per step of the averaged weights; 0: no averaging.")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the target that is spread over all classes in the training loss; 0: none.",
    )
    on_divergence: Literal["end", "roll_back"] = Field(
        "end",
        description="If the loss is no longer a number, end; or roll_back to the start of the epoch, with a third of the "
        "learning rate, up to five times. The history counts them (train/roll_backs).",
    )
    num_rows: int = Field(0, ge=0, le=MAX_ROWS, description="Training rows to use; 0: all of them.")
    with_validation: bool = Field(
        False,
        description="Train on the validation rows too, as the paper's last run does, with settings that were found without "
        "them. The last epoch's model is kept, and its validation error says nothing.",
    )
    any_t: bool = Field(
        False,
        description="Draw a number of recurrent steps for each training step, T in half of them and fewer in the others, so "
        "that one network can run with any number up to T.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of the arithmetic; weights are float32 always. bfloat16 is faster where the processor has "
        "instructions for it; auto: bfloat16 on such a GPU, float32 elsewhere.",
    )
    deterministic: bool = Field(
        False,
        description="Whether two runs on machines of one kind give the same bits; torch refuses what cannot. With shares, "
        "which are then on, that holds for any number of workers and threads.",
    )
    num_shares: int = Field(
        0,
        ge=0,
        le=4096,
        description="Parts of each batch whose gradients are computed one by one, each on one thread, and added in a fixed "
        "order: the same bits on any number of workers up to this; 0: 4 if deterministic, else each worker takes its slice.",
    )

    @model_validator(mode="after")
    def _validation_rows_decide_nothing(self) -> Self:
        if self.with_validation and self.schedule == "plateau":
            raise ValueError(
                "with_validation leaves no rows by which schedule = 'plateau' could cut the rate; set schedule to one_cycle"
            )
        if self.with_validation and self.num_rows:
            raise ValueError(
                f"with_validation takes all rows, and num_rows is {self.num_rows}; set that to 0, or this to false"
            )
        return self

    @property
    def shares(self) -> int:
        """The number of shares; 0: none."""
        return self.num_shares or (DEFAULT_SHARES if self.deterministic else 0)


class AugmentConfig(Section):
    """Changes of training images that keep their label."""

    max_shift: int = Field(
        0, ge=0, le=16, description="Black pixels put around images before a window is cut; 0: none."
    )
    flip: bool = Field(False, description="Mirror left to right, half of all images, drawn again each epoch.")
    alternate_flips: bool = Field(
        False,
        description="With flip: in every second epoch, mirror exactly those images that were not mirrored in the one before, "
        "so that two epochs show both (Jordan 2024).",
    )
    cutout: int = Field(0, ge=0, le=MAX_SIDE, description="Side of a square that is blackened, pixels; 0: none.")

    @model_validator(mode="after")
    def _flips_alternate_where_there_are_any(self) -> Self:
        if self.alternate_flips and not self.flip:
            raise ValueError("alternate_flips is on and flip is off; set flip to true, or alternate_flips to false")
        return self


class ExecutionConfig(Section):
    """How and where steps run. Nothing here names a result: a run resumes with other settings of this section."""

    checkpoint_minutes: float = Field(
        10,
        gt=0,
        le=MAX_MINUTES,
        description="Minutes of training after which a checkpoint is written, besides each epoch's end.",
    )
    keep_checkpoints: int = Field(
        2,
        ge=1,
        le=10_000,
        description="Checkpoints to keep, the last ones: if one is damaged, the one before it is used.",
    )
    num_workers: int = Field(
        1,
        ge=1,
        le=4096,
        description="Ray workers that train, and then score the test rows; the batch must divide by it. A range such as 2..8 "
        "sets min_workers too.",
    )
    min_workers: int = Field(
        0,
        ge=0,
        le=4096,
        description="Fewest workers to start with, where the cluster has no room for num_workers; when it has, more join, from "
        "a checkpoint. Needs shares, so that the result does not change; 0: always num_workers.",
    )
    cpus_per_worker: int = Field(1, ge=1, le=MAX_CPUS, description="CPU cores (and threads) of each worker.")
    use_gpu: bool = Field(False, description="Whether each worker takes one GPU.")
    loader: Literal["auto", "resident", "streaming"] = Field(
        "auto",
        description="resident: all rows on the training device; streaming: read ahead from the shards; "
        "auto: streaming where the rows exceed resident_megabytes.",
    )
    resident_megabytes: int = Field(
        4096, ge=1, le=10_000_000, description="Largest training split that auto keeps on the device, MB."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether torch compiles the step, which takes a minute at the start; auto: in long runs on a GPU.",
    )
    convolution: Literal["auto", "direct", "winograd"] = Field(
        "auto",
        description="How recurrent layers convolve on a CPU; winograd: with a quarter of the arithmetic, wherever the "
        "kernel applies; direct: by torch; auto: winograd where it is faster.",
    )
    recompute: bool = Field(
        False,
        description="Trades time for memory: the backward pass computes each recurrent step's activations once more.",
    )
    max_failures: int = Field(
        2,
        ge=0,
        le=1000,
        description="Deaths of workers without a new checkpoint, or in evaluation a newly scored part, that are survived.",
    )

    @model_validator(mode="before")
    @classmethod
    def _range_sets_both(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("num_workers"), str):
            fewest, dots, most = tree["num_workers"].partition("..")
            if dots:
                if fewest.strip() == "0":
                    raise ValueError(f"num_workers = {tree['num_workers']!r} begins at 0; begin at 1 or more")
                ends = [int(end) if end.strip().isdecimal() else end for end in (fewest, most)]
                return tree | {"min_workers": ends[0], "num_workers": ends[1]}
        return tree

    @model_validator(mode="after")
    def _range_is_sound(self) -> Self:
        if self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers = {self.min_workers} is more than num_workers = {self.num_workers}; lower it"
            )
        return self


SEARCHED_SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "train": TrainConfig, "augment": AugmentConfig}
NOT_SEARCHED = (
    "train.epochs",
    "train.num_rows",
    "train.max_minutes",
    "train.with_validation",
    "model.members",
    "model.combine",
)  # fmt: skip  (`tune` has its own, and a trial trains one network)
SEARCHABLE = {
    f"{section}.{name}": field
    for section, of in SEARCHED_SECTIONS.items()
    for name, field in of.model_fields.items()
    if f"{section}.{name}" not in NOT_SEARCHED
}
"""The settings that `tune.space` may name: they change how a trial trains."""

DEFAULT_SPACE: dict[str, Values] = {
    "model.k": (16, 32),
    "model.t": (1, 2, 3),
    "train.learning_rate": Range(min=1e-3, max=1e-1, log=True),
}


class TuneConfig(Section):
    """The search for better settings: what is searched, in which order, and which trials are stopped early."""

    enabled: bool = Field(True, description="Whether to search at all; if not, `model` and `train` hold as they are.")
    space: dict[str, Values] = Field(
        DEFAULT_SPACE,
        description="What is searched: settings of model, train and augment by dotted name, each with a list of values "
        "or a range {min, max, log, step}.",
        examples=['{"model.k": [16, 32], "train.learning_rate": {"min": 0.001, "max": 0.1, "log": true}}'],
    )
    search: Literal["random", "grid", "tpe"] = Field(
        "random",
        description="random: independent draws; grid: every combination; tpe: draws that learn from earlier trials "
        "(Optuna's tree-structured Parzen estimator).",
    )
    early_stopping: Literal["asha", "median", "none"] = Field(
        "asha",
        description="asha: successive halving at rungs; median: stop trials that are worse than the median of the "
        "others; none: all trials run to the end.",
    )
    num_trials: int = Field(
        8, ge=1, le=10_000, description="Configurations to try; raised later, it extends the finished search."
    )
    epochs: int = Field(3, ge=1, le=MAX_EPOCHS, description="Epochs of a trial that is not stopped.")
    grace_epochs: int = Field(
        1, ge=1, le=MAX_EPOCHS, description="Epochs that each trial gets before it may be stopped."
    )
    reduction_factor: int = Field(2, ge=2, le=100, description="At each rung, ASHA keeps 1 in this many trials.")
    num_rows: int = Field(0, ge=0, le=MAX_ROWS, description="Training rows of a trial; 0: all of them.")
    seeds: int = Field(
        1, ge=1, le=100, description="Seeds that the best configurations are trained with; above 1, their mean decides."
    )
    num_finalists: int = Field(
        3, ge=1, le=100, description="Configurations that are trained with every seed, where seeds is above 1."
    )
    max_minutes: float = Field(
        0,
        ge=0,
        le=MAX_MINUTES,
        description="Minutes after which the search ends with its best result so far, those of interrupted attempts and of a "
        "search that this one extends included; 0: no limit.",
    )
    trial_minutes: float = Field(
        0,
        ge=0,
        le=MAX_MINUTES,
        description="Minutes after which a trial ends with its last epoch; 0: an hour and 20 times what its first steps "
        "predict.",
    )
    max_concurrent_trials: int = Field(
        0, ge=0, le=10_000, description="Trials at a time; 0: as many as the cluster has cores, GPUs and memory for."
    )
    workers_per_trial: int = Field(1, ge=1, le=4096, description="Ray Train workers of each trial.")
    cpus_per_trial: int = Field(1, ge=1, le=MAX_CPUS, description="CPU cores (and threads) of each worker of a trial.")
    gpus_per_trial: float = Field(
        0, ge=0, le=1000, description="GPUs of each worker of a trial; 0.5 puts two on one GPU."
    )

    @field_validator("space", mode="before")
    @classmethod
    def _space_is_within_bounds(cls, given: Any) -> dict[str, Values]:
        return read_space(given, SEARCHABLE)

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        if self.grace_epochs > self.epochs:
            raise ValueError(
                f"grace_epochs = {self.grace_epochs} exceeds epochs = {self.epochs}; set it to {self.epochs} or less"
            )
        endless = [name for name, values in self.space.items() if is_continuous(values, SEARCHABLE[name])]
        if self.search == "grid" and endless:
            raise ValueError(
                f"search = 'grid' has no end where space gives {endless[0]} a range without a step; give it a step, or a list"
            )
        return self


class EvaluateConfig(Section):
    """How the test rows are scored."""

    batch_size: int = Field(256, ge=1, le=MAX_BATCH, description="Images per forward pass.")
    steps: bool = Field(
        True,
        description="Networks with recurrent steps: measure the error with fewer than T, and draw how states, answers and "
        "receptive fields change from step to step.",
    )
    views: tuple[Literal["mirrored", "shifted", "crops", "mirrored_crops"], ...] = Field(
        (),
        description="Views over which probabilities are averaged, each measured beside the single view that all other figures "
        "come from; mirrored: 2; shifted: 9, by -2, 0 and 2 pixels; crops: 9 windows of model.crop, as published.",
    )
    robustness: bool = Field(
        False, description="Measure the error with noise, blur, contrast, shift and JPEG, at five strengths each."
    )
    sample_rows: int = Field(
        1000,
        ge=0,
        le=MAX_ROWS,
        description="Test rows, spread over all of them, on which steps, views and robustness are measured; 0: all rows.",
    )


class AuditConfig(Section):
    """The search for rows whose labels look wrong."""

    enabled: bool = Field(True, description="Whether to search at all.")
    train_rows: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether training rows are scored too; auto: where that costs at most 3 % of the training's arithmetic, "
        "from 12 epochs of all rows on.",
    )


class RayConfig(Section):
    """Where the heavy stages run."""

    address: str = Field(
        "",
        pattern=r"^(auto|https?://.+)?$",
        examples=["auto", "http://head:8265"],
        description="Empty: start Ray here; auto: join this machine's cluster; http://head:8265: submit Ray jobs.",
    )
    num_cpus: int = Field(0, ge=0, le=MAX_CPUS, description="Cores of a Ray that is started here; 0: all of them.")
    send_code: bool = Field(
        False,
        description="Whether jobs (http://...) bring the code of this installation along, so that the nodes need only "
        "its dependencies; otherwise they use the rcnn that is installed there, which must be the same.",
    )
    reconnect_minutes: float = Field(
        30.0,
        ge=0,
        le=MAX_MINUTES,
        description="How long a flow waits for a Ray head (http://...) that does not answer before it fails; 0: not at all.",
    )

    @model_validator(mode="after")
    def _address_is_free_of_secrets(self) -> Self:
        _require_no_credentials("address", self.address, "give Ray's token by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN")
        return self


class TrackingConfig(Section):
    """Where MLflow keeps runs and models."""

    uri: str = Field(
        "", max_length=MAX_PATH, description="MLflow tracking URI; empty: mlflow.db (SQLite) in the storage."
    )
    experiment: str = Field("", max_length=400, description="Experiment; empty: rcnn/ and the data set's name.")
    wait_minutes: float = Field(
        10.0,
        ge=0,
        le=MAX_MINUTES,
        description="How long `register` waits for an MLflow that is away, before it fails; nothing else waits.",
    )
    model_name: str = Field(
        "",
        pattern=r"^[^/:'\"]*$",  # MLflow takes no / or : here, and its searches no quotes
        max_length=200,
        examples=["rcnn-digits"],
        description="Registered model, without slashes, colons and quotes; empty: rcnn- and the data set's name.",
    )
    export: Literal["none", "pt2", "onnx", "all"] = Field(
        "none",
        description="What `register` stores in the training run besides the model: a torch.export archive, an ONNX file, or "
        "both, which takes 5 to 10 s.",
    )

    @field_validator("uri")
    @classmethod
    def _uri_is_sound(cls, uri: str) -> str:
        if re.match(r"[\w.-]+:\d+(/|$)", uri):  # MLflow would make a folder of this name
            raise ValueError(f"should be http://{uri}")
        return _sound_uri(uri)

    @model_validator(mode="after")
    def _uri_is_free_of_secrets(self) -> Self:
        instead = "give them by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and put a server in front of a database"
        _require_no_credentials("uri", self.uri, instead)
        return self


class PipelineConfig(Section):
    """The whole pipeline: data, model, training, tuning, evaluation, and where all that runs."""

    recipe: str = Field("custom", description="Name of the recipe that this config grew from.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of weights, shuffling, dropout and the search.")
    storage: str = Field(
        "storage",
        min_length=1,
        max_length=MAX_PATH,
        description="Folder or URI (s3://...) of data sets, runs and reports.",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = AugmentConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    audit: AuditConfig = AuditConfig()
    execution: ExecutionConfig = ExecutionConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()

    moved: ClassVar[Mapping[str, str]] = {
        f"train.{name}": f"{section}.{name}"
        for section, of in (("augment", AugmentConfig), ("execution", ExecutionConfig))
        for name in of.model_fields
    } | {
        "tune.k": "tune.space.model.k",
        "tune.t": "tune.space.model.t",
        "tune.learning_rate_min": "tune.space.train.learning_rate",
        "tune.learning_rate_max": "tune.space.train.learning_rate",
    }
    """Former names of settings: they are refused, with a pointer to the new one."""

    _storage_is_sound = field_validator("storage")(_sound_uri)

    @model_validator(mode="after")
    def _storage_is_free_of_secrets(self) -> Self:
        _require_no_credentials("storage", self.storage)
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        batch_size, num_workers, num_shares = self.train.batch_size, self.execution.num_workers, self.train.shares
        of_default = "" if self.train.num_shares else " (its default where train.deterministic is on)"
        parts_named = (
            f"train.num_shares = {num_shares}{of_default}" if num_shares else f"execution.num_workers = {num_workers}"
        )
        parts = num_shares or num_workers
        if batch_size % parts:
            raise ValueError(
                f"train.batch_size = {batch_size} does not divide by {parts_named}; "
                f"set train.batch_size to {parts * max(1, batch_size // parts)}"
            )
        per_trial = self.tune.workers_per_trial if self.tune.enabled else 1
        for name, count in (("execution.num_workers", num_workers), ("tune.workers_per_trial", per_trial)):
            if num_shares and count > num_shares:
                raise ValueError(
                    f"{name} = {count} is more than {parts_named}, and each worker needs a share; lower the one or raise "
                    f"the other"
                )
        if self.execution.min_workers and not num_shares:
            raise ValueError(
                f"execution.min_workers = {self.execution.min_workers} needs a result that does not depend on the number of "
                f"workers; set train.num_shares to {num_workers} or more"
            )
        return self

    @model_validator(mode="after")
    def _crops_have_a_size(self) -> Self:
        crops = [name for name in self.evaluate.views if name.endswith("crops")]
        if crops and not self.model.crop:
            raise ValueError(
                f"evaluate.views has {crops[0]!r}, and the network sees whole images (model.crop = 0); leave it out, or set "
                f"model.crop"
            )
        return self

    @model_validator(mode="after")
    def _members_are_whole(self) -> Self:
        if self.model.members > 1 and self.train.max_minutes:
            raise ValueError(
                f"train.max_minutes = {self.train.max_minutes:g} limits one training, and model.members = {self.model.members} "
                f"takes several; set train.max_minutes to 0"
            )
        return self

    @property
    def members(self) -> "list[PipelineConfig]":
        """The trainings of an ensemble; empty for one network."""
        seeds = range(self.seed, self.seed + self.model.members) if self.model.members > 1 else ()
        one = {"model.members": 1, "model.combine": "probabilities"}
        return [self.with_settings(one | {"seed": seed}) for seed in seeds]

    @model_validator(mode="after")
    def _steps_can_be_drawn(self) -> Self:
        if self.train.any_t and not (NETWORKS[self.model.network].shares_steps and self.model.t):
            those = " or ".join(name for name, network in NETWORKS.items() if network.shares_steps)
            raise ValueError(
                f"train.any_t draws the number of recurrent steps, and model.network = {self.model.network!r} with "
                f"model.t = {self.model.t} has none that share their weights; choose {those} with model.t of 1 or more, or "
                f"set train.any_t to false"
            )
        return self

    @model_validator(mode="after")
    def _network_reads_what_is_searched(self) -> Self:
        if self.tune.enabled and (fault := self.fault_of_space()):
            raise ValueError(f"{fault}, or set tune.enabled to false")
        return self

    def fault_of_space(self) -> str:
        """Why this network cannot be searched over `tune.space`, and what to do; empty where it can."""
        space = self.tune.space
        if not space:
            return "tune.space is empty; name a setting in it"
        networks: Any = space.get("model.network", (self.model.network,))
        for network in networks:
            unread = unread_settings(network, {name.removeprefix("model."): 0 for name in space})
            for name in unread:
                reads = ", ".join(each for each in NETWORKS[network].reads if each in ModelConfig.model_fields)
                return (
                    f"tune.space has model.{name}, which model.network = {network!r} does not read "
                    f"(it reads {reads or 'none of them'}); leave it out"
                )
        return ""

    def hash(self) -> str:
        """The first 12 hex digits of the SHA-256 of all settings that may shape a result.

        How and where things run and are kept (execution, storage, ray, tracking) does not count: moving a run does not
        rename it.
        """
        tree = self.model_dump(mode="json", exclude={"recipe", "storage", "execution", "ray", "tracking"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]

    def values_of(self, *names: str) -> dict[str, Any]:
        """The values of some settings by their dotted names: of sections, and of single ones; `-name` leaves one out."""
        flat: dict[str, Any] = {}
        for name, value in self.model_dump(mode="json").items():
            flat |= {f"{name}.{field}": of for field, of in value.items()} if isinstance(value, dict) else {name: value}
        wanted = {name for name in names if name[0] != "-"}
        return {
            name: value
            for name, value in flat.items()
            if (name in wanted or name.partition(".")[0] in wanted) and f"-{name}" not in names
        }

    def applicable(self, *names: str) -> dict[str, Any]:
        """As `values_of`, without those that have no effect: of other networks, sources and schedules, and empty ones."""
        values = self.values_of(*names, *(f"-{name}" for name in self._without_effect()))
        return {name: value for name, value in values.items() if value != ""}

    def _without_effect(self) -> Iterator[str]:
        yield from (f"model.{name}" for name in unread_settings(self.model.network, self.model.model_dump()))
        yield from (f"data.{name}" for name in unread_by(self.data.source))
        yield from (f"train.{name}" for name in _OF_SCHEDULES if not name.startswith(self.train.schedule))
        if self.train.optimizer != "muon":
            yield "train.kernel_rate"
        reads = NETWORKS[self.model.network].reads
        yield from (f"execution.{name}" for name in ("convolution", "recompute") if name not in reads)
        if self.tune.early_stopping != "asha":
            yield "tune.reduction_factor"
        if self.tune.early_stopping == "none":
            yield "tune.grace_epochs"
        if self.tune.seeds == 1:
            yield "tune.num_finalists"

    def value_of(self, name: str) -> Any:
        """The value of one setting by its dotted name."""
        return functools.reduce(getattr, name.split("."), self)

    def with_settings(self, settings: Mapping[str, Any]) -> "PipelineConfig":
        """A copy with dotted settings changed, e.g. `{"model.k": 64}`, and all bounds checked again."""
        return lay(self, [{name: Given(value, "settings") for name, value in settings.items()}])

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
        places = tuple(variable_of(name) for name in ("storage", "ray.", "tracking."))
        placing = {name: value for name, value in environ.items() if name.upper().startswith(places)}
        layer = environment_layer(PipelineConfig, placing)
        default = PipelineConfig()
        return lay(self, [{n: given for n, given in layer.items() if self.value_of(n) == default.value_of(n)}])
