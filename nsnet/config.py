"""Converts frozen dataclasses to JSON and back; an unknown or missing setting is an error.

Ids are computed from this JSON. A setting that a release adds is `added`: it is left out while it has its default, so
that settings of older releases can be read, and keep their ids.
"""

import dataclasses
import json
import types
import typing
from typing import Any, Final, TypeVar

from nsnet.errors import ConfigError

T = TypeVar("T")

_ADDED: Final = "added"


def added(default: Any) -> Any:
    """Field of a dataclass that older releases do not know: JSON without it means the default."""
    return dataclasses.field(default=default, metadata={_ADDED: True})


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a nested dataclass to JSON-ready dictionaries, without added settings that have their default."""
    values = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if _ADDED in field.metadata and value == field.default:
            del values[field.name]
        elif dataclasses.is_dataclass(value):
            values[field.name] = to_dict(value)
    return values


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """Build a dataclass from the output of `to_dict`. Raises `ConfigError` with the path of an invalid setting."""
    where = where or kind.__name__
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, got {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(typing.cast(Any, kind))
    unknown = set(values) - {field.name for field in fields}
    missing = {field.name for field in fields if _ADDED not in field.metadata} - set(values)
    if unknown or missing:
        raise ConfigError(f"{where}: unknown settings {sorted(unknown)}, missing settings {sorted(missing)}")
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
    values = to_dict(config)
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
