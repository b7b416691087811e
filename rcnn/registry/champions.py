"""What people do with the versions of a model: read a verdict, promote one by hand, return to the champion before.

Each function takes a config that names the model (`tracking.model_name`).
"""

from collections.abc import Iterator, Mapping

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.registry import mlflow_store
from rcnn.registry.gate import CHAMPION, FALSE_PROMOTIONS, level_of
from rcnn.registry.ledger import Look, looks_of
from rcnn.text import counted
from rcnn.tracking import model_name

PROMOTED, ROLLED_BACK = "promoted by hand: ", "rolled back by hand: "


def promote(config: PipelineConfig, version: int, reason: str) -> None:
    """Makes a version the champion without a test; the reason stays with the version.

    Raises:
        ConfigError: the model has no such version, or it already is the champion.
    """
    tags_of(config, version)
    champion = mlflow_store.champion_of(config)
    if champion is not None and champion.version == version:
        raise ConfigError(f"version {version} already is the champion", where=model_name(config))
    _note(config, version, f"{PROMOTED}{reason}")
    with mlflow_store.promotion(config, version):
        mlflow_store.set_alias(config, CHAMPION, version)
    mlflow_store.note_champions(config, [*mlflow_store.champions_so_far(config), version])


def roll_back(config: PipelineConfig, reason: str) -> tuple[int, int]:
    """Makes the version champion again that was it before the current one; returns the old champion and the new one.

    Raises:
        ConfigError: there is no champion, or none before it.
    """
    champion = mlflow_store.champion_of(config)
    if champion is None:
        raise ConfigError("there is no champion to roll back from", where=model_name(config))
    kept = mlflow_store.champions_so_far(config)
    there = mlflow_store.version_numbers(config, model_name(config))
    while kept and (kept[-1] == champion.version or kept[-1] not in there):
        kept.pop()
    if not kept:
        raise ConfigError(
            f"version {champion.version} has no champion before it that still exists",
            where=model_name(config),
            remedy="`rcnn registry promote VERSION --reason ...` promotes any version",
        )
    _note(config, champion.version, f"{ROLLED_BACK}{reason}")
    mlflow_store.set_alias(config, CHAMPION, kept[-1])
    mlflow_store.note_champions(config, kept)
    return champion.version, kept[-1]


def _note(config: PipelineConfig, version: int, decision: str) -> None:
    mlflow_store.tag_version(config, version, {mlflow_store.BY_HAND_TAG: decision[: mlflow_store.MAX_REASON]})


def standing_of(tags: Mapping[str, str]) -> str:
    """In a few words, what a person decided about a version, or else the newest verdict."""
    looks = looks_of(tags)
    return tags.get(mlflow_store.BY_HAND_TAG) or (looks[-1].summary if looks else "")


def explain(config: PipelineConfig, version: int) -> Iterator[str]:
    """Why a version is the champion, or why not: a line at a time.

    Raises:
        ConfigError: the model has no such version.
    """
    tags = tags_of(config, version)
    looks = looks_of(tags)
    yield str(mlflow_store.find_version(config, f"{model_name(config)}/{version}"))
    for look in looks:
        yield from _explain_look(config, look)
    if not looks:
        yield "  it was not compared with a champion: it was registered by other means, or before verdicts were kept"
    if decision := tags.get(mlflow_store.BY_HAND_TAG):
        yield f"  {decision}"
    labels = {"network": "network", "config_hash": "config", "data_digest": "data set", "git_commit": "commit"}
    for tag, label in labels.items():
        if tags.get(tag):
            yield f"  {label}: {tags[tag]}"


def _explain_look(config: PipelineConfig, look: Look) -> Iterator[str]:
    yield f"  verdict: {look.alias}. {look.reason}"
    if not look.number:
        return
    num_looks = mlflow_store.num_looks(config, look.test_digest)
    spent = sum(level_of(number) for number in range(1, num_looks + 1))
    p_value = f"p = {look.paired.p_value:.3g}, needed {look.level:.3g}"
    yield f"  test: exact one-sided McNemar test on {look.num_rows:,} rows, {p_value}"
    yield (
        f"  budget of these test rows ({look.test_digest[:8]}): {counted(num_looks, 'look')}, {spent:.4f} of "
        f"{FALSE_PROMOTIONS:g} spent; the next look needs p = {level_of(num_looks + 1):.2g} or less"
    )


def tags_of(config: PipelineConfig, version: int) -> dict[str, str]:
    """The tags of a version.

    Raises:
        ConfigError: the model has no such version.
    """
    versions = mlflow_store.tags_of_versions(config)
    if version not in versions:
        raise ConfigError(
            f"{model_name(config)} has no version {version}", where="VERSION", remedy="`rcnn registry` lists them"
        )
    return versions[version]
