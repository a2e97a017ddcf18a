"""Typed configuration: frozen dataclasses filled from sparse YAML and dotted overrides.

    config = load(Config, "align/scenes", ["learner.lr=1e-4"], program="align")

A file or override may only set fields that exist, with values of the declared type: `int float bool
str`, `Literal`, `X | None` and other unions, `tuple[...]`, `dict[str, ...]`, and dataclasses nested
in any of these. An int is taken where a float is declared, and nothing else is converted. A mapping
in the file replaces a default mapping; an override changes only the key it names. A dataclass may
define `check(self) -> None`, which raises ValueError (or ConfigError) on an impossible combination;
it runs on the built value, children first.

The YAML here is 1.2 where it matters: `1e-4` is a float, only `true` and `false` are booleans (so
`on` and `no` are strings), dates are strings, and a repeated key is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from rlhf.errors import ConfigError
from rlhf.files import atomic_write_text
from rlhf.typed import FLOAT, Plain, Typed, convert, dataclass_arm, default_of, keys

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


_BOOL, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in (_BOOL, _FLOAT, _DATE)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(_FLOAT, FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_FLOAT, FLOAT, list("-+.0123456789"))  # so the text "1e-4" is quoted


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} appears twice", node.value[position][0].start_mark
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def configs_root() -> Path:
    """Folder of the shipped configurations: inside the package once installed, else at the root of
    the checkout.
    """
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"


def names(program: str | None = None) -> list[str]:
    """Names that `--config` accepts, as `program/name`."""
    found = sorted(p.relative_to(configs_root()) for p in configs_root().rglob("*.yaml"))
    return [p.with_suffix("").as_posix() for p in found if program in (None, p.parts[0])]


def find(source: str, program: str) -> Path:
    """Path of a configuration given as `program/name`, `name` or a path. Raises ConfigError."""
    if source.endswith((".yaml", ".yml")):
        if Path(source).is_file():
            return Path(source)
        raise ConfigError(
            f"expected a configuration file, got '{source}', which does not exist: write a path "
            "to a YAML "
            f"file or one of: {', '.join(names(program)) or '(none shipped)'}"
        )
    name = source if "/" in source else f"{program}/{source}"
    folder = name.split("/")[0]
    if name in names() and folder == program:
        return configs_root() / f"{name}.yaml"
    if name in names():
        raise ConfigError(
            f"'{source}' is a configuration of `rlhf {folder}`, not of `rlhf {program}`"
        )
    known = names(program)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(
        f"no configuration is called '{source}': {hint}available: {', '.join(known) or '(none)'}, "
        f"or write a path that ends in .yaml"
    )


def read_yaml(path: Path) -> dict[str, Plain]:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises ConfigError."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"expected a mapping of keys to values in {path}, got {type(data).__name__}"
        )
    return data


def load(
    cls: type[T], source: str | Path | None, overrides: Sequence[str] = (), program: str = ""
) -> T:
    """Build `cls` from a named or given file (None: defaults only) and `key.sub=value` overrides.

    Raises ConfigError, naming the dotted key, on unknown keys, wrong types and refused
    combinations.
    """
    path = find(str(source), program) if source is not None else None
    try:
        data = _fill(cls, read_yaml(path) if path else {})
        for item in overrides:
            _override(data, item)
        return convert(cls, data)
    except ConfigError as error:
        where = f" (in {path})" if path else ""
        raise ConfigError(f"{error}{where}") from error


def build(cls: type[T], data: Mapping[str, Plain]) -> T:
    """Build `cls` from plain data, as `load` does. Raises ConfigError."""
    return convert(cls, data)


def to_dict(config: Any) -> Plain:
    """Plain data (for YAML or JSON) of a configuration; tuples become lists."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return config


def to_yaml(config: Any) -> str:
    """The resolved configuration as text that `load` reads back to an equal value."""
    return yaml.dump(
        to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def save_yaml(config: Any, path: Path) -> None:
    """Write `to_yaml(config)` to `path`, whole or not at all."""
    atomic_write_text(path, to_yaml(config))


def _fill(cls: Any, data: Plain, base: Any = None) -> Plain:
    """Add to sparse `data` the defaults of `cls` (or the values of the instance `base`), so that an
    override of one key keeps its neighbours. Required fields stay absent and unknown keys stay in.
    """
    if not isinstance(data, Mapping):
        return data
    full: dict[str, Plain] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = getattr(base, field.name) if base is not None else default_of(field)
        nested = dataclass_arm(hints[field.name])
        if field.name not in data:
            if default is not dataclasses.MISSING:
                full[field.name] = to_dict(default)
        elif nested:
            inner = default if dataclasses.is_dataclass(default) else None
            full[field.name] = _fill(nested, data[field.name], inner)
        else:
            full[field.name] = data[field.name]
    return full | {key: value for key, value in data.items() if key not in full}


def _override(data: dict[str, Plain], item: str) -> None:
    """Set one `key.sub=value` in place. Raises ConfigError."""
    dotted, equals, text = item.partition("=")
    if not equals or not dotted or "" in dotted.split("."):
        raise ConfigError(f"expected an override of the form key.sub=value, got '{item}'")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in '{item}' is not valid YAML: {error}") from error
    *path, last = dotted.split(".")
    for depth, key in enumerate(path):
        if data.get(key) is None:
            data[key] = {}
        if not isinstance(data[key], dict):
            got = ".".join(path[: depth + 1])
            raise ConfigError(
                f"'{dotted}' cannot be set: '{got}' is a plain value, write {got}=..."
            )
        data = data[key]
    data[last] = value if isinstance(value, dict | list) else Typed(text, value)


__all__ = [
    "build",
    "configs_root",
    "find",
    "keys",
    "load",
    "names",
    "read_yaml",
    "save_yaml",
    "to_dict",
    "to_yaml",
]
