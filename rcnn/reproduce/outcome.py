"""What the seeds of an experiment gave, beside the published error.

In: test errors, one per seed. Out: mean, spread, the difference from the paper with an interval, and a verdict.
"""

import math
import statistics
from dataclasses import dataclass

from scipy.stats import t as student_t

from rcnn.evaluate.paired import TWO_SIDED_95

NOT_RUN, NOT_COMPARABLE, REPRODUCED, BETTER, WORSE = "not run", "not comparable", "reproduced", "better", "worse"
UNPUBLISHED = "not published"


@dataclass(frozen=True)
class Outcome:
    """An experiment with its seeds.

    Attributes:
        errors: test errors of the seeds that were run, as shares.
        num_rows: test rows.
        published: the paper's error, as a share; None where there is none.
        is_comparable: whether the same was trained.
    """

    errors: tuple[float, ...]
    num_rows: int = 0
    published: float | None = None
    is_comparable: bool = True

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.fmean(self.errors) if self.errors else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for fewer than two."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def difference(self) -> float | None:
        """Our mean minus the published error."""
        return None if self.mean is None or self.published is None else self.mean - self.published

    @property
    def half_width(self) -> float:
        """Half the 95 % interval of the difference.

        The published error is taken for one more run, with the spread of ours (no spread is published): a prediction interval,
        Student's t with n - 1 degrees of freedom times s sqrt(1 + 1/n). One seed has no spread: then, as a bound, that of two
        models that are right or wrong independently on each row.
        """
        assert self.errors, "nothing was run"
        num, share = len(self.errors), statistics.fmean(self.errors)
        if self.spread is None:
            return TWO_SIDED_95 * math.sqrt(2 * share * (1 - share) / self.num_rows)
        return float(student_t.ppf(0.975, num - 1)) * self.spread * math.sqrt(1 + 1 / num)

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if not self.errors:
            return NOT_RUN
        if self.published is None:
            return UNPUBLISHED
        if not self.is_comparable:
            return NOT_COMPARABLE
        assert self.difference is not None
        # Published errors have two decimals of a per cent: half a unit of the last one is no difference.
        if abs(self.difference) <= self.half_width + 0.501e-4:
            return REPRODUCED
        return WORSE if self.difference > 0 else BETTER
