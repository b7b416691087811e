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

BY_HAND = "by hand: "


def promote(config: PipelineConfig, version: int, reason: str) -> None:
    """Makes a version the champion without a test; the reason stays with the version.

    Raises:
        ConfigError: the model has no such version, or it already is the champion.
    """
    _require_version(config, version)
    champion = mlflow_store.champion_of(config)
    if champion is not None and champion.version == version:
        raise ConfigError(f"version {version} already is the champion", where=model_name(config))
    _make_champion(config, version, champion.version if champion else None, f"{BY_HAND}{reason}")


def roll_back(config: PipelineConfig, reason: str) -> tuple[int, int]:
    """Makes the version champion again that the current one replaced; returns the old champion and the new one.

    Raises:
        ConfigError: there is no champion, or none before it.
    """
    champion = mlflow_store.champion_of(config)
    if champion is None:
        raise ConfigError("there is no champion to roll back from", where=model_name(config))
    versions = mlflow_store.tags_of_versions(config)
    before = versions[champion.version].get(mlflow_store.BEFORE_TAG, "")
    if not before.isdecimal() or int(before) not in versions:
        what = f"version {before}, which it replaced, was deleted" if before else "it replaced no other version"
        raise ConfigError(
            f"cannot return from version {champion.version}: {what}",
            where=model_name(config),
            remedy="`rcnn registry promote VERSION --reason ...` promotes any version",
        )
    # The version that is returned to keeps what it replaced itself, so that rolling back twice goes back two steps.
    tags = {mlflow_store.REASON_TAG: f"{BY_HAND}rolled back from version {champion.version}: {reason}"}
    mlflow_store.tag_version(config, int(before), tags)
    mlflow_store.set_alias(config, CHAMPION, int(before))
    return champion.version, int(before)


def standing_of(tags: Mapping[str, str]) -> str:
    """The newest verdict about a version in a few words; that of a person comes first."""
    reason, looks = tags.get(mlflow_store.REASON_TAG, ""), looks_of(tags)
    if reason.startswith(BY_HAND):
        return reason
    return looks[-1].summary if looks else ""


def _make_champion(config: PipelineConfig, version: int, before: int | None, reason: str) -> None:
    with mlflow_store.promotion(config, version, before=before, reason=reason):
        mlflow_store.set_alias(config, CHAMPION, version)


def explain(config: PipelineConfig, version: int) -> Iterator[str]:
    """Why a version is the champion, or why not: a line at a time.

    Raises:
        ConfigError: the model has no such version.
    """
    tags = _require_version(config, version)
    looks = looks_of(tags)
    found = mlflow_store.find_version(config, f"{model_name(config)}/{version}")
    yield str(found)
    for look in looks:
        yield from _explain_look(config, version, look)
    if not looks:
        yield "  it was registered by other means, or before verdicts were kept: it was not compared with a champion"
    for label, tag in (
        ("network", "network"),
        ("config", "config_hash"),
        ("data set", "data_digest"),
        ("commit", "git_commit"),
    ):
        if tags.get(tag):
            yield f"  {label}: {tags[tag]}"
    if reason := tags.get(mlflow_store.REASON_TAG, ""):
        yield f"  promoted {reason}" if reason.startswith(BY_HAND) else f"  promoted because {reason}"


def _explain_look(config: PipelineConfig, version: int, look: Look) -> Iterator[str]:
    yield f"  verdict: {look.alias}; {look.reason}"
    if not look.number:
        return
    known = mlflow_store.num_looks(config, look.test_digest)
    spent = sum(level_of(number) for number in range(1, known + 1))
    yield (
        f"  the test: exact one-sided McNemar on {look.num_rows:,} rows; p = {look.paired.p_value:.3g}, look {look.number} may "
        f"have {look.level:.3g} at most"
    )
    yield (
        f"  the budget of these rows ({look.test_digest[:8]}): {counted(known, 'look')}, {spent:.4f} of {FALSE_PROMOTIONS:g} "
        f"spent; the next look asks for {level_of(known + 1):.2g}"
    )


def _require_version(config: PipelineConfig, version: int) -> dict[str, str]:
    """The tags of a version."""
    versions = mlflow_store.tags_of_versions(config)
    if version not in versions:
        raise ConfigError(
            f"{model_name(config)} has no version {version}",
            where="VERSION",
            remedy="`rcnn registry` lists them",
        )
    return versions[version]
