"""The deployment of Ray Serve: one image file a request, batched across requests."""

import asyncio
import io
from collections.abc import Callable, Mapping
from typing import Any

from rcnn.ray_session import ensure_ray  # isort: skip  (sets what Ray reads)

import numpy as np
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from rcnn.config import PipelineConfig
from rcnn.data.sources.decode import BadImage, decode_image, unwarned
from rcnn.errors import ClusterError
from rcnn.evaluate.predict import Predictor, answer_of
from rcnn.storage import Storage

MAX_BATCH, SECONDS_TO_FILL_A_BATCH = 64, 0.01
MAX_WAITING = 1024  # requests of a replica; later ones are answered 503


class Classifier:
    """A replica: the model, and the batch that is being filled."""

    def __init__(self, model_files: Mapping[str, bytes]):
        torch.set_num_threads(1)
        self._predictor = Predictor.of_files(model_files)

    async def __call__(self, request: Request) -> JSONResponse:
        """200 with the answer about an image file, or 400 with the reason why it cannot be read."""
        try:
            image_HWC = await asyncio.to_thread(self._decoded, await request.body())
        except BadImage as error:
            return JSONResponse({"error": f"the image {error}"}, status_code=400)
        return JSONResponse(await self.answer(image_HWC))

    def _decoded(self, content: bytes) -> np.ndarray:
        with unwarned():
            return decode_image(io.BytesIO(content), self._predictor.rule)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=SECONDS_TO_FILL_A_BATCH)
    async def answer(self, images_HWC: list[np.ndarray]) -> list[dict[str, Any]]:
        """The answers about the images of some requests; Ray Serve calls it with lists, and callers give one image each."""
        shares_NC = await asyncio.to_thread(self._predictor.probabilities, np.stack(images_HWC))
        return [answer_of(self._predictor.description["classes"], shares.tolist()) for shares in shares_NC]


def start(
    config: PipelineConfig, model_files: Mapping[str, bytes], *, host: str, port: int, num_replicas: int
) -> Callable[[], None]:
    """Starts the server, and returns when it answers.

    Args:
        config: says where Ray runs.
        model_files: the content of the model's folder, by file name.
        host: the address to listen on.
        port: the port to listen on.
        num_replicas: processes, with a core each.

    Returns:
        A function that stops it.

    Raises:
        ClusterError: Ray cannot be reached, or the port is taken.
    """
    ensure_ray(config, Storage(config.storage))
    deployment = serve.deployment(
        Classifier,
        num_replicas=num_replicas,
        max_ongoing_requests=MAX_WAITING,
        ray_actor_options={"num_cpus": 1},
    )
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(deployment.bind(dict(model_files)), name="rcnn", route_prefix="/")
    except Exception as error:  # Ray Serve raises what its processes raised
        serve.shutdown()
        raise ClusterError(
            f"Ray Serve cannot be started ({' '.join(str(error).split())[:300]})",
            where=f"{host}:{port}",
            remedy="Free the port or give another one, and check that there is a core for each replica",
        ) from error
    return serve.shutdown  # type: ignore[no-any-return]
