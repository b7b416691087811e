"""Errors cross processes: a Ray job leaves its error in a file, and the flow raises it again by its name."""

import pickle
import pkgutil
from collections.abc import Iterator
from importlib import import_module

import pytest

import rcnn
from rcnn import errors
from rcnn.errors import Diverged, LeaseLost, RcnnError


def kinds_of(kind: type[RcnnError]) -> Iterator[type[RcnnError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from kinds_of(each)


@pytest.mark.long
def test_every_kind_of_error_has_its_home_in_one_file() -> None:
    for module in pkgutil.walk_packages(rcnn.__path__, "rcnn."):
        import_module(module.name)
    strangers = [kind.__name__ for kind in kinds_of(RcnnError) if getattr(errors, kind.__name__, None) is not kind]
    assert strangers == []


@pytest.mark.parametrize("kind", [RcnnError, Diverged, LeaseLost])
def test_an_error_keeps_its_parts_in_another_process(kind: type[RcnnError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", where="where", remedy="remedy", retryable=True)))
    assert type(error) is kind
    assert (error.what, error.where, error.remedy, error.retryable) == ("what", "where", "remedy", True)
