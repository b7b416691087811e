"""Two models on the same rows: who is right where the other is wrong, and whether that can be chance (McNemar's test).

The counts come from two files of predictions (see `predictions.compare`): a join, not a second evaluation.
"""

import math
from dataclasses import dataclass

from scipy.special import betainc

TWO_SIDED_95 = 1.959963984540054
"""The quantile of the normal distribution for an interval of 95 %."""


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
    def gain_interval(self) -> tuple[float, float]:
        """Of 95 %, for the gain: Wald's for matched pairs, with half a row added to each of the four cells of the table.

        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions" (2005).
        """
        first, second, num_rows = self.only_first + 0.5, self.only_second + 0.5, self.num_rows + 2
        centre = (first - second) / num_rows
        half = TWO_SIDED_95 * math.sqrt(first + second - (first - second) ** 2 / num_rows) / num_rows
        return centre - half, centre + half

    @property
    def p_value(self) -> float:
        """One-sided exact McNemar test of "the first model is not better".

        If both are equally good, each row that exactly one gets right is a fair coin: the p-value is P(X >= only_first) for
        X ~ Binomial(only_first + only_second, 1/2), which is a regularised incomplete beta function (McNemar 1947, the exact
        form).
        """
        return float(betainc(self.only_first, self.only_second + 1, 0.5)) if self.only_first else 1.0
