"""What users write, in each layer, as it is read, and the errors when it cannot be."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.ranges import Range
from rcnn.recipes import demo, resolve_config
from rcnn.section import fields_of, limits_of
from rcnn.settings import build_config, explain_settings, read_config_file, setting_names

LOOKS_LIKE_MORE = ["1.10", "1e5", "1_000", "2024-01-01", "true", "on", "0x10", "12"]
INPUTS = '{"code": {}, "parent": {"run_id": "", "tags": {}}, "results": {}, "config": {"train": {"epochs": 0}}}'  # of a Ray job
DEEP = 200_000


def fault_of(call: Callable[[], Any]) -> str:
    """The message of the one-line ConfigError that the call ends in."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PipelineConfig]:
    """Writes a file of a name, and resolves it."""
    monkeypatch.chdir(tmp_path)

    def write_and_resolve(name: str, text: str | bytes, **layers: Any) -> PipelineConfig:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return resolve_config(file=name, **layers)

    return write_and_resolve


# ---------------------------------------------------------------------------------------------------------- layers


def test_layers_apply_in_order_recipe_file_environment_set(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nepochs = 2\nbatch_size = 8\nmomentum = 0.5\n")
    config = build_config(
        demo(),
        file=read_config_file(file),
        environ={"RCNN_TRAIN__BATCH_SIZE": "16", "RCNN_TRAIN__MOMENTUM": "0.6", "HOME": "/"},
        overrides=["train.momentum=0.8", "train.momentum=0.7"],
    )
    assert (config.train.epochs, config.train.batch_size, config.train.momentum) == (2, 16, 0.7)
    assert config.model == demo().model


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "recipe = 'debug_tiny'\n[model]\nk = 9\n"),
        ("a.yaml", "recipe: debug_tiny\nmodel:\n  k: 9\n"),
        ("a.json", '{"recipe": "debug_tiny", "model": {"k": 9}}'),
    ],
)
def test_a_file_may_name_its_recipe_and_the_command_line_wins(read: Any, name: str, text: str) -> None:
    assert (read(name, text).recipe, read(name, text).model.k) == ("debug_tiny", 9)
    assert (read(name, text, recipe="demo").recipe, read(name, text, recipe="demo").model.k) == ("demo", 9)


def test_a_rule_over_two_settings_sees_all_layers() -> None:
    config = build_config(demo(), environ={"RCNN_EXECUTION__NUM_WORKERS": "3"}, overrides=["train.batch_size=96"])
    assert (config.execution.num_workers, config.train.batch_size) == (3, 96)


@pytest.mark.parametrize(
    ("text", "environ", "overrides", "origin", "told"),
    [
        # The last layer with one of the two; a third setting of the section does not count.
        ("", {"RCNN_EXECUTION__NUM_WORKERS": "3"}, ["train.epochs=9"], "RCNN_EXECUTION__NUM_WORKERS: ",
         "(train.batch_size from recipe demo, execution.num_workers from RCNN_EXECUTION__NUM_WORKERS)"),
        ("[train]\nbatch_size = 7", {"RCNN_TRAIN__EPOCHS": "2"}, ["execution.num_workers=2"], "--set: ",
         "(train.batch_size from a.toml, execution.num_workers from --set)"),
        ("[train]\nbatch_size = 7\n[execution]\nnum_workers = 2", {"RCNN_AUGMENT__FLIP": "true"}, ["train.epochs=2"],
         "a.toml: ", ""),
        ("", {"RCNN_EXECUTION__NUM_WORKERS": "3", "RCNN_TRAIN__BATCH_SIZE": "8"}, [],
         "RCNN_TRAIN__BATCH_SIZE and RCNN_EXECUTION__NUM_WORKERS: ", ""),
    ],
)  # fmt: skip
def test_a_rule_over_two_settings_blames_who_set_them(
    read: Any, text: str, environ: dict[str, str], overrides: list[str], origin: str, told: str
) -> None:
    message = fault_of(lambda: read("a.toml", text, environ=environ, overrides=overrides))
    assert message.startswith(f"{origin}train.batch_size = ")
    assert told in message


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tune.epochs=2", "tune.grace_epochs=3"),
        ('tune.space={"train.momentum": {"min": 0, "max": 0.5}}', "tune.search=grid"),
        ("data.source=svhn", "data.on_error=skip"),
        ("data.root=", "data.source=folder"),
        ("data.source=svhn", "data.follow_links=true"),
        ("data.source=mnist-sample", "data.root=photos"),
    ],
)
def test_every_rule_over_two_settings_names_both(first: str, second: str) -> None:
    variable = {f"RCNN_{second.partition('=')[0].replace('.', '__').upper()}": second.partition("=")[2]}
    message = fault_of(lambda: resolve_config(environ=variable, overrides=[first, "seed=3", "tune.num_rows=9"]))
    assert message.startswith("--set: ")
    assert f"{first.partition('=')[0]} from --set" in message
    assert f"{second.partition('=')[0]} from RCNN_" in message


# ------------------------------------------------------------------------------------------------- values as typed


@pytest.mark.parametrize("text", LOOKS_LIKE_MORE)
def test_a_text_setting_takes_the_text_as_it_is(read: Any, text: str) -> None:
    assert resolve_config(overrides=[f"data.name={text}"]).data.name == text
    assert resolve_config(environ={"RCNN_DATA__NAME": text}).data.name == text
    assert PipelineConfig().placed_by({"RCNN_TRACKING__EXPERIMENT": text}).tracking.experiment == text
    assert read("a.yaml", f"data:\n  name: {text}\n").data.name == text
    assert read("a.yaml", f"{{data: {{name: '{text}'}}}}").data.name == text


@pytest.mark.parametrize("text", ["[x]", '"quoted"', " in spaces ", "{a = 1}", "null", "a=b", "#"])
def test_signs_of_other_formats_are_text_in_set_and_in_variables(text: str) -> None:
    assert resolve_config(overrides=[f"tracking.experiment={text}"]).tracking.experiment == text
    assert resolve_config(environ={"RCNN_TRACKING__EXPERIMENT": text}).tracking.experiment == text


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=400))
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back_from_a_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for name, dump in (("a.yaml", yaml.safe_dump), ("a.json", json.dumps)):
        (folder / name).write_text(dump({"tracking": {"experiment": text}}), encoding="utf-8")
        assert resolve_config(file=folder / name).tracking.experiment == text


def test_a_choice_may_look_like_a_boolean_in_yaml(read: Any) -> None:
    assert read("a.yaml", "execution: {compile: on}").execution.compile == "on"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.toml", "[data]\nname = 1.10", "1.1"),
        ("a.toml", "[data]\nname = 2024-01-01", "2024-01-01"),
        ("a.toml", "[data]\nname = 07:32:00", "07:32:00"),
        ("a.toml", "[data]\nname = true", "true"),
        ("a.json", '{"data": {"name": 1.10}}', "1.1"),
        ("a.json", '{"data": {"name": false}}', "false"),
    ],
)
def test_toml_and_json_want_text_in_quotes(read: Any, name: str, text: str, found: str) -> None:
    message = fault_of(lambda: read(name, text))
    assert message.startswith(f"{name}: data.name is {found}: should be text")
    assert "put it in quotes" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), (" 3 ", 3), ("+3", 3), ("1_000", 1000), ("3.0", 3), ("1e3", 1000), ("0012", 12)],
)
def test_whole_numbers_are_read(read: Any, text: str, value: int) -> None:
    assert resolve_config(overrides=[f"train.epochs={text}"]).train.epochs == value
    assert resolve_config(environ={"RCNN_TRAIN__EPOCHS": text}).train.epochs == value
    assert read("a.yaml", f"train:\n  epochs: {text}\n").train.epochs == value


@pytest.mark.parametrize(
    "text",
    ["true", "False", "3.5", "10^21", "1" + 21 * "0", "1e21", "9" * 5000, "inf", "nan", "", "x", "３", "'3'", "1:30",
     "0x10", "[3]", "1__0", "1 000", "-3", "None"],
)  # fmt: skip
def test_what_is_not_a_whole_number_in_bounds_is_refused(text: str) -> None:
    for layers in ({"overrides": [f"train.epochs={text}"]}, {"environ": {"RCNN_TRAIN__EPOCHS": text}}):
        message = fault_of(lambda: resolve_config(**layers))  # noqa: B023
        assert "train.epochs is " in message
        assert "should be a whole number, 1 to 100_000" in message


@pytest.mark.parametrize(
    ("text", "shown"), [("true", "true"), ('"3"', "'3'"), ("3.5", "3.5"), ("[3]", "[3]"), ('{"a": 1}', "a table")]
)
def test_json_wants_a_whole_number_as_one(read: Any, text: str, shown: str) -> None:
    message = fault_of(lambda: read("a.json", f'{{"train": {{"epochs": {text}}}}}'))
    assert message.startswith(f"a.json: train.epochs is {shown}: should be a whole number, 1 to 100_000")
    assert ("without quotes" in message) == text.startswith('"')


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "true", "0", "10.1", "1,5"])
def test_what_is_not_a_number_in_bounds_is_refused(text: str) -> None:
    message = fault_of(lambda: resolve_config(overrides=[f"train.learning_rate={text}"]))
    assert "should be a number, above 0, up to 10" in message


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "1e400", "1" + 400 * "0"])
def test_json_constants_that_are_not_numbers_are_refused(read: Any, constant: str) -> None:
    message = fault_of(lambda: read("a.json", f'{{"train": {{"learning_rate": {constant}}}}}'))
    assert "a.json: train.learning_rate is " in message


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_switches_are_true_or_false(read: Any, text: str, value: bool) -> None:
    assert resolve_config(overrides=[f"tune.enabled={text}"]).tune.enabled is value
    assert read("a.yaml", f"tune: {{enabled: {text}}}").tune.enabled is value


@pytest.mark.parametrize("text", ["1", "0", "yes", "no", "on", "off", "", "t"])
def test_other_words_for_true_are_refused(text: str) -> None:
    message = fault_of(lambda: resolve_config(environ={"RCNN_TUNE__ENABLED": text}))
    assert message.startswith(f"RCNN_TUNE__ENABLED: tune.enabled is {text!r}: should be true or false.")


def test_json_wants_true_without_quotes(read: Any) -> None:
    assert "should be true or false, without quotes" in fault_of(
        lambda: read("a.json", '{"tune": {"enabled": "true"}}')
    )
    assert "tune.enabled is 1: " in fault_of(lambda: read("a.json", '{"tune": {"enabled": 1}}'))


@pytest.mark.parametrize("text", ["[16, 32]", "[16,32,]", " [ 1_6 , 32 ] ", "16,32"])
def test_lists_are_read(read: Any, text: str) -> None:
    assert resolve_config(overrides=[f"tune.space.model.k={text}"]).tune.space["model.k"] == (16, 32)
    config = read("a.yaml", f"tune:\n  space:\n    model.k: {text.replace('1_6', '16')}\n")
    assert config.tune.space == {"model.k": (16, 32)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("many", "model.k[0] is 'many': should be a whole number, 1 to 2048"),
        ("[]", "model.k is []: should be a list of values, or a range such as"),
        ("[16,true]", "model.k[1] is 'true': should be a whole number"),
        ("[[16]]", "model.k[0] is '[16]': should be a whole number"),
        ("[16, 0]", "model.k[1] is '0': should be a whole number, 1 to 2048. "),
        ("[16, 16]", "model.k has 16 twice; keep one"),
        ("[" * DEEP, "model.k is '[[["),
        ("{" * DEEP, "model.k is '{{{"),
    ],
)
def test_messages_of_wrong_lists(text: str, expected: str) -> None:
    assert f"--set: tune.space.{expected}" in fault_of(lambda: resolve_config(overrides=[f"tune.space.model.k={text}"]))


SPACE = {"model.k": (16, 32), "train.learning_rate": Range(min=0.001, max=0.1, log=True)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"tune": {"space": {"model.k": [16, 32], '
         '"train": {"learning_rate": {"min": 1e-3, "max": 0.1, "log": true}}}}}'),
        ("a.toml", "[tune.space]\nmodel.k = [16, 32]\ntrain.learning_rate = {min = 0.001, max = 0.1, log = true}"),
        ("a.toml", "[tune.space]\n'model.k' = [16, 32]\n'train.learning_rate' = {min = 1e-3, max = 0.1, log = true}"),
        ("a.yaml", "tune:\n  space:\n    model: {k: [16, 32]}\n    train.learning_rate: {min: 0.001, max: 1e-1, log: true}"),
    ],
)  # fmt: skip
def test_a_space_is_read_from_every_kind_of_file(read: Any, name: str, text: str) -> None:
    assert read(name, text).tune.space == SPACE


def test_a_space_is_read_as_json_and_item_by_item() -> None:
    text = '{"model.k": [16, 32], "train.learning_rate": {"min": 0.001, "max": 0.1, "log": true}}'
    assert resolve_config(overrides=[f"tune.space={text}"]).tune.space == SPACE
    assert resolve_config(environ={"RCNN_TUNE__SPACE": text}).tune.space == SPACE
    item = {"RCNN_TUNE__SPACE__TRAIN__MOMENTUM": "0.8,0.9"}
    assert resolve_config(environ=item, overrides=["tune.space={}", "tune.space.model.k=16"]).tune.space == {
        "model.k": (16,)
    }
    space = resolve_config("demo", environ=item, overrides=["tune.space.model.t="]).tune.space
    assert list(space) == ["model.k", "train.learning_rate", "train.momentum"]
    assert space["train.momentum"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ('train.momentum={"min": 0.5, "max": 1}', "train.momentum.max is 1: should be a number, 0 to below 1"),
        ('train.momentum={"min": 0.5, "max": 0.2}', "train.momentum.min = 0.5 is not below max = 0.2"),
        ('train.momentum={"max": 0.2}', "train.momentum has no min: a range has min and max"),
        ('train.momentum={"min": 0, "max": 0.2, "lgo": true}', "train.momentum has 'lgo': a range has min and max"),
        ('train.momentum={"min": 0, "max": 0.2, "log": true}', "train.momentum.min is 0, and log = true needs one above 0"),
        ('train.momentum={"min": 0.1, "max": 0.2, "step": 1}', "train.momentum.step = 1 is more than max - min"),
        ('model.k={"min": 1, "max": 8, "step": 1.5}', "model.k.step is 1.5: should be a whole number"),
        ('model.k={"min": 1, "max": 8.5}', "model.k.max is 8.5: should be a whole number, 1 to 2048"),
        ('model.k={"min": 1, "max": 8, "log": true, "step": 2}', "model.k has both log and step; leave one out"),
        ('model.network={"min": 1, "max": 8}', "model.network is a range: should be a list of values (rcnn, "),
        ("augment.flip=1", "augment.flip[0] is '1': should be true or false"),
        ("model.kk=1", "model.kk cannot be searched (did you mean model.k): it should be a setting of model, train, augment"),
        ("train.epochs=1,2", "train.epochs cannot be searched: it should be a setting of model, train, augment"),
        ("seed=1,2", "seed cannot be searched: it should be a setting of model, train, augment"),
    ],
)  # fmt: skip
def test_messages_of_wrong_spaces(item: str, expected: str) -> None:
    assert f"--set: tune.space.{expected}" in fault_of(lambda: resolve_config(overrides=[f"tune.space.{item}"]))


@pytest.mark.parametrize("text", ["3", "[1]", "{", ""])
def test_a_space_that_is_not_a_table_is_refused(text: str) -> None:
    assert "tune.space is " in fault_of(lambda: resolve_config(overrides=[f"tune.space={text}"]))
    assert "should be a table" in fault_of(lambda: resolve_config(overrides=[f"tune.space={text}"]))
    fault = fault_of(lambda: resolve_config(overrides=[f"tune.space={text}", "tune.space.model.k=3"]))
    assert fault.startswith("--set: model.k is set in a table that cannot be read")


# ---------------------------------------------------------------------------------------------------------- bounds


def numbers_in(schema: Any) -> list[Any]:
    """The schemas of a setting's numbers: its own, or that of its elements."""
    kinds = [schema, schema.get("items", {})]
    return [kind for kind in kinds if kind.get("type") in ("integer", "number")]


def test_every_number_has_a_lower_and_an_upper_bound_in_the_form_too() -> None:
    schema = PipelineConfig.model_json_schema()
    sections = {"": schema, **schema["$defs"]}
    numbers = {
        (section, name): number
        for section in sections
        for name, field in sections[section]["properties"].items()
        for number in numbers_in(field)
    }
    assert {("", "seed"), ("TrainConfig", "epochs"), ("ModelConfig", "k"), ("Range", "min")} <= set(numbers)
    for name, number in numbers.items():
        assert {"minimum", "exclusiveMinimum"} & set(number), name
        assert {"maximum", "exclusiveMaximum"} & set(number), name


def upper_bounds() -> dict[str, float]:
    found = {}
    for name, field in fields_of(PipelineConfig):
        for item in field.metadata:
            bound = getattr(item, "le", getattr(item, "lt", None))
            if bound is not None:
                found[name] = bound
    return found


@pytest.mark.parametrize(("name", "bound"), upper_bounds().items())
def test_a_number_ten_times_too_large_is_refused(name: str, bound: float) -> None:
    message = fault_of(lambda: resolve_config(overrides=[f"{name}={bound * 10}"]))
    assert message.startswith(f"--set: {name} is {bound * 10!r}: should be a")


def test_settings_are_explained_in_words() -> None:
    rows = {row["setting"]: row for row in explain_settings()}
    assert list(rows) == list(setting_names())
    assert all(row["meaning"].endswith(".") for row in rows.values())
    assert not any(re.search(r"[gl][et]=|\(|None", row["bounds"]) for row in rows.values())
    assert rows["model.k"] | {"meaning": ""} == {
        "setting": "model.k", "default": "32", "bounds": "1 to 2048", "meaning": ""
    }  # fmt: skip
    shown = {name: (rows[name]["default"], rows[name]["bounds"]) for name in rows}
    assert shown["train.epochs"] == ("10", "1 to 100_000")
    assert shown["train.momentum"] == ("0.9", "0 to below 1")
    assert shown["data.val_fraction"] == ("0.1", "above 0, below 1")
    assert shown["train.learning_rate"] == ("0.01", "above 0, up to 10")
    assert shown["tune.space"] == (
        '{"model.k": [16, 32], "model.t": [1, 2, 3], "train.learning_rate": {"min": 0.001, "max": 0.1, "log": true}}',
        "a table: for each name a list of values, or {min, max, log, step}",
    )
    assert shown["tune.enabled"] == ("true", "true or false")
    assert shown["data.resize"] == ("crop", "crop, pad, stretch")
    assert shown["ray.address"] == ('""', "text, such as auto or http://head:8265")


def test_a_default_can_be_typed_as_it_is_explained() -> None:
    typed = [f"{row['setting']}={row['default']}" for row in explain_settings() if row["default"] != '""']
    assert resolve_config("custom", overrides=typed) == PipelineConfig()
    assert all(limits_of(field) for _, field in fields_of(PipelineConfig))


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", ["", "dmeo"])
def test_an_unknown_recipe_is_refused(recipe: str) -> None:
    message = fault_of(lambda: resolve_config(recipe))
    assert message.startswith(f"--recipe: there is no recipe {recipe!r}. ")
    assert message.endswith("`rcnn recipes` lists them")
    assert ("Did you mean 'demo'?" in message) == bool(recipe)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.toml",
            "recipe = 'dmeo'",
            "recipe = 'dmeo': there is no recipe 'dmeo'. Did you mean 'demo'? `rcnn recipes`",
        ),
        ("a.yaml", "recipe: ''", "recipe = '': there is no recipe ''. `rcnn recipes`"),
        ("a.yaml", "recipe:", "recipe is empty (null), not a name. `rcnn recipes`"),
        ("a.toml", "recipe = 3", "recipe is 3, not a name. `rcnn recipes`"),
        ("a.json", '{"recipe": ["demo"]}', "recipe is ['demo'], not a name. `rcnn recipes`"),
    ],
)
def test_a_wrong_recipe_in_a_file_is_blamed_on_the_file(read: Any, name: str, text: str, expected: str) -> None:
    for recipe in (None, "demo"):
        message = fault_of(lambda: read(name, text, recipe=recipe))  # noqa: B023
        assert message.startswith(f"{name}: {expected}")


# ------------------------------------------------------------------------------------------------- paths and URIs


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("storage=s3:/x", "storage is 's3:/x': should be s3://x; a folder of this name is ./s3:/x"),
        ("storage=s3:bucket/x", "should be s3://bucket/x"),
        ("storage=s3//bucket", "should be s3://bucket"),
        ("storage=S3:/x", "should be S3://x"),
        ("storage=gs:/x", "should be gs://x"),
        ("storage=file:/mnt/x", "should be file:///mnt/x"),
        ("storage=other:/x", "should be other://x"),
        ("storage=s3://", "should name more than the scheme"),
        ("storage=s3:///x?region=y", "should name more than the scheme"),
        ("storage= x", "storage is ' x': should not begin or end with white space"),
        ("storage=" + "x" * 5000, "should be text, up to 4096 characters, not empty"),
        ("data.root=s3:/x", "data.root is 's3:/x': should be s3://x"),
        ("data.mirror=https:/x", "data.mirror is 'https:/x': should be https://x. "),
        ("tracking.uri=http:/x", "tracking.uri is 'http:/x': should be http://x. "),
        ("tracking.uri=sqlite:/x.db", "should be sqlite:///x.db. "),
        ("tracking.uri=localhost:5000", "should be http://localhost:5000. "),
        ("tracking.model_name=a/b", "should be text such as rcnn-digits (Registered model, without slashes"),
        ("ray.address=head:8265", "should be text such as auto or http://head:8265"),
    ],
)
def test_a_uri_with_a_slip_is_refused_with_the_one_that_is_meant(override: str, expected: str) -> None:
    message = fault_of(lambda: resolve_config(overrides=[override]))
    assert message.startswith("--set: ")
    assert expected in message


@pytest.mark.parametrize(
    "storage", ["file:///x", "s3://b", "s3://b/x?endpoint_override=h:1", "./s3:/x", "a:b", "~/x", "/x y", "s3", "s3/x"]
)
def test_sound_places_are_left_as_they_are(storage: str) -> None:
    assert resolve_config(overrides=[f"storage={storage}"]).storage == storage


@pytest.mark.parametrize("uri", ["", "databricks", "sqlite:///x.db", "http://h:5000", "postgresql+psycopg2://h/x"])
def test_sound_tracking_uris_are_left_as_they_are(uri: str) -> None:
    assert resolve_config(overrides=[f"tracking.uri={uri}"]).tracking.uri == uri


# ------------------------------------------------------------------------------------------------ names and origins


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("RCNN_TRAIN__EPOCHS", "x", "train.epochs is 'x': should be a whole number"),
        ("RCNN_TRAIN__EPOCH", "3", "there is no setting 'train.epoch'. Did you mean RCNN_TRAIN__EPOCHS?"),
        ("RCNN_MODEL_K", "3", "there is no setting 'model_k'. Did you mean RCNN_MODEL__K?"),
        ("RCNN_", "3", "there is no setting ''. "),
        ("RCNN_MODEL", "3", "'model' is a section and has no value of its own. Set one of its settings, such as RCNN_MODEL"),
        ("rcnn_model__k", "3", "is ignored, because it is not in upper case. Rename it to RCNN_MODEL__K"),
        ("RCNN_model__k", "3", "is ignored, because it is not in upper case. Rename it to RCNN_MODEL__K"),
        ("RCNN_RECIPE", "demo", "'recipe' cannot be set here. Use --recipe NAME"),
        ("RCNN_STORAGE", "caf\udce9", "storage is 'caf\\udce9': should be UTF-8 text"),
        ("RCNN_DATA__ROOT", "caf\udce9", "data.root is 'caf\\udce9': should be UTF-8 text"),
    ],
)  # fmt: skip
def test_an_error_from_a_variable_names_it(variable: str, value: str, expected: str) -> None:
    message = fault_of(lambda: resolve_config(environ={"HOME": "/", "rcnn_of_another": "1", variable: value}))
    assert message.startswith(f"{variable}: ")
    assert expected in message


def test_a_variable_that_places_a_run_is_named_too() -> None:
    place = PipelineConfig().placed_by
    assert fault_of(lambda: place({"RCNN_RAY__NUM_CPUS": "x"})).startswith("RCNN_RAY__NUM_CPUS: ray.num_cpus is 'x': ")
    assert "Did you mean RCNN_RAY__ADDRESS?" in fault_of(lambda: place({"RCNN_RAY__ADRESS": "auto"}))
    assert place({"RCNN_TRAIN__EPOCH": "3", "RCNN_MODEL__K": "x"}) == PipelineConfig()  # not a place's


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("=3", "'=3' does not name a setting. Write --set section.field=value"),
        ("", "'' has no '='"),
        (
            "model=3",
            "'model' is a section and has no value of its own. Set one of its settings, such as 'model.network'",
        ),
        ("model.k=", "model.k is '': should be a whole number, 1 to 2048"),
        ("model.k.x=3", "there is no setting 'model.k.x'. Did you mean 'model.k'?"),
        ("Model.K=3", "there is no setting 'Model.K'. Did you mean 'model.k'?"),
        ("train.lr=0.1", "there is no setting 'train.lr'. Did you mean 'train.learning_rate'?"),
        ("train.weight=0.1", "there is no setting 'train.weight'. Did you mean 'train.weight_decay'?"),
        ("tune.batch_size=3", "there is no setting 'tune.batch_size'. Did you mean 'train.batch_size'?"),
        ("epochs=3", "there is no setting 'epochs'. Did you mean 'train.epochs'?"),
        ("trian.epochs=3", "there is no setting 'trian.epochs'. Did you mean 'train.epochs'?"),
        ("train.uri=x", "there is no setting 'train.uri'. Did you mean 'tracking.uri'?"),
        ("train.xyz=x", "there is no setting 'train.xyz'. `rcnn config --explain` lists them all"),
        ("x" * DEEP + "=3", "there is no setting 'xxx"),
        ("data.source=" + "x" * DEEP, "should be one of mnist-sample, "),
    ],
)
def test_messages_of_odd_assignments(override: str, expected: str) -> None:
    assert fault_of(lambda: resolve_config(overrides=[override])).startswith("--set: ")
    assert expected in fault_of(lambda: resolve_config(overrides=[override]))


def test_other_wrong_settings_are_counted_once_each() -> None:
    message = fault_of(lambda: resolve_config(overrides=["tune.space.model.k=0"]))
    assert "more" not in message
    wrong = ["tune.space.model.k=0,0", "seed=x"]
    assert "(1 more wrong setting)" in fault_of(lambda: resolve_config(overrides=wrong))


# ----------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "model = [", "cannot be parsed"),
        ("a.yaml", "model: [", "cannot be parsed: while parsing a flow node, expected the node content, but found "
         "'<stream end>' in line 1"),
        ("a.yaml", "a: 1\n---\nb: 2", "found another document in line 2"),
        ("a.json", "{", "cannot be parsed"),
        ("a.json", " ", "cannot be parsed: it is empty; write {} for no settings"),
        ("a.json", '{"seed": %s}' % ("9" * 5000), "Exceeds the limit (4300 digits)"),
        ("a.ini", "", "the extension '.ini' is unknown; use .toml, .yaml, .yml or .json"),
        ("a.json", "[1]", "holds a list, not a table of settings"),
        ("a.json", "null", "holds null, not a table of settings"),
        ("a.yaml", "false", "holds 'false', not a table of settings"),
        ("a.yaml", "[]", "holds a list, not a table of settings"),
        ("a.toml", "model = 3", "model is 3, but should be a table. Set one of its settings, such as model.network, or"),
        ("a.toml", "[[model]]\nk = 3", "model is [{'k': 3}], but should be a table"),
        ("a.yaml", "model: [3]", "model is ['3'], but should be a table"),
        ("a.yaml", "train:\n", "train is empty (null), but should be a table"),
        ("a.yaml", "train:\n  epochs:\n", "train.epochs is empty (null): give it a value, or omit it"),
        ("a.json", '{"data": {"name": null}}', "data.name is empty (null): give it a value, or omit it"),
        ("a.toml", "[modell]\nk = 3", "there is no setting 'modell'"),
        ("a.toml", "[model]\nkk = 3", "there is no setting 'model.kk'. Did you mean 'model.k'?"),
        ("a.toml", "'train.epochs' = 3", "'train.epochs' is a key with a dot in it. Put epochs into table train"),
        ("a.yaml", "train.epochs: 3", "'train.epochs' is a key with a dot in it. Put epochs into table train"),
        ("a.json", '{"train.epochs": 3}', "'train.epochs' is a key with a dot in it. Put epochs into table train"),
        ("a.json", '{"storage": "a\\u0000b"}', "storage is 'a\\x00b': should not contain a NUL"),
        ("a.json", '{"storage": "\\ud800"}', "should be UTF-8 text"),
        ("a.toml", "seed = 0x" + "f" * 5000, "seed is a number of 20000 bits"),
    ],
)  # fmt: skip
def test_messages_of_wrong_files(read: Any, name: str, text: str, expected: str) -> None:
    message = fault_of(lambda: read(name, text))
    assert message.startswith(f"{name}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.yaml",
            "train:\n  epochs: 3\n  flip: true\n  epochs: 4",
            "line 4 sets 'epochs' again, after line 2; keep one",
        ),
        ("a.yaml", "train: {epochs: 3}\nmodel: {k: 3}\ntrain: {flip: true}", "line 3 sets 'train' again, after line 1"),
        ("a.yaml", "tune: {space: {a: 1, a: 2}}", "line 1 sets 'a' again, after line 1"),
        ("a.json", '{"train": {"epochs": 3, "epochs": 4}}', "it names 'epochs' twice"),
        ("a.json", '{"train": {}, "train": {}}', "it names 'train' twice"),
        ("a.toml", "[train]\nepochs = 3\nepochs = 4", "cannot be parsed"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(read: Any, name: str, text: str, expected: str) -> None:
    assert expected in fault_of(lambda: read(name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "[" * DEEP),
        ("a.json", '{"a":' * DEEP),
        ("a.yaml", "[" * DEEP),
        ("a.yaml", "- " * DEEP),
        ("a.yaml", "{a: " * DEEP),
        ("a.toml", "a = " + "[" * DEEP),
    ],
)
def test_deep_nesting_is_one_line(read: Any, name: str, text: str) -> None:
    assert f"{name}: cannot be parsed: it is nested too deeply." in fault_of(lambda: read(name, text))


def test_a_deep_table_in_place_of_a_value_is_one_line(read: Any) -> None:
    text = "train.epochs." + "a." * 5000 + "a = 3"
    assert "a.toml: train.epochs is a table: should be a whole number" in fault_of(lambda: read("a.toml", text))


def test_aliases_of_aliases_stay_small(read: Any) -> None:
    levels = [f"&x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" if i else "&x0 [1]" for i in range(60)]  # 9 ** 59 in full
    text = "tune:\n  space:\n" + "\n".join(f"  - {level}" for level in levels) + "\n  enabled: *x59"
    assert "a.yaml: tune.enabled is [[[...], " in fault_of(lambda: read("a.yaml", text))


def test_aliases_are_read_and_loops_and_merges_refused(read: Any) -> None:
    config = read("a.yaml", "tune: {space: {model.k: &few [1, 2], model.t: *few}}")
    assert config.tune.space == {"model.k": (1, 2), "model.t": (1, 2)}
    assert "line 1 contains an alias of itself" in fault_of(lambda: read("a.yaml", "train: &x {epochs: *x}"))
    assert "merge keys (<<) are not supported" in fault_of(lambda: read("a.yaml", "train: {<<: {epochs: 3}}"))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!mine", "!!set", "!!binary"])
def test_tags_are_refused_and_not_followed(read: Any, tag: str) -> None:
    message = fault_of(lambda: read("a.yaml", f"data: {{name: {tag} [made]}}"))
    assert f"a.yaml: cannot be parsed: line 1 has the tag {tag}; omit it" in message
    assert not Path("made").exists()


def test_the_tag_of_text_is_taken(read: Any) -> None:
    assert read("a.yaml", "data: {name: !!str null}").data.name == "null"


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", "[train]\nepochs = 3"), ("a.yaml", "train: {epochs: 3}"), ("a.json", '{"train": {"epochs": 3}}')],
)
def test_a_byte_order_mark_is_skipped_and_utf_16_refused(read: Any, name: str, text: str) -> None:
    assert read(name, b"\xef\xbb\xbf" + text.encode()).train.epochs == 3
    message = fault_of(lambda: read(name, text.encode("utf-16")))
    assert message == f"{name}: is not UTF-8 text (byte 0xff at position 0). Save it as UTF-8"


@pytest.mark.parametrize("name", ["a.toml", "a.yaml", "a.json"])
def test_a_binary_file_is_one_line(read: Any, name: str) -> None:
    for content in (bytes(range(256)), b"\0\1\2", b"\x89PNG\r\n\x1a\n\0"):
        assert fault_of(lambda: read(name, content)).startswith(f"{name}: ")  # noqa: B023


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", ""), ("a.yaml", ""), ("a.yaml", "# only this\n"), ("a.json", "{}")]
)
def test_an_empty_file_sets_nothing(read: Any, name: str, text: str) -> None:
    assert read(name, text) == demo()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "absent.toml: cannot be read (No such file" in fault_of(
        lambda: resolve_config(file=tmp_path / "absent.toml")
    )
    assert "cannot be read (Is a directory)" in fault_of(lambda: resolve_config(file=tmp_path))
    assert fault_of(lambda: resolve_config(file="")) == "--config: is empty. Name a file"


# ------------------------------------------------------------------------------------------------- the command line


def job_in(folder: Path, text: str) -> str:
    """A folder of a Ray job."""
    folder.mkdir()
    (folder / "job.json").write_text(text)
    return str(folder)


def test_the_command_line_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep.json").write_text("[" * DEEP)
    for command in (
        ["config", "--recipe", ""],
        ["config", "--config", str(tmp_path / "deep.json")],
        ["config", "--set", "storage=s3:/x"],
        ["train", "--job", str(tmp_path / "nowhere")],
        ["train", "--job", job_in(tmp_path / "deep", "[" * DEEP)],
        ["train", "--job", job_in(tmp_path / "half", '{"config": {}}')],
        ["train", "--job", job_in(tmp_path / "wrong", INPUTS)],
    ):  # fmt: skip
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("rcnn: ConfigError: ")
        assert error.count("\n") == 1
    assert f"{tmp_path}/wrong/job.json: train.epochs is 0: should be a whole number, 1 to 100_000" in error


def test_what_config_prints_brings_texts_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in LOOKS_LIKE_MORE:
        for name, options in (("a.yaml", []), ("a.json", ["--json"])):
            assert main(["config", "--set", f"data.name={text}", *options]) == 0
            (tmp_path / name).write_text(capsys.readouterr().out)
            assert resolve_config(file=tmp_path / name).data.name == text


def test_former_names_are_refused_with_the_new_one(read: Any) -> None:
    for name, new_name in PipelineConfig.moved.items():
        with pytest.raises(ConfigError, match=rf"'{name}' is now called '{new_name}'"):
            build_config(demo(), overrides=[f"{name}=1"])
        assert any(f"{new_name}.".startswith(f"{known}.") for known in setting_names())
    with pytest.raises(ConfigError, match=r"RCNN_TRAIN__NUM_WORKERS: .* is now called RCNN_EXECUTION__NUM_WORKERS"):
        build_config(demo(), environ={"RCNN_TRAIN__NUM_WORKERS": "2"})
    with pytest.raises(ConfigError, match=r"a\.toml: 'train\.flip' is now called 'augment\.flip'"):
        read("a.toml", "[train]\nflip = true")
