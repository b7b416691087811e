"""The networks, in plain torch: nothing here depends on the config, on files or on clusters.

The names below are imported lazily, so that `rcnn.model.networks`, the table, can be imported without torch. They are for
users and tests. Modules of this package import from the defining module instead, because `rcnn.keys` finds what a result
depends on by reading import statements.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcnn.model.build import Cost, build_network, cost_of, count_multiply_adds, count_parameters
    from rcnn.model.classifier import Classifier, MeanRemoval
    from rcnn.model.layers import RecurrentConvLayer
    from rcnn.model.lrn import LocalResponseNorm
    from rcnn.model.rcnn import RCNN

_HOMES = {
    "RCNN": "rcnn",
    "Classifier": "classifier",
    "Cost": "build",
    "LocalResponseNorm": "lrn",
    "MeanRemoval": "classifier",
    "RecurrentConvLayer": "layers",
    "build_network": "build",
    "cost_of": "build",
    "count_multiply_adds": "build",
    "count_parameters": "build",
}

__all__ = [
    "RCNN",
    "Classifier",
    "Cost",
    "LocalResponseNorm",
    "MeanRemoval",
    "RecurrentConvLayer",
    "build_network",
    "cost_of",
    "count_multiply_adds",
    "count_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
