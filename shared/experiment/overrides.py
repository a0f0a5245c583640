"""Change fields of a frozen config by name: `lr`, or `model.hidden_size` inside a nested one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from shared.experiment.contracts import AssayError


class UnknownName(AssayError):
    """A study, arm, field or scale that does not exist; the message holds the closest one that does."""


class BadValue(AssayError):
    """The text cannot be read as a value of the field's type."""


def suggest(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a name that does not exist."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names) or 'none'}."
    return UnknownName(f"Unknown {kind} {name!r}: {hint}")


def replace_fields(config: Any, values: Mapping[str, Any]) -> Any:
    """Copy of a frozen dataclass with fields replaced; a dot leads into nested ones. Raises `UnknownName`."""
    for name, value in values.items():
        config = _replace(config, name, value, parse=False)
    return config


def set_fields(config: Any, texts: Mapping[str, str]) -> Any:
    """As `replace_fields`, with values as text, read by the type of the field. Raises `UnknownName`, `BadValue`."""
    for name, text in texts.items():
        config = _replace(config, name, text, parse=True)
    return config


def field_names(config: Any, prefix: str = "") -> list[str]:
    """All names that `set_fields` takes, nested ones with dots."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(value):
            names += field_names(value, f"{prefix}{field.name}.")
    return names


def _replace(config: Any, name: str, value: Any, parse: bool, prefix: str = "") -> Any:
    head, _, rest = name.partition(".")
    if not dataclasses.is_dataclass(config) or head not in {field.name for field in dataclasses.fields(config)}:
        known = field_names(config, prefix) if dataclasses.is_dataclass(config) else ()
        raise suggest("field", prefix + name, known)
    current = getattr(config, head)
    if rest:
        changed = _replace(current, rest, value, parse, f"{prefix}{head}.")
    else:
        changed = _parse(prefix + name, value, _hint(config, head)) if parse else value
    return dataclasses.replace(config, **{head: changed})  # pyright: ignore[reportArgumentType]


def _hint(config: Any, name: str) -> Any:
    try:
        return typing.get_type_hints(type(config))[name]
    except NameError:  # a type that is imported for type checking only
        return type(getattr(config, name))


def _parse(name: str, text: str, hint: Any) -> Any:
    try:
        return _convert(text.strip(), hint)
    except ValueError as error:
        readable = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
        raise BadValue(f"Field {name!r} takes {readable}, which {text!r} is not.") from error


def _convert(text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first(text, [argument for argument in arguments if argument is not str], str in arguments)
    if origin is typing.Literal:
        return {str(choice): choice for choice in arguments}[text] if text in map(str, arguments) else _fail(text)
    if origin in (tuple, list):
        items = [_convert(item.strip(), arguments[0]) for item in text.strip("()[]").split(",") if item.strip()]
        return origin(items)
    if hint is type(None):
        return None if text.lower() == "none" else _fail(text)
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower()) if text.lower() in ("true", "false") else _fail(text)
    return hint(text) if hint in (int, float, str) else _fail(text)


def _first(text: str, hints: list[Any], or_text: bool) -> Any:
    for hint in hints:
        try:
            return _convert(text, hint)
        except ValueError:
            continue
    return text if or_text else _fail(text)


def _fail(text: str) -> Any:
    raise ValueError(text)
