"""Converts frozen dataclasses to JSON and back; an unknown or missing setting is an error.

A setting that later releases added (`later`) is stored only where it differs from its default: the stored settings of
older releases, and the ids that are digests of them, stay as they are.
"""

import dataclasses
import json
import types
import typing
from typing import Any, Final, TypeVar

from nsnet.errors import ConfigError

T = TypeVar("T")
LATER: Final = "later"
"""Key in a field's metadata."""


def later(default: Any) -> Any:
    """Field that a later release added. Its default must be what older releases did."""
    return dataclasses.field(default=default, metadata={LATER: True})


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a nested dataclass to JSON-ready dictionaries, without `later` settings that have their default."""
    return _without_defaults(config, dataclasses.asdict(config))


def _without_defaults(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _without_defaults(value, values[field.name])
        elif LATER in field.metadata and value == field.default:
            del values[field.name]
    return values


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """Build a dataclass from the output of `to_dict`. Raises `ConfigError` with the path of an invalid setting."""
    where = where or kind.__name__
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, got {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(typing.cast(Any, kind))
    names = {field.name for field in fields}
    missing = {field.name for field in fields if LATER not in field.metadata} - set(values)
    if missing or not names >= set(values):
        raise ConfigError(
            f"{where}: unknown settings {sorted(set(values) - names)}, missing settings {sorted(missing)}"
        )
    return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {arguments}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is dict:
        hint = dict
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def override(config: T, name: str, value: str) -> T:
    """Return a copy with one setting replaced: `name` such as `lora.rank`, `value` as JSON or a bare word.

    Raises `ConfigError` if the setting does not exist or the value is invalid.
    """
    values = dataclasses.asdict(typing.cast(Any, config))  # with every setting, so that each can be named
    section: Any = values
    path = name.split(".")
    for part in path[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or path[-1] not in section:
        raise ConfigError(f"{type(config).__name__} has no setting {name!r}; it has {', '.join(sorted(values))}")
    try:
        section[path[-1]] = json.loads(value)
    except ValueError:
        section[path[-1]] = value
    return from_dict(type(config), values)
