"""`TorchTrainer`, without the helper processes that have nothing to do in this project.

In: a function and what `TorchTrainer` takes. Out: a trainer. Ray Train 2.60 starts five processes besides the workers, mostly
one after another, and each takes 3 to 6 s of processor time to import Ray. Three of them have no use here and a fourth
needs no torch; there is no setting for it, so a subclass leaves them out. It overrides private methods: look here first when
the pinned version of Ray changes.
"""

from typing import Any

from rcnn import ray_session  # noqa: F401  (sets what Ray reads when it is imported)  # isort: skip

import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class WorkersTrainer(DataParallelTrainer):
    """Runs a function on each of `scaling_config.num_workers` workers.

    Left out everywhere: the manager of Ray Data's data sets, since none is passed; and for one worker on a CPU the torch
    process group, for which the controller would import torch. Left out where Ray is our own (`is_own_ray`):

    - the coordinator that asks the cluster's autoscaler for nodes, since there is none;
    - the cleaner that frees the workers' cores if the controller is killed, since the driver then ends, and Ray with it.
    """

    def __init__(
        self,
        function: Any,
        *,
        settings: dict[str, Any],
        scaling_config: ScalingConfig,
        is_own_ray: bool,
        **options: Any,
    ):
        backend_config = None
        if scaling_config.num_workers > 1 or scaling_config.use_gpu:
            from rcnn.train.rendezvous import GroupConfig  # imports torch, and the controller imports this module

            backend_config = GroupConfig()
        super().__init__(
            function,
            train_loop_config=settings,
            scaling_config=scaling_config,
            backend_config=backend_config,
            **options,
        )
        self._is_own_ray = is_own_ray

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback) if self._is_own_ray else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if not self._is_own_ray:
            return super()._initialize_and_run_controller(**arguments)
        # As above, but without a runtime environment: all processes of our own Ray have the driver's variables. A process that
        # gets its own set imports Ray twice, and cannot be one of those that Ray started ahead.
        arguments["scaling_policy"] = _NoAutoscaler(self.scaling_config)
        controller = ray.remote(num_cpus=0)(TrainController).remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Ctrl-C to the driver, which asks for a checkpoint first; Ray's own handler would exit with 0."""


class _NoAutoscaler(FixedScalingPolicy):
    """Starts the workers without registering them with the cluster's autoscaler."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Registers nothing."""

    def _maybe_send_resource_request(self) -> None:
        pass
