"""The deployments' parameters, and the form that the Prefect UI draws from them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from flows.deployed import config_of, pipeline
from rcnn.errors import ConfigError
from rcnn.recipes import RECIPES, debug_tiny
from rcnn.stages import STAGES

pytestmark = pytest.mark.long  # imports Prefect

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def flow_of(deployment: dict[str, Any]) -> Any:
    file, name = deployment["entrypoint"].split(":")
    return getattr(import_module(file.removesuffix(".py").replace("/", ".")), name)


def descriptions_in(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["description"]] if isinstance(schema.get("description"), str) else []
        return own + [text for value in schema.values() for text in descriptions_in(value)]
    return [text for each in schema for text in descriptions_in(each)] if isinstance(schema, list) else []


def test_every_stage_and_every_flow_is_deployed() -> None:
    names = {deployment["name"] for deployment in DEPLOYMENTS}
    assert names == {"full-pipeline", "reproduce", "batch-predict", *STAGES}
    for deployment in DEPLOYMENTS:
        assert deployment["parameters"].get("last", deployment["name"]) == deployment["name"]
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        assert set(deployment["parameters"]) <= set(parameter_schema(flow_of(deployment)).properties)
        assert flow_of(deployment).name == "rcnn"
        assert not any(schedule["active"] for schedule in deployment.get("schedules", []))


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_no_description_of_a_form_is_taken_for_html(deployment: dict[str, Any]) -> None:
    texts = descriptions_in(parameter_schema(flow_of(deployment)).model_dump())
    assert texts
    assert [text for text in texts if "<" in text] == []


def test_the_form_offers_recipes_and_stages_by_name_and_every_setting_last() -> None:
    fields = parameter_schema(pipeline).properties
    assert sorted(fields, key=lambda name: fields[name]["position"])[0::5] == ["recipe", "config"]
    assert fields["recipe"]["enum"] == list(RECIPES)
    assert fields["last"]["enum"] == list(STAGES)
    assert fields["fresh_from"]["enum"] == ["none", *STAGES]


def test_settings_are_laid_on_a_recipe_or_on_a_config_and_then_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCNN_STORAGE", "/kept/here")
    monkeypatch.setenv("RCNN_MODEL__K", "99")  # not a place
    tiny = debug_tiny().with_settings({"train.epochs": 3, "storage": "/kept/here"})
    assert config_of({"recipe": "debug_tiny", "settings": ["train.epochs=3"]}) == tiny
    assert config_of({"config": debug_tiny().model_dump(mode="json"), "settings": ["train.epochs=3"]}) == tiny
    assert config_of({}).recipe == "demo"
    with pytest.raises(ConfigError, match="epochz"):
        config_of({"settings": ["train.epochz=3"]})
