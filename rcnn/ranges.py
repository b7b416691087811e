"""The values that a search may give to a setting: a list of choices, or a range.

In: what a user wrote for `tune.space`. Out: values of the settings' own types, by dotted name; or one line that names the
setting, the value found and the bound that it breaks. The bounds are those of the setting itself, so a setting that is
added to the schema can be searched without more code.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo

from rcnn.section import InsideFault, Section, Text, limits_of, read_items, read_table, shown, value_of

LARGEST = 1_000_000_000
Scalar = bool | int | float | str

SHAPE = 'a list of values, or a range such as {"min": 0.001, "max": 0.1, "log": true}'


class Range(Section):
    """All values from min to max, both included."""

    min: float = Field(ge=0, le=LARGEST, description="Lower end.")
    max: float = Field(ge=0, le=LARGEST, description="Upper end.")
    log: bool = Field(False, description="Whether each power of ten is as likely as the next.")
    step: float = Field(
        0, ge=0, le=LARGEST, description="Distance between neighbours; 0: any value, or every whole number."
    )


Values = Range | tuple[Scalar, ...]
"""What a search may give to one setting."""


def read_space(given: Any, fields: Mapping[str, FieldInfo]) -> dict[str, Values]:
    """The values to search, by dotted setting name.

    Args:
        given: a table by dotted names, or by sections and names; each value a list or a range, as Python, JSON, or text.
        fields: the settings that may be searched.

    Raises:
        InsideFault: a name or a value in it is wrong.
        PydanticCustomError: it is not a table.
    """
    space = {}
    for name, values in _flattened(read_table(given), fields):
        if name not in fields:
            raise InsideFault(_unknown(name, fields))
        if isinstance(values, Text) and not values.strip():
            continue  # `--set tune.space.model.t=` leaves out what the recipe searches
        space[name] = _read_values(name, fields[name], values)
    return space


def _flattened(table: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> Iterator[tuple[str, Any]]:
    """`{"model": {"k": ...}}`, as TOML and YAML make of sections, and `{"model.k": ...}` alike."""
    sections = {name.partition(".")[0] for name in fields}
    for name, value in table.items():
        if name in sections and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", values) for inner, values in value.items())
        else:
            yield name, value


def _unknown(name: str, fields: Mapping[str, FieldInfo]) -> str:
    near = difflib.get_close_matches(name.lower(), fields, n=1, cutoff=0.75)
    hint = f" (did you mean {near[0]})" if near else ""
    sections = ", ".join(dict.fromkeys(known.partition(".")[0] for known in fields))
    return f"{name} cannot be searched{hint}: it should be a setting of {sections} that changes how a trial trains"


def _read_values(name: str, field: FieldInfo, values: Any) -> Values:
    if isinstance(values, Range):
        values = values.model_dump()
    try:
        if isinstance(values, Mapping) or (isinstance(values, Text) and values.strip().startswith("{")):
            table: Mapping[str, Any] | None = read_table(values)
        else:
            table, items = None, read_items(_as_list(values))
    except ValueError as error:
        raise InsideFault(f"{name} is {shown(values)}: should be {SHAPE}") from error
    return _read_choices(name, field, items) if table is None else _read_range(name, field, table)


def _as_list(values: Any) -> Any:
    """With the brackets that `--set tune.space.model.k=16,32` leaves out."""
    is_bare = isinstance(values, Text) and not values.strip().startswith("[")
    return Text(f"[{values}]") if is_bare else values


def _read_choices(name: str, field: FieldInfo, items: Any) -> tuple[Scalar, ...]:
    choices: list[Scalar] = []
    for index, item in enumerate(items):
        item = Text(item.strip()) if isinstance(item, Text) else item
        value = value_of(field, item, f"{name}[{index}]")
        if value in choices:
            raise InsideFault(f"{name} has {shown(value)} twice; keep one")
        choices.append(value)
    if not choices:
        raise InsideFault(f"{name} is []: should be {SHAPE}")
    return tuple(choices)


def _read_range(name: str, field: FieldInfo, given: Mapping[str, Any]) -> Range:
    if field.annotation not in (int, float):
        raise InsideFault(f"{name} is a range: should be a list of values ({limits_of(field)})")
    unknown = sorted(set(given) - set(Range.model_fields))
    missing = [end for end in ("min", "max") if end not in given]
    if unknown or missing:
        fault = f"has no {missing[0]}" if missing else f"has {unknown[0]!r}"
        raise InsideFault(f"{name} {fault}: a range has min and max, and may have log and step")
    ends = {end: value_of(field, given[end], f"{name}.{end}") for end in ("min", "max")}
    rest = {key: value_of(Range.model_fields[key], given[key], f"{name}.{key}") for key in given if key not in ends}
    values = Range(**ends, **rest)
    if fault := _fault_of(values, is_whole=field.annotation is int):
        raise InsideFault(f"{name}{fault}")
    return values


def _fault_of(values: Range, *, is_whole: bool) -> str:
    if values.min >= values.max:
        return f".min = {values.min:g} is not below max = {values.max:g}; lower the one or raise the other"
    if values.log and values.min == 0:
        return ".min is 0, and log = true needs one above 0"
    if values.log and values.step:
        return " has both log and step; leave one out"
    if values.step > values.max - values.min:
        return f".step = {values.step:g} is more than max - min"
    if values.step and (values.max - values.min) / values.step > LARGEST:
        return f".step = {values.step:g} is too small for the range; leave it out for any value"
    if is_whole and values.step % 1:
        return f".step is {values.step:g}: should be a whole number"
    return ""


def is_continuous(values: Values, field: FieldInfo) -> bool:
    """Whether there is a value between any two, so that a grid cannot list them all."""
    return isinstance(values, Range) and field.annotation is float and not values.step
