"""Plain data to typed values, strictly, and what to say when the types do not fit.

`convert(Config, data)` is the second half of `rlhf.config.load`; the rules are in that module's
docstring.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rlhf.errors import AlignError, ConfigError

Plain = Any  # None, bool, int, float, str, list of Plain, dict of str to Plain
FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$"  # 1  1.5  .5  1e-4
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Typed:
    """A value from the command line: its text, for fields that want text, and YAML's reading."""

    text: str
    value: Plain


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a config class; keys of mappings are not listed."""
    found = []
    for name, hint in get_type_hints(cls).items():
        nested = dataclass_arm(hint)
        found += keys(nested, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return found


def default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def dataclass_arm(hint: Any) -> Any:
    """The dataclass in `Sub` or `Sub | None`, else None."""
    arms = [a for a in get_args(hint) if a is not type(None)] if _is_union(hint) else [hint]
    return arms[0] if len(arms) == 1 and dataclasses.is_dataclass(arms[0]) else None


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def convert(hint: Any, data: Plain, key: str = "", root: type | None = None) -> Any:
    """`data` as a value of type `hint`. Raises ConfigError.

    `key` is the dotted name of the value and `root` the class of the whole configuration, for
    messages.
    """
    root = root or hint
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(hint, data, key, root)
    if _is_union(hint):
        return _convert_union(hint, data, key, root)
    if origin is Literal:
        return _convert_literal(hint, data, key)
    if origin is tuple:
        return _convert_tuple(hint, _shallow(data), key, root)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return _convert_dict(hint, _shallow(data), key, root)
    return _convert_scalar(hint, data, key)


def _shallow(data: Plain) -> Plain:
    return data.value if isinstance(data, Typed) else data


def _plain(data: Plain) -> Plain:
    """`data` without the texts of its command-line values."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return _shallow(data)


def _refuse(hint: Any, data: Plain, key: str) -> ConfigError:
    value = _plain(data)
    return ConfigError(
        f"'{key}' expects {_spell(hint)}, got {value!r} ({type(value).__name__}): write "
        f"{key}={_example(hint)}"
    )


def _convert_scalar(hint: Any, data: Plain, key: str) -> Any:
    value = _plain(data)
    if hint is Any:
        return value
    if hint is str and isinstance(data, Typed):
        return value if isinstance(value, str) else data.text
    if hint is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str) and FLOAT.match(value):
            return float(value)
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    elif hint is type(None) and value is None:
        return None
    raise _refuse(hint, data, key)


def _convert_literal(hint: Any, data: Plain, key: str) -> Any:
    choices = get_args(hint)
    options = [data.text, data.value] if isinstance(data, Typed) else [data]
    for option in options:
        for choice in choices:
            if type(option) is type(choice) and option == choice:
                return choice
    close = difflib.get_close_matches(str(_plain(data)), [str(c) for c in choices], n=1)
    hint_text = f"did you mean '{close[0]}'?" if close else f"write {key}={choices[0]}"
    raise ConfigError(f"'{key}' expects {_spell(hint)}, got {_plain(data)!r}: {hint_text}")


def _convert_union(hint: Any, data: Plain, key: str, root: Any) -> Any:
    arms = [arm for arm in get_args(hint) if arm is not type(None)]
    if len(arms) < len(get_args(hint)) and _plain(data) is None:
        return None
    if len(arms) == 1:
        try:
            return convert(arms[0], data, key, root)
        except ConfigError:
            if dataclasses.is_dataclass(arms[0]) or get_origin(arms[0]) in (dict, Mapping, tuple):
                raise  # the message about the part says more than one about the union
            raise _refuse(hint, data, key) from None
    parts = [arm for arm in arms if dataclasses.is_dataclass(arm)]
    if len(parts) == 1 and isinstance(_shallow(data), Mapping):
        return convert(parts[0], data, key, root)  # its own message says more
    for arm in sorted(arms, key=lambda a: a is not type(_plain(data))):  # an exact type first
        try:
            return convert(arm, data, key, root)
        except ConfigError:
            continue
    raise _refuse(hint, data, key)


def _convert_tuple(hint: Any, data: Plain, key: str, root: Any) -> tuple:
    parts = get_args(hint)
    if not isinstance(data, list | tuple):
        raise _refuse(hint, data, key)
    if len(parts) == 2 and parts[1] is Ellipsis:
        parts = (parts[0],) * len(data)
    if len(parts) != len(data):
        raise _refuse(hint, data, key)
    pairs = zip(parts, data, strict=True)
    try:
        return tuple(convert(p, item, f"{key}[{i}]", root) for i, (p, item) in enumerate(pairs))
    except ConfigError:
        if any(isinstance(item, dict) for item in data):
            raise  # the message about the part says more
        raise _refuse(hint, data, key) from None


def _convert_dict(hint: Any, data: Plain, key: str, root: Any) -> dict:
    if not isinstance(data, Mapping) or not all(isinstance(k, str) for k in data):
        raise _refuse(hint, data, key)
    arm = get_args(hint)[1] if get_args(hint) else Any
    return {name: convert(arm, item, f"{key}.{name}", root) for name, item in data.items()}


def _convert_dataclass(cls: Any, data: Plain, key: str, root: Any) -> Any:
    data = _shallow(data)
    if not isinstance(data, Mapping):
        raise _refuse(cls, data, key or cls.__name__)
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    prefix = f"{key}." if key else ""
    for name in data:
        if name not in fields:
            raise ConfigError(_unknown(f"{prefix}{name}", name, prefix, fields, root))
    missing = [
        n for n, f in fields.items() if n not in data and default_of(f) is dataclasses.MISSING
    ]
    if missing:
        dotted = f"{prefix}{missing[0]}"
        example = _example(hints[missing[0]])
        raise ConfigError(f"'{dotted}' has no default and was not given: write {dotted}={example}")
    values = {
        name: convert(hints[name], item, f"{prefix}{name}", root) for name, item in data.items()
    }
    try:
        config = cls(**values)
        if hasattr(config, "check"):
            config.check()
    except AlignError:
        raise
    except ValueError as error:
        raise ConfigError(f"'{key}': {error}" if key else str(error)) from error
    return config


def _unknown(dotted: str, name: Any, prefix: str, fields: Mapping[str, Any], root: Any) -> str:
    """Message for a key that does not exist: one spelt alike, or the same name elsewhere."""
    close = difflib.get_close_matches(str(name), list(fields), n=1)
    elsewhere = [k for k in keys(root) if k.split(".")[-1] == str(name)]
    if close:
        hint = f"did you mean '{prefix}{close[0]}'?"
    elif elsewhere:
        hint = f"did you mean '{elsewhere[0]}'?"
    else:
        near = difflib.get_close_matches(dotted, keys(root), n=1)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else f"known here: {', '.join(fields) or 'no keys'}"
        )
    return f"there is no key '{dotted}': {hint}"


def _spell(hint: Any) -> str:
    """A type in words."""
    args = get_args(hint)
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if _is_union(hint):
        return " or ".join(_spell(a) for a in args)
    if dataclasses.is_dataclass(hint):
        return f"a mapping with {', '.join(f.name for f in dataclasses.fields(hint))}"
    if get_origin(hint) is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {_spell(args[0])}"
        return "[" + ", ".join(_spell(a) for a in args) + "]"
    if get_origin(hint) in (dict, Mapping):
        return f"a mapping of names to {_spell(args[1])}"
    return getattr(hint, "__name__", str(hint))


def _example(hint: Any) -> str:
    """A value of a type, as one would type it."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return str(args[0])
    if _is_union(hint):
        return _example(args[0])
    if get_origin(hint) is tuple:
        return "[" + ",".join(_example(a) for a in args if a is not Ellipsis) + "]"
    simple = {int: "4", float: "0.5", bool: "true", str: "text"}
    return simple.get(hint, "{...}")
