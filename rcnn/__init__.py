"""RCNN as a pipeline: ingest, tune, train, evaluate, register.

Importing this package loads no torch, ray, mlflow or prefect: a heavy import belongs to the stage that needs it.
"""

__version__ = "0.1.0"
