"""What a look is: one comparison of a version with a champion, its price, and its verdict. MLflow keeps it, as tags.

A version has the tag `LOOK_TAG` with its looks. `mlflow_store.next_look` numbers the looks at a set of test rows, for all
models and processes.
"""

from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rcnn.evaluate.paired import Paired
from rcnn.registry.gate import CHAMPION, Standing, Verdict, level_of

LOOK_TAG = "rcnn.looks"
MOST_LOOKS_KEPT = 10
"""Of a version: a tag of MLflow holds 5,000 characters. The number of looks does not depend on them."""


class Look(BaseModel):
    """One comparison of a version with a champion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    test_digest: str
    champion: int
    """The version that was champion."""
    number: int
    """Which look at these test rows it was, from 1; 0: there was nothing to compare with, so nothing was spent."""
    num_rows: int = 0
    only_new: int = 0
    only_champion: int = 0
    alias: str
    reason: str

    @classmethod
    def without_test(cls, new: Standing, champion: int, verdict: Verdict) -> Self:
        """A version that nothing was compared with; it costs nothing."""
        return cls.of(new, champion, 0, Paired(0, 0, 0), verdict)

    @classmethod
    def of(cls, new: Standing, champion: int, number: int, paired: Paired, verdict: Verdict) -> Self:
        """A comparison with a champion."""
        return cls(
            test_digest=new.test_digest, champion=champion, number=number, num_rows=paired.num_rows,
            only_new=paired.only_first, only_champion=paired.only_second, alias=verdict.alias, reason=verdict.reason,
        )  # fmt: skip

    @property
    def level(self) -> float:
        """The p-value that it could have at most."""
        return level_of(self.number)

    @property
    def paired(self) -> Paired:
        """The counts that it was decided by."""
        return Paired(self.num_rows, self.only_new, self.only_champion)

    @property
    def verdict(self) -> Verdict:
        """What was decided."""
        return Verdict(self.alias, self.reason)

    @property
    def summary(self) -> str:
        """The verdict in a few words, for a table."""
        if not self.number:
            return "first" if self.alias == CHAMPION else "not comparable"
        word = "better" if self.alias == CHAMPION else "not shown better"
        return f"{word}: p = {self.paired.p_value:.2g}, needs {self.level:.2g} (look {self.number})"


_LOOKS = TypeAdapter(tuple[Look, ...])


def looks_of(tags: Mapping[str, str]) -> tuple[Look, ...]:
    """The looks in the tags of a version, the oldest first; none if somebody wrote other text there."""
    try:
        return _LOOKS.validate_json(tags.get(LOOK_TAG, "[]"))
    except ValidationError:
        return ()


def with_look(tags: Mapping[str, str], look: Look) -> dict[str, str]:
    """The tag that adds a look to those of a version."""
    kept = (*looks_of(tags), look)[-MOST_LOOKS_KEPT:]
    return {LOOK_TAG: _LOOKS.dump_json(kept).decode()}


def earlier_look(tags: Mapping[str, str], test_digest: str, champion: int) -> Look | None:
    """The look that a version had before, at these rows and beside this champion: asking again costs nothing.

    Where the champion had no predictions of these rows, it may have them by now: that was not a look.
    """
    same = [look for look in looks_of(tags) if (look.test_digest, look.champion) == (test_digest, champion)]
    found = [look for look in same if look.number or not champion]
    return found[-1] if found else None
