"""RCNN as a pipeline: ingest, tune, train, evaluate, register.

The names below are the public ones. They are imported when they are used: importing this package loads no torch, ray, mlflow or
prefect.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcnn.api import Model, load_model
    from rcnn.config import PipelineConfig
    from rcnn.errors import RcnnError
    from rcnn.model.layers import RecurrentConvLayer
    from rcnn.model.rcnn import RCNN
    from rcnn.recipes import resolve_config
    from rcnn.stages import run_pipeline_until

__version__ = "0.1.0"

_HOMES = {
    "Model": "rcnn.api",
    "PipelineConfig": "rcnn.config",
    "RCNN": "rcnn.model.rcnn",
    "RcnnError": "rcnn.errors",
    "RecurrentConvLayer": "rcnn.model.layers",
    "load_model": "rcnn.api",
    "resolve_config": "rcnn.recipes",
    "run_pipeline_until": "rcnn.stages",
}

__all__ = [
    "RCNN",
    "Model",
    "PipelineConfig",
    "RcnnError",
    "RecurrentConvLayer",
    "load_model",
    "resolve_config",
    "run_pipeline_until",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
