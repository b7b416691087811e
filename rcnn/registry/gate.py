"""Decides whether a new model becomes the champion: a pure function of figures from the registry."""

from dataclasses import dataclass

CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class Standing:
    """The figures of a model version in the registry."""

    version: int
    test_error: float
    test_digest: str


@dataclass(frozen=True)
class Verdict:
    """The alias of the new version, and the reason."""

    alias: str
    reason: str


def judge(new: Standing, champion: Standing | None) -> Verdict:
    """Promotes the new version only if its test error is strictly lower on the same test rows."""
    if champion is None:
        return Verdict(CHAMPION, "there was no champion")
    if champion.version == new.version:
        return Verdict(CHAMPION, "it already is the champion")
    if champion.test_digest != new.test_digest:
        return Verdict(
            CHALLENGER,
            f"champion version {champion.version} was evaluated on other test rows "
            f"({champion.test_digest[:8]}, not {new.test_digest[:8]}), so the two cannot be compared",
        )
    figures = f"{100 * new.test_error:.2f} % test error against {100 * champion.test_error:.2f} % (version {champion.version})"
    if new.test_error < champion.test_error:
        return Verdict(CHAMPION, f"better: {figures}")
    return Verdict(CHALLENGER, f"not better: {figures}")
