"""Decides whether a new model becomes the champion: a pure function of figures, at a level that pays for every earlier look.

Two questions are kept apart. Is the new model better? An exact, paired, one-sided McNemar test on the same test rows. And how
small must its p-value be? Asked often enough, any test says yes by chance: of models that are all equally good, about every
second one has fewer errors than a given champion. So the chance of *any* wrong promotion, over all models that are ever
compared on one set of test rows, is limited to `FALSE_PROMOTIONS`, and look number k spends the share
k^-1.6 / (1^-1.6 + 2^-1.6 + ...) of it. This is online alpha spending: by Bonferroni's inequality the limit holds for any number
of looks and any dependence between them (Tian and Ramdas, "Online control of the familywise error rate", Statistical Methods
in Medical Research, 2021). 1.6 favours late looks over 2, at little cost to the first.

The limit holds for models that were not fitted to the test rows. A yes or no for each look tells little about them; the
list of the rows that a model got wrong tells a lot, and no gate can price that.
"""

from dataclasses import dataclass

from scipy.special import zeta

from rcnn.evaluate.paired import Paired

CHAMPION, CHALLENGER = "champion", "challenger"
FALSE_PROMOTIONS = 0.05
"""Not a setting: whoever raises it after some looks has no guarantee any more."""
DECAY = 1.6


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


def level_of(look: int) -> float:
    """The p-value that look number `look` (from 1) at a set of test rows may have at most; all levels add up to 0.05."""
    return float(FALSE_PROMOTIONS * look**-DECAY / zeta(DECAY))


def judge(new: Standing, champion: int, paired: Paired, look: int) -> Verdict:
    """Promotes the new version if it is better on the same test rows, at the level of this look.

    Args:
        new: the new version.
        champion: the number of the version that it would replace.
        paired: the rows that only the new version, and only the champion, got right.
        look: which comparison on these test rows this is, from 1.
    """
    level, p_value = level_of(look), paired.p_value
    is_better = p_value <= level
    theirs = new.test_error + paired.gain  # on these rows
    figures = (
        f"{100 * new.test_error:.2f} % test error against {100 * theirs:.2f} % of version {champion}; {paired.only_first:,} of "
        f"{paired.num_rows:,} rows are right here and wrong there, {paired.only_second:,} the other way round: "
        f"p = {p_value:.2g} (look {look} at these rows needs {level:.2g} or less)"
    )
    if is_better:
        return Verdict(CHAMPION, f"better: {figures}")
    kind = "not better" if paired.gain <= 0 else "not shown to be better"
    return Verdict(CHALLENGER, f"{kind}: {figures}{_what_is_missing(paired, level)}")


def _what_is_missing(paired: Paired, level: float) -> str:
    """How many rows more it would have had to win, of those that the two answer differently."""
    num_different = paired.only_first + paired.only_second
    if paired.gain <= 0 or not num_different:
        return ""
    for won in range(paired.only_first + 1, num_different + 1):
        if Paired(paired.num_rows, won, num_different - won).p_value <= level:
            return f"; {won} to {num_different - won} would have been enough"
    return ""


def not_comparable(new: Standing, champion: Standing) -> Verdict:
    """The verdict where the registry does not have the champion's predictions of the test rows."""
    return Verdict(
        CHALLENGER,
        f"champion version {champion.version} has no predictions of these test rows ({new.test_digest[:8]}; its own: "
        f"{champion.test_digest[:8]}), so the two cannot be compared; if it is to be champion nevertheless: "
        f"`rcnn registry promote {new.version} --reason ...`",
    )
