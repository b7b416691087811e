"""The deployments of the pipeline: the flow "rcnn" with parameters that a form can offer.

In: the name of a recipe, settings on top of it, and the stages to run. Out: the result of each stage, as JSON. Where things run
and are kept, the worker's RCNN_... variables say.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from prefect import flow
from prefect.runtime import flow_run

from flows.full_pipeline import run_pipeline, title_of
from flows.jobs import stop_jobs
from flows.notify import hooks
from rcnn.config import PipelineConfig
from rcnn.recipes import DEFAULT_RECIPE, RECIPES, resolve_config
from rcnn.settings import build_config
from rcnn.stages import STAGES

if TYPE_CHECKING:
    RecipeName = str
    StageName = str
    AnyStage = str
else:  # so that the form of the Prefect UI lists them
    RecipeName = Literal[tuple(RECIPES)]
    StageName = Literal[tuple(STAGES)]
    AnyStage = Literal[("none", *STAGES)]
LAST = list(STAGES)[-1]


def config_of(given: Mapping[str, Any]) -> PipelineConfig:
    """The config that a flow run's parameters describe.

    Raises:
        ConfigError: an unknown recipe or setting, or a value out of bounds.
    """
    settings: Sequence[str] = given.get("settings") or []
    if given.get("config") is None:
        config = resolve_config(given.get("recipe") or DEFAULT_RECIPE, environ={}, overrides=settings)
    else:
        config = build_config(PipelineConfig.model_validate(given["config"]), environ={}, overrides=settings)
    return config.placed_by(os.environ)


def stop_jobs_of_deployed(flow: Any, flow_run: Any, state: Any) -> None:
    """As `stop_jobs_of`, for these parameters (a hook of the flow)."""
    config = config_of(flow_run.parameters)
    if config.ray.address.startswith("http"):
        stop_jobs(config, str(flow_run.id))


def _name_of_run() -> str:
    """What the Prefect UI calls a run."""
    given: Mapping[str, Any] = flow_run.parameters
    last = given.get("last") or LAST
    return title_of(config_of(given)) + ("" if last == LAST else f" {last}")


@flow(name="rcnn", flow_run_name=_name_of_run, **hooks(stop_jobs_of_deployed))
def pipeline(
    recipe: RecipeName = DEFAULT_RECIPE,
    settings: list[str] = [],  # noqa: B006  (Prefect's form wants a list)
    last: StageName = LAST,
    fresh_from: AnyStage = "none",
    stop_running: bool = False,
    config: PipelineConfig | None = None,
) -> dict[str, Any]:
    """Runs the stages up to one of them; what was run before with the same settings, data and code is not run again.

    Args:
        recipe: The named config to start from; `rcnn recipes` says what each costs and reaches.
        settings: Settings on top of it, such as train.epochs=3, one in each item.
        last: The stage to end with.
        fresh_from: This stage and those after it are done again, although their results are there.
        stop_running: With fresh_from, stops Ray jobs that work on the same results; otherwise they are a reason to refuse.
        config: Every setting, instead of a recipe.
    """
    given = {"recipe": recipe, "settings": settings, "config": config}
    return run_pipeline(
        config_of(given), last=last, fresh_from="" if fresh_from == "none" else fresh_from, stop_running=stop_running
    )
