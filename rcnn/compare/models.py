"""The trained models of a storage, with the figures of their evaluations.

In: the results that the stages left (`_result.json`, `_made_of.json`). They are there whether MLflow answers or not, and are
read faster than MLflow is imported.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rcnn.model.networks import title_of
from rcnn.storage import MADE_OF, RESULT, Storage

TRAIN, EVALUATE, INGEST = "train-", "evaluate-", "datasets"
NUM_READERS = 16  # on S3 each file is a request


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        name: of its folder, `train-4502709c7e72`.
        settings: those that it depends on, by dotted name.
        code: digests of the modules that made it.
        environment: commit, versions of torch and Python, and processor; empty for models of an older rcnn.
        data_digest: identity of its data set.
        data_set: the data set's name; empty where it is not in the storage any more.
        trained: the result of the train stage.
        evaluations: results of evaluate stages, by test digest.
        changed: when it was finished, in seconds since 1970.
    """

    name: str
    settings: Mapping[str, Any]
    code: Mapping[str, str]
    environment: Mapping[str, str]
    data_digest: str
    data_set: str
    trained: Mapping[str, Any]
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    changed: float = 0.0

    @property
    def title(self) -> str:
        """`RCNN-96, T = 3`."""
        of_model = {name.removeprefix("model."): value for name, value in self.settings.items() if "model." in name}
        return title_of(self.settings.get("model.network", "rcnn"), of_model)

    @property
    def weights_sha256(self) -> str:
        """Identity of its weights."""
        return str(self.trained.get("weights_sha256", ""))

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """The evaluation on its own data set's test rows, or the only one; empty where there is none."""
        return next(iter(self.evaluations.values()), {})

    @property
    def test_error(self) -> float | None:
        """A share; None where it was not evaluated."""
        error = self.evaluation.get("metrics", {}).get("error")
        return None if error is None else float(error)

    @property
    def test_digest(self) -> str:
        """Identity of the test rows; empty where it was not evaluated."""
        return str(self.evaluation.get("test_digest", ""))

    @property
    def group(self) -> tuple[Any, ...]:
        """Equal for models that differ in their seed alone."""
        settings = tuple((name, str(value)) for name, value in sorted(self.settings.items()) if name != "seed")
        return settings, self.data_digest, self.test_digest, tuple(sorted(self.code.items()))


def models_of(storage: Storage) -> list[Model]:
    """All finished trainings, the newest first.

    Raises:
        ConfigError: the storage is missing.
        ClusterError: it cannot be read.
    """
    storage.require_readable()
    folders = [f"runs/{name}" for name in storage.list_folders("runs") if name.startswith(TRAIN)]
    reports = [f"reports/{name}" for name in storage.list_folders("reports") if name.startswith(EVALUATE)]
    sets = [f"{INGEST}/{name}" for name in storage.list_folders(INGEST)]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        trainings = list(pool.map(lambda folder: _read(storage, folder), folders))
        evaluations = [each for each in pool.map(lambda folder: _read(storage, folder), reports) if each]
        data_sets = [each for each in pool.map(lambda folder: _read(storage, folder), sets) if each]
    titles = {each.result.get("digest", ""): _data_name(each) for each in data_sets}
    found = [_model(each, evaluations, titles) for each in trainings if each]
    return sorted(found, key=lambda model: -model.changed)


@dataclass(frozen=True)
class _Read:
    folder: str
    result: Mapping[str, Any]
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]
    code: Mapping[str, str]
    environment: Mapping[str, str]
    changed: float


def _read(storage: Storage, folder: str) -> _Read | None:
    """What a stage left; None where it has not finished, or what it left is damaged."""
    try:
        result, made = storage.read_json(f"{folder}/{RESULT}"), storage.read_json(f"{folder}/{MADE_OF}")
        if result is None or made is None:
            return None
        inputs = tuple(map(str, made["inputs"]))
        [info] = storage.filesystem.get_file_info([storage.path(f"{folder}/{RESULT}")])
        changed = info.mtime.timestamp() if info.mtime else 0.0
        return _Read(folder, result, made["settings"], inputs, made["code"], made.get("environment", {}), changed)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _data_name(data_set: _Read) -> str:
    """The folder's name without its key."""
    return data_set.folder.rpartition("/")[2].rpartition("-")[0]


def _model(read: _Read, evaluations: list[_Read], titles: Mapping[str, str]) -> Model:
    weights = read.result.get("weights_sha256", "")
    of_model = {each.inputs[1]: each.result for each in evaluations if each.inputs[:1] == (weights,)}
    return Model(
        name=read.folder.rpartition("/")[2],
        settings=read.settings,
        code=read.code,
        environment=read.environment,
        data_digest=read.inputs[0],
        data_set=titles.get(read.inputs[0], ""),
        trained=read.result,
        evaluations=of_model,
        changed=read.changed,
    )


def modules_that_differ(ours: Model, theirs: Model) -> Iterator[str]:
    """Modules whose code differs, or that only one of the models used."""
    for name in sorted(ours.code.keys() | theirs.code.keys()):
        if ours.code.get(name) != theirs.code.get(name):
            yield name
