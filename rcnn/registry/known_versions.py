"""Whether the registry still holds a version, answered without the seconds that importing MLflow takes.

In our own store (SQLite in the storage), the answer is one that `answers.py` keeps until the store is written to. After
a write (a run, a promotion, a version deleted in MLflow's UI), MLflow is asked once. A pipeline ends by asking, so a rerun
with nothing to do imports no MLflow.

An MLflow server answers over its REST API. Another database is not asked: MLflow tries to reach one that is away for an hour.
"""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from http import HTTPStatus

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError
from rcnn.registry.answers import versions_of
from rcnn.results import RegisterResult
from rcnn.storage import StageFolder
from rcnn.tracking import has_store


def has_version(config: PipelineConfig, registered: RegisterResult, target: StageFolder) -> bool:
    """Whether the registry still holds what the register stage put there: it may have been deleted, or the store exchanged.

    Also True if the server cannot be asked: it may want a login, and the next write will report that.
    """
    if config.tracking.uri.startswith("http"):
        return _is_on_server(config.tracking.uri, registered)
    if config.tracking.uri:
        return True
    if not has_store(config):
        return False
    try:
        return registered.version in versions_of(config, registered.model_name)
    except ClusterError:
        return False  # the store is damaged: the register stage will say how


def _is_on_server(uri: str, registered: RegisterResult) -> bool:
    query = urllib.parse.urlencode({"name": registered.model_name, "version": registered.version})
    try:
        # The server that the user set.
        urllib.request.urlopen(f"{uri}/api/2.0/mlflow/model-versions/get?{query}", timeout=10).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        return error.code != HTTPStatus.NOT_FOUND
    except (OSError, http.client.HTTPException):  # no server, or one that speaks something else
        return True
    return True
