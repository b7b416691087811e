"""The base of the config: sections that parse each value by its type, and one-line errors for invalid values.

In: a tree of settings, and layers of values over it, each value with its origin (a file, a variable, `--set`).
Out: a validated tree, or a `ConfigError` that names the setting, the value, its bounds and the origin at fault.

The schema imports this module (for `with_settings`), so nothing here refers to a setting by name, except `recipe`.
"""

import datetime
import difflib
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from rcnn.errors import ConfigError
from rcnn.text import counted, parse_json

ENV_PREFIX = "RCNN_"
EXPLAIN = "`rcnn config --explain` lists each setting with its bounds"
MAX_SHOWN = 80  # characters of a value in an error
MAX_DIGITS = 400  # per number; Python refuses to print more than 4,300


class Text(str):
    """A value as a user typed it (`--set`, a variable, a YAML scalar), to be parsed by the type of its setting."""


class Section(BaseModel):
    """A part of the config: frozen; unknown names and values of another type are refused."""

    # A value that is refused may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _read_by_type(cls, value: Any, info: ValidationInfo) -> Any:
        return _read(cls.model_fields[str(info.field_name)].annotation, value)


class Given(NamedTuple):
    """A value and its origin."""

    value: Any
    origin: str


Layer = Mapping[str, Given]
"""Values, by the dotted names of their settings."""

Tree = TypeVar("Tree", bound=Section)


def lay(base: Tree, layers: Sequence[Layer], *, base_origin: str = "") -> Tree:
    """The base with the layers' values applied; later layers override earlier ones.

    All layers are validated together, because a rule over two settings can involve values of both.

    Args:
        base: a validated tree.
        layers: values to change.
        base_origin: the origin of the base's own values in errors; empty: errors do not mention it.

    Raises:
        ConfigError: a name is unknown or a value is invalid; the message names the last layer at fault.
    """
    known = set(setting_names(type(base)))
    tree = base.model_dump()
    for layer in layers:
        for name, given in layer.items():
            table = "" if name in known else _table_of(type(base), name)
            if name not in known and not table:
                raise unknown_setting(type(base), name, given.origin)
            *path, leaf = (table or name).split(".")
            branch = tree
            for part in path:
                branch = branch[part]
            branch[leaf] = _with_item(branch[leaf], name.removeprefix(f"{table}."), given) if table else given.value
    try:
        return type(base).model_validate(tree)
    except ValidationError as error:
        raise _error_of(error, type(base), layers, base_origin) from error


def _table_of(tree: type[BaseModel], name: str) -> str:
    """The setting whose table has an item of this name: `tune.space` for `tune.space.model.k`; empty if none has."""
    tables = (known for known, field in fields_of(tree) if get_origin(field.annotation) is dict)
    return next((known for known in tables if name.startswith(f"{known}.")), "")


def _with_item(table: Any, item: str, given: Given) -> dict[str, Any]:
    try:
        return {**read_table(table), item: given.value}
    except ValueError as error:
        fault = f"{item} is set in a table that cannot be read: {shown(table)}"
        raise ConfigError(fault, where=given.origin, remedy=EXPLAIN) from error


def environment_layer(tree: type[Section], environ: Mapping[str, str]) -> dict[str, Given]:
    """The settings in `RCNN_SECTION__FIELD` variables.

    Raises:
        ConfigError: a variable does not name a setting, or is not in upper case and so would be ignored.
    """
    names = {variable_of(name): name for name in setting_names(tree)}
    layer = {}
    for variable, value in environ.items():
        name = variable.removeprefix(ENV_PREFIX).lower().replace("__", ".")
        if variable in names:
            layer[names[variable]] = Given(Text(value), variable)
        elif variable == variable_of(name) and _table_of(tree, name):
            layer[name] = Given(Text(value), variable)
        elif variable.startswith(ENV_PREFIX) and variable.upper() not in names:
            raise unknown_setting(tree, name, variable, spell=variable_of)
        elif variable.upper() in names:
            raise ConfigError(
                "is ignored, because it is not in upper case", where=variable, remedy=f"Rename it to {variable.upper()}"
            )
    return layer


def variable_of(name: str) -> str:
    """The environment variable of a setting: `train.epochs` -> `RCNN_TRAIN__EPOCHS`."""
    return ENV_PREFIX + name.replace(".", "__").upper()


def fields_of(tree: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field that holds a value, with its dotted name, in the order of the tree."""
    for name, field in tree.model_fields.items():
        if is_section(field):
            yield from fields_of(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, field


def is_section(field: FieldInfo) -> bool:
    """Whether the field is a section."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def setting_names(tree: type[BaseModel]) -> Iterator[str]:
    """The dotted name of every setting, in the order of the tree; `recipe`, which names the base, is not a setting."""
    return (name for name, _ in fields_of(tree) if name != "recipe")


def limits_of(field: FieldInfo) -> str:
    """The valid values of a setting, in a few words: `1 to 2048`, `true or false`, `crop, pad, stretch`."""
    return _limits(field.annotation, field.metadata, field.examples)


def as_typed(value: Any) -> str:
    """The value of a setting as a user would type it after `--set NAME=`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return json.dumps(value, default=lambda item: item.model_dump(exclude_defaults=True))
    return str(value) or '""'


def shown(value: Any) -> str:
    """A value as shown in errors: short, whatever its type."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return as_typed(value)
    if isinstance(value, datetime.date | datetime.time):
        return str(value)
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, int) and value.bit_length() > MAX_DIGITS:
        return f"a number of {value.bit_length()} bits"
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, str) else value
    return _repr.repr(plain)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_SHOWN
_repr.maxlevel = 2


def unknown_setting(
    tree: type[BaseModel], name: str, origin: str, *, spell: Callable[[str], str] = repr
) -> ConfigError:
    """The error for a name that is not a setting; `spell` writes a name in the form of its origin."""
    if name == "recipe":
        return ConfigError("'recipe' cannot be set here", where=origin, remedy="Use --recipe NAME")
    names = list(setting_names(tree))
    inside = [known for known in names if known.startswith(f"{name}.")]
    if inside:
        remedy = f"Set one of its settings, such as {spell(inside[0])}"
        return ConfigError(f"{name!r} is a section and has no value of its own", where=origin, remedy=remedy)
    if new_name := getattr(tree, "moved", {}).get(name):
        return ConfigError(f"{name!r} is now called {spell(new_name)}", where=origin, remedy="Use that name")
    near = _nearest(name.lower(), names)
    hint = f"Did you mean {spell(near)}? " if near else ""
    remedy = f"{hint}`rcnn config --explain` lists them all"
    return ConfigError(f"there is no setting {shown(name)}", where=origin, remedy=remedy)


def _nearest(name: str, names: Sequence[str]) -> str:
    """The setting that was probably meant; empty if none is near.

    Within the section, if there is one of that name: by the field or its initials, so that `train.lr` is
    `train.learning_rate`. Then a field of that name in another section, and only then any similar name.
    """
    section, _, field = name.rpartition(".")
    inside = {
        known.removeprefix(f"{section}."): known for known in names if section and known.startswith(f"{section}.")
    }
    by_initials = {"".join(word[0] for word in known.split("_")): known for known in inside}
    similar = difflib.get_close_matches(field, inside, n=1, cutoff=0.5)
    if found := by_initials.get(field) or next(iter(similar), ""):
        return inside[found]
    if found := next((known for known in names if known.endswith(f".{field}")), ""):
        return found
    return "" if inside else next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), "")


def value_of(field: FieldInfo, value: Any, name: str) -> Any:
    """A value for a setting, read by its type and within its bounds.

    Args:
        field: the setting.
        value: a value for it, as a user gave it.
        name: what an error calls it.

    Raises:
        InsideFault: it is of another type, or out of bounds.
    """
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation  # type: ignore
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        return adapter.validate_python(_read(field.annotation, value))
    except ValueError as error:  # pydantic's are ValueErrors too
        fault = f"{name} is {shown(value)}: should be {_noun(field.annotation)}{limits_of(field)}"
        raise InsideFault(fault) from error


def _read(kind: Any, value: Any) -> Any:
    """Parses a value by the type of its setting. Pydantic would also accept true for 1, "3" for 3 and 1 for true."""
    if get_origin(kind) is Annotated:
        return _read(get_args(kind)[0], value)
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], item) for item in read_items(value))
    if kind is str or get_origin(kind) is Literal:
        return _text(value)
    if kind is bool:
        return _switch(value)
    if kind in (int, float):
        return _number(kind, value)
    return value  # a section, which parses its own fields


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type("text")
    if "\0" in value:  # no operating system accepts one in a name
        raise ValueError("should not contain a NUL")
    if any("\ud800" <= sign <= "\udfff" for sign in value):  # bytes of another encoding, which JSON cannot represent
        raise ValueError("should be UTF-8 text")
    return str(value)


def _switch(value: Any) -> bool:
    if isinstance(value, Text) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise wrong_type("true or false")
    return value


def _number(kind: type, value: Any) -> Any:
    number = _parsed_number(value.strip()) if isinstance(value, Text) else value
    if number is None or isinstance(number, bool | str):
        raise wrong_type("a whole number" if kind is int else "a number")
    return number


def _parsed_number(text: str) -> int | float | None:
    """A number as TOML writes it: 3, 1_000, 1e5. Python would also accept the digits of other scripts."""
    for parse in (int, float):
        with suppress(ValueError):
            return parse(text) if text.isascii() and len(text) <= MAX_DIGITS else None  # type: ignore[no-any-return]
    return None


def read_items(value: Any) -> Sequence[Any]:
    """The items of a list, which `--set` gives as text.

    Raises:
        PydanticCustomError: it is not a list.
    """
    if isinstance(value, Text) and re.fullmatch(r"\s*\[.*\]\s*", value, flags=re.DOTALL):
        inside = value.strip()[1:-1].strip().removesuffix(",")
        return [Text(item.strip()) for item in inside.split(",")] if inside else []
    if not isinstance(value, list | tuple):
        raise wrong_type("a list")
    return value


def read_table(value: Any) -> Mapping[str, Any]:
    """A table by name, which `--set` and variables give as JSON.

    Raises:
        PydanticCustomError: it is not a table.
    """
    if isinstance(value, Text):
        with suppress(ValueError):
            value = parse_json(value)
    if not isinstance(value, Mapping):
        raise wrong_type("a table")
    return value


class InsideFault(PydanticCustomError):
    """What is wrong inside a setting that holds a table; the text begins with the item's name."""

    def __new__(cls, what: str) -> "InsideFault":
        """With the text as pydantic wants it: a template, and what fills it."""
        return super().__new__(cls, "inside", "{what}", {"what": what})


def wrong_type(wanted: str) -> PydanticCustomError:
    """The error that Prefect shows for a flow's parameter; `_fault` writes a more detailed one."""
    return PydanticCustomError("wrong_type", "should be {wanted}", {"wanted": wanted})


def _error_of(error: ValidationError, tree: type[BaseModel], layers: Sequence[Layer], base_origin: str) -> ConfigError:
    first = error.errors(include_url=False)[0]
    at = ".".join(filter(_is_name, first["loc"]))  # type: ignore[arg-type]
    message = first["msg"].removeprefix("Value error, ")
    field = dict(fields_of(tree)).get(at)
    involved = [at] if field else _settings_in(message, tree, at)
    mark = "." if f"{at}.{message.split(' ')[0]}" in involved else " "  # a section's rule may begin with its setting
    what = _fault(first, at, field) if field else f"{at}{mark}{message}".strip(" .")
    origins = {name: _origin_of(name, layers, base_origin) for name in involved}
    if len(set(filter(None, origins.values()))) > 1:
        sources = ", ".join(f"{name} from {origin}" for name, origin in origins.items() if origin)
        what = f"{what} ({sources})"
    num_wrong = len({tuple(filter(_is_name, each["loc"])) for each in error.errors()})
    if num_wrong > 1:
        what += f" ({counted(num_wrong - 1, 'more wrong setting')})"
    return ConfigError(what, where=_blamed(involved, layers, base_origin), remedy=EXPLAIN)


def _fault(first: ErrorDetails, name: str, field: FieldInfo) -> str:
    """Describes what is wrong with the value of one setting."""
    value, kind = first["input"], field.annotation
    if first["type"] == "inside":
        return f"{name}.{first['msg']}"
    if first["type"] == "value_error":  # from the setting's own validator
        return f"{name} is {shown(value)}: {first['msg'].removeprefix('Value error, ')}"
    if value is None:
        return f"{name} is {shown(None)}: give it a value, or omit it to use the recipe's"
    index = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    if get_origin(kind) is tuple and index:
        kind, metadata = _item_type(kind)
        return f"{name}{index} is {shown(value)}: should be {_noun(kind)}{_limits(kind, metadata)}"
    if first["type"] == "string_pattern_mismatch":
        meaning = (field.description or "").partition(";")[0]
        return f"{name} is {shown(value)}: should be text such as {' or '.join(field.examples or [])} ({meaning})"
    hint = ""
    if _is_text(kind) and not isinstance(value, str):
        hint = "; put it in quotes"
    elif isinstance(value, str) and not isinstance(value, Text) and not _is_text(kind):
        hint = ", without quotes"
    example = f", such as {as_typed(field.default)}" if get_origin(kind) is tuple else ""
    return f"{name} is {shown(value)}: should be {_noun(kind)}{limits_of(field)}{hint}{example}"


def _is_name(part: int | str) -> bool:
    """Whether a part of an error's location is a name, not the index of a list element."""
    return isinstance(part, str)


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal


def _noun(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of "
    return {int: "a whole number, ", float: "a number, "}.get(kind, "")


def _item_type(kind: Any) -> tuple[Any, Sequence[Any]]:
    """The type of a tuple's elements, and their bounds."""
    item = get_args(kind)[0]
    if get_origin(item) is not Annotated:
        return item, ()
    bare, *fields = get_args(item)
    return bare, [bound for field in fields for bound in field.metadata]


def _limits(kind: Any, metadata: Sequence[Any], examples: Sequence[Any] | None = None) -> str:
    if kind is bool:
        return "true or false"
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is dict:
        return "a table: for each name a list of values, or {min, max, log, step}"
    if get_origin(kind) is tuple:
        item, item_metadata = _item_type(kind)
        return f"a list, each {_noun(item)}{_limits(item, item_metadata)}"
    bounds = {
        bound: getattr(item, bound)
        for item in metadata
        for bound in ("ge", "gt", "le", "lt", "min_length", "max_length")
        if hasattr(item, bound)
    }
    if kind is str:
        most = f", up to {bounds['max_length']} characters" if "max_length" in bounds else ""
        least = ", not empty" if "min_length" in bounds else ""
        return f"text{most}{least}" + (f", such as {' or '.join(examples)}" if examples else "")
    return _range(bounds)


def _range(bounds: Mapping[str, Any]) -> str:
    low = f"above {_figure(bounds['gt'])}" if "gt" in bounds else _figure(bounds["ge"])
    if "lt" in bounds:
        return f"{low}{', ' if 'gt' in bounds else ' to '}below {_figure(bounds['lt'])}"
    return f"{low}{', up to ' if 'gt' in bounds else ' to '}{_figure(bounds['le'])}"


def _figure(bound: float) -> str:
    """A bound as text, large ones with underscores, which users may type too."""
    return f"{int(bound):_}" if bound == int(bound) and abs(bound) >= 10_000 else f"{bound:g}"


def _settings_in(message: str, tree: type[BaseModel], section: str) -> list[str]:
    """The settings that the message of a section's rule names, ignoring quoted values: these are the settings at fault."""
    words = set(re.findall(r"\w+(?:\.\w+)*", re.sub(r"(?<!\w)(['\"]).*?\1", "", message)))
    prefix = f"{section}." if section else ""
    return [name for name in setting_names(tree) if name in words or name.removeprefix(prefix) in words]


def _origin_of(name: str, layers: Sequence[Layer], base_origin: str) -> str:
    return next((origins[-1] for layer in reversed(layers) if (origins := _origins_in(layer, name))), base_origin)


def _origins_in(layer: Layer, name: str) -> list[str]:
    """Who gave the setting, or an item of its table."""
    return [given.origin for key, given in layer.items() if key == name or key.startswith(f"{name}.")]


def _blamed(names: Sequence[str], layers: Sequence[Layer], base_origin: str) -> str:
    """The origin of these values: the last layer that sets any of them."""
    for layer in reversed(layers):
        origins = [origin for name in names for origin in _origins_in(layer, name)]
        if origins:
            return " and ".join(dict.fromkeys(origins))
    return base_origin
