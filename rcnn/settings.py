"""Reads settings in layers: a recipe, overridden by a file, by environment variables, and by `--set`, in this order.

In: text, as a user wrote it. Out: a validated `PipelineConfig`, or a one-line error that names the layer at fault: a file, a
variable, `--set` or the recipe.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.section import (
    Given,
    Layer,
    Text,
    as_typed,
    environment_layer,
    fields_of,
    is_section,
    lay,
    limits_of,
    shown,
    unknown_setting,
)
from rcnn.section import setting_names as names_in
from rcnn.text import parse_json

EXAMPLE = "`rcnn config --recipe demo` prints an example, as YAML"


@dataclass(frozen=True)
class ConfigFile:
    """The settings in a file, and the recipe that it names, a value of any type, not yet validated."""

    path: str
    layer: Layer
    recipe: Any = None
    names_recipe: bool = False


def build_config(
    base: PipelineConfig,
    *,
    file: ConfigFile | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Iterable[str] = (),
) -> PipelineConfig:
    """Applies a file, `RCNN_SECTION__FIELD` variables and `section.field=value` strings to `base`, in this order.

    Raises:
        ConfigError: a name is unknown or a value is out of bounds; the message names the setting and its origin.
    """
    layers = [
        file.layer if file else {},
        environment_layer(PipelineConfig, environ or {}),
        dict(_parse_override(text) for text in overrides),
    ]
    return lay(base, layers, base_origin=f"recipe {base.recipe}")


def read_config_file(file: str | Path) -> ConfigFile:
    """The settings in a `.toml`, `.yaml`, `.yml` or `.json` file.

    Raises:
        ConfigError: the file is missing, cannot be parsed, or does not hold a table of known settings.
    """
    path, where = Path(file), str(file)
    if not where:
        raise ConfigError("is empty", where="--config", remedy="Name a file")
    try:
        tree = _parse_tree(path.suffix, path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=where, remedy="Check the path") from error
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start})"
        raise ConfigError(fault, where=where, remedy="Save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot be parsed: {_parse_fault(error)}", where=where, remedy=EXAMPLE) from error
    return _config_file(tree, where)


def config_from_json(text: str, *, origin: str) -> PipelineConfig:
    """Parses a config in JSON, as `model_dump_json` writes it.

    Raises:
        ConfigError: it is not JSON, a name is unknown, or a value is out of bounds.
    """
    try:
        file = _config_file(parse_json(text), origin)
    except ValueError as error:
        raise ConfigError(f"cannot be parsed: {_parse_fault(error)}", where=origin, remedy=EXAMPLE) from error
    recipe = {"recipe": file.recipe} if file.names_recipe else {}
    if not all(isinstance(name, str) for name in recipe.values()):
        raise ConfigError(f"recipe is {shown(file.recipe)}", where=origin, remedy="Give the name of a recipe")
    return lay(PipelineConfig(**recipe), [file.layer])


def setting_names() -> Iterator[str]:
    """The dotted name of every setting, in the order of the tree."""
    return names_in(PipelineConfig)


def explain_settings(name: str = "", config: PipelineConfig | None = None) -> list[dict[str, str]]:
    """Each setting with its default, bounds and meaning, and its value in `config` if there is one.

    Args:
        name: a setting, or a section; empty: all.
        config: a resolved config.

    Raises:
        ConfigError: there is no setting or section of this name.
    """
    fields = {each: field for each, field in fields_of(PipelineConfig) if each != "recipe"}
    wanted = [each for each in fields if not name or each == name or each.startswith(f"{name}.")]
    if not wanted:
        raise unknown_setting(PipelineConfig, name, "--explain")
    values = {each: {"value": as_typed(config.value_of(each))} if config else {} for each in wanted}
    return [
        {
            "setting": each,
            "default": as_typed(fields[each].get_default()),
            **values[each],
            "bounds": limits_of(fields[each]),
            "meaning": fields[each].description or "",
        }
        for each in wanted
    ]


def _parse_override(text: str) -> tuple[str, Given]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        fault = "has no '='" if not equals else "does not name a setting"
        raise ConfigError(f"{shown(text)} {fault}", where="--set", remedy="Write --set section.field=value")
    return name.strip(), Given(Text(value), "--set")


def _config_file(tree: Any, where: str) -> ConfigFile:
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else "null" if tree is None else shown(tree)
        raise ConfigError(f"holds {kind}, not a table of settings", where=where, remedy=EXAMPLE)
    settings = {name: value for name, value in tree.items() if name != "recipe"}
    layer = dict(_flattened(settings, PipelineConfig, "", where))
    return ConfigFile(where, layer, tree.get("recipe"), names_recipe="recipe" in tree)


def _flattened(table: Mapping[str, Any], tree: type[BaseModel], prefix: str, where: str) -> Iterator[tuple[str, Given]]:
    for key, value in table.items():
        name, field = prefix + key, tree.model_fields.get(key)
        if field is None:
            raise _misplaced(key, prefix, where)
        if not is_section(field):
            yield name, Given(value, where)
        elif isinstance(value, dict):
            yield from _flattened(value, field.annotation, f"{name}.", where)  # type: ignore[arg-type]
        else:
            inside = next(fields_of(field.annotation))[0]  # type: ignore[arg-type]
            remedy = f"Set one of its settings, such as {name}.{inside}, or omit it"
            raise ConfigError(f"{name} is {shown(value)}, but should be a table", where=where, remedy=remedy)


def _misplaced(key: str, prefix: str, where: str) -> ConfigError:
    if key == "<<":
        return ConfigError("merge keys (<<) are not supported", where=where, remedy="Write the settings out")
    if not prefix and "." in key and key in setting_names():
        section, _, field = key.rpartition(".")
        return ConfigError(
            f"{key!r} is a key with a dot in it", where=where, remedy=f"Put {field} into table {section}"
        )
    return unknown_setting(PipelineConfig, prefix + key, where)


def _parse_tree(suffix: str, text: str) -> Any:
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix == ".json":
        if not text.strip():
            raise ValueError("it is empty; write {} for no settings")
        return parse_json(text)
    if suffix in (".yaml", ".yml"):
        return _parse_yaml(text)
    raise ValueError(f"the extension {suffix!r} is unknown; use .toml, .yaml, .yml or .json")


def _parse_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split()).partition("; use sys.")[0]  # Python's advice for longer numbers


def _parse_yaml(text: str) -> Any:
    """Parses YAML to tables and lists. Scalars stay text, to be parsed by the type of their setting.

    PyYAML's own loader would turn `name: 1.10` into a number, `2024-01-01` into a date and `on` into true, would use the last
    of duplicate keys, and would expand aliases of aliases until memory is full.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{', '.join(filter(None, (error.context, error.problem)))}{line}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    value = None if node is None else _YamlTree().value_of(node)
    return {} if value is None else value


class _YamlTree:
    """The values of YAML nodes, each built once: an alias shares the value, so aliases of aliases stay small."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}

    def value_of(self, node: Any) -> Any:
        """The value of a node: a table, list, text or None."""
        if id(node) not in self.values:
            self.values[id(node)] = _Unfinished
            self.values[id(node)] = self._new_value(node)
        if self.values[id(node)] is _Unfinished:
            raise ValueError(f"{_line(node)} contains an alias of itself")
        return self.values[id(node)]

    def _new_value(self, node: Any) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if node.id == "mapping" and kind == "map":
            return self._table(node)
        if node.id == "sequence" and kind == "seq":
            return [self.value_of(item) for item in node.value]
        if node.id == "scalar" and kind in ("null", "bool", "int", "float", "timestamp", "str", "merge", "value"):
            return None if kind == "null" else Text(node.value)
        raise ValueError(f"{_line(node)} has the tag {node.tag.replace('tag:yaml.org,2002:', '!!')}; omit it")

    def _table(self, node: Any) -> dict[str, Any]:
        lines: dict[str, str] = {}
        table = {}
        for key, value in node.value:
            if key.id != "scalar":
                raise ValueError(f"{_line(key)} has a key that is not a name")
            if key.value in lines:
                raise ValueError(f"{_line(key)} sets {key.value!r} again, after {lines[key.value]}; keep one")
            lines[key.value] = _line(key)
            table[key.value] = self.value_of(value)
        return table


class _Unfinished:
    """Marks a value that is being built."""


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"
