"""The ledger of a registered model: every look at its test rows, and what it cost. MLflow keeps it, as tags.

Each version has the tag `LOOK_TAG` with its looks, one for each set of test rows and champion that it was compared with. The
registered model itself has a tag for each set of test rows with the number of looks so far, which survives the deletion of
versions in MLflow's UI.

MLflow has no write that fails if another one came first, so the number of a look must not rest on a counter that two processes
may read at once. Version numbers do not have that problem: MLflow gives each one out once. The number of a look is at least
the rank of its version among those with the same test rows, and ranks differ: the levels still add up to no more than 0.05.
"""

from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rcnn.evaluate.paired import Paired
from rcnn.registry.gate import CHAMPION, Standing, Verdict, level_of

LOOK_TAG = "rcnn.looks"
TEST_DIGEST_TAG = "test_digest"
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
    """The looks in the tags of a version, the oldest first; of tags that somebody wrote by hand, none."""
    try:
        return _LOOKS.validate_json(tags.get(LOOK_TAG, "[]"))
    except ValidationError:
        return ()


def with_look(tags: Mapping[str, str], look: Look) -> dict[str, str]:
    """The tag that adds a look to those of a version."""
    kept = (*looks_of(tags), look)[-MOST_LOOKS_KEPT:]
    return {LOOK_TAG: _LOOKS.dump_json(kept).decode()}


def earlier_look(tags: Mapping[str, str], test_digest: str, champion: int) -> Look | None:
    """The look that a version had before, at these rows and beside this champion: asking again costs nothing."""
    found = [look for look in looks_of(tags) if (look.test_digest, look.champion) == (test_digest, champion)]
    return found[-1] if found else None


def number_of_look(version: int, test_digest: str, versions: Mapping[int, Mapping[str, str]], num_known: int) -> int:
    """Which look at these rows a version has next, from 1.

    Args:
        version: the version that is compared with the champion.
        test_digest: names the test rows.
        versions: the tags of all versions of the model, by number.
        num_known: looks at these rows that the registered model remembers.
    """
    rank = 1 + sum(_asks(tags, test_digest) for number, tags in versions.items() if number < version)
    noted = [look.number for tags in versions.values() for look in looks_of(tags) if look.test_digest == test_digest]
    return max(rank, 1 + max(noted, default=0), 1 + num_known)


def _asks(tags: Mapping[str, str], test_digest: str) -> bool:
    """Whether a version has had a look at these rows, or may be having one: only a noted look can cost nothing."""
    looks = [look for look in looks_of(tags) if look.test_digest == test_digest]
    return any(look.number for look in looks) if looks else tags.get(TEST_DIGEST_TAG) == test_digest
