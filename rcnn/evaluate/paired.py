"""Two models on the same rows: who is right where the other is wrong, and whether that can be chance (McNemar's test).

The counts come from two files of predictions (see `predictions.compare`): a join, not a second evaluation.
"""

from dataclasses import dataclass

from scipy.special import betainc


@dataclass(frozen=True)
class Paired:
    """Counts over the rows that two models answered.

    Attributes:
        num_rows: all of them.
        only_first: rows that the first model alone got right.
        only_second: rows that the second model alone got right.
    """

    num_rows: int
    only_first: int
    only_second: int

    @property
    def gain(self) -> float:
        """How much lower the first model's error is, as a share of the rows."""
        return (self.only_first - self.only_second) / self.num_rows

    @property
    def p_value(self) -> float:
        """One-sided exact McNemar test of "the first model is not better".

        If both are equally good, each row that exactly one gets right is a fair coin: the p-value is P(X >= only_first) for
        X ~ Binomial(only_first + only_second, 1/2), which is a regularised incomplete beta function (McNemar 1947, the exact
        form).
        """
        return float(betainc(self.only_first, self.only_second + 1, 0.5)) if self.only_first else 1.0
