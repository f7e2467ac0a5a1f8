"""Config files and command lines into frozen dataclasses: defaults < yaml < `key=value`.

An unknown key names its nearest neighbour; a wrong value names the key, the value and what it may be.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import keyword
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from kinema.configs.describe import key_of
from kinema.configs.json_text import json_text
from kinema.configs.models.table import MODELS
from kinema.configs.paths import placed
from kinema.configs.workflow import STAGES, WorkflowConfig

T = TypeVar("T")
FOLDER = Path(__file__).resolve().parent


def load_stage(stage: str, path: str | Path | None = None, overrides: Sequence[str] = (), *, away: bool = False) -> Any:
    """The config of one stage.

    Args: stage, a key of `STAGES`; path, a workflow file (its section `stage` is read; for `run` all of it);
        overrides, `key=value` with dotted keys relative to the stage's section, and `root=FOLDER`, under which
        relative paths then lie; away, whether it will run elsewhere, where relative paths mean nothing.
    Returns: the stage's frozen dataclass.
    Raises: ValueError naming the key or value, what is allowed, and the nearest key.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is not known; stages are {', '.join(STAGES)}")
    workflow = _field_names(_read_yaml(path)) if path else {}
    _check_keys(workflow, WorkflowConfig, where=str(path))
    section = workflow if stage == "run" else workflow.get(stage) or {}
    if stage != "run" and workflow.get("experiment") and "experiment" in _fields(STAGES[stage]):
        section = {"experiment": workflow["experiment"], **section}
    roots = [text.removeprefix("root=") for text in overrides if text.startswith("root=")]
    config = build(STAGES[stage], section, [text for text in overrides if not text.startswith("root=")])
    return placed(config, roots[-1] if roots else "", away=away)


def build(schema: type[T], values: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `schema` from a nested mapping and `key=value` overrides."""
    values = _field_names(values or {})
    _check_keys(values, schema, where="config")
    merged = _merge(OmegaConf.structured(_flat_schema(schema)), _yes_and_no(values, schema), "config file")
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ValueError(f"argument {override!r} is not key=value; write for example steps=100")
        key = ".".join(map(field_name, key.split(".")))
        leaf = _leaf_type(key, schema)
        try:
            value = text if leaf is str or text in typing.get_args(leaf) else safe_load(text)
        except YAMLError:
            raise ValueError(f"{override}: the value is not valid YAML; write lists as [1,2]") from None
        if typing.get_origin(leaf) is tuple and not isinstance(value, list):
            raise ValueError(f"{override}: {key} is a list; write {key}=[{text}]")
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merged = _merge(merged, nested, override)
    found = typing.cast(dict, OmegaConf.to_container(merged, resolve=True))
    for override in overrides:
        _refuse_without_effect(override, schema, found)
    return typing.cast(T, _construct(schema, found))


def to_mapping(config: Any) -> dict[str, Any]:
    """A config as nested mappings with the keys of files and of the command line, the way back from `build`."""
    mapping: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if chooser := f.metadata.get("sections"):
            if value is not None:
                mapping[MODELS[getattr(config, chooser)].section] = to_mapping(value)
        else:
            mapping[key_of(f.name)] = to_mapping(value) if dataclasses.is_dataclass(value) else value
    return mapping


def field_name(key: str) -> str:
    """The field behind a key: Python's own words (`from`) end in an underscore there."""
    return f"{key}_" if keyword.iskeyword(key) else key


def _field_names(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        field_name(str(key)): _field_names(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def _merge(base: DictConfig, values: Mapping[str, Any], source: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, OmegaConf.create(dict(values)))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or source.partition("=")[0]).partition("[")[0]
        given = source if "=" in source else f"{source}: {key}={_value_at(values, key)}"
        raise ValueError(f"{given} does not fit: {key} is {_in_words(key, base)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _value_at(values: Any, key: str) -> Any:
    """What a file says for a dotted key."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _in_words(key: str, base: DictConfig) -> str:
    """What a setting may be, for people."""
    node: Any = base
    for part in key.split(".")[:-1]:
        node = node[part]
    name = key.rpartition(".")[2]
    kind = typing.get_type_hints(OmegaConf.get_type(node)).get(name, str)
    if typing.get_origin(kind) is tuple:
        first, *rest = typing.get_args(kind)
        inner = _WORDS.get(first, f"one of {', '.join(map(str, typing.get_args(first)))}")
        count = "" if Ellipsis in rest else f" of {len(rest) + 1}"
        return f"a list{count}, each {inner}, as in [1,2]"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return _WORDS.get(kind, "a value of another kind")


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def resolve_config_path(name: str | Path) -> Path:
    """A config file by path, or by the name of one of the packaged configs (`demo`, `demo.yaml`)."""
    path = Path(name)
    for candidate in (path, FOLDER / path.name, FOLDER / f"{path.name}.yaml"):
        if candidate.is_file():
            return candidate
    packaged = ", ".join(sorted(p.name for p in FOLDER.glob("*.yaml")))
    raise ValueError(f"config file {str(name)!r} does not exist; packaged ones are {packaged}")


def config_hash(config: Any) -> str:
    """blake2b-128 hex of a dataclass (or mapping) in canonical JSON."""
    mapping = to_mapping(config) if dataclasses.is_dataclass(config) else config
    text = json_text(mapping, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read_yaml(name: str | Path) -> dict[str, Any]:
    path = resolve_config_path(name)
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OmegaConfBaseException as error:
        where = f" at {error.full_key}" if getattr(error, "full_key", None) else ""
        raise ValueError(
            f"config file {path} refers to something that is not there{where}; check its ${{...}}"
        ) from None
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"config file {path} holds a {type(loaded).__name__}; write `section: {{key: value}}`")
    return {str(key): value for key, value in loaded.items()}


def _fields(schema: Any) -> dict[str, Any]:
    """{key: type} as files and the command line know them: a model's settings are sections, one for each model."""
    hints, found = typing.get_type_hints(schema), dict[str, Any]()
    for f in dataclasses.fields(schema):
        found |= MODELS.sections() if "sections" in f.metadata else {f.name: hints[f.name]}
    return found


def _flat_schema(schema: Any) -> Any:
    """The schema with those keys, for merging only: it checks types, and its values are checked when they are whole."""
    defaults = {f.name: f for f in dataclasses.fields(schema)}
    fields: list[tuple[str, Any, Any]] = []
    for name, kind in _fields(schema).items():
        if dataclasses.is_dataclass(kind):
            flat = _flat_schema(kind)
            fields.append((name, flat, dataclasses.field(default_factory=flat)))
        else:
            own = defaults[name]
            made = own.default_factory
            kept = (
                dataclasses.field(default=own.default)
                if made is dataclasses.MISSING
                else dataclasses.field(default_factory=made)
            )
            fields.append((name, kind, kept))
    return dataclasses.make_dataclass(schema.__name__, fields)


def _construct(schema: Any, values: Mapping[str, Any]) -> Any:
    """The frozen dataclass, of whose models' sections only the chosen model's is taken; lists become tuples."""
    hints, arguments = typing.get_type_hints(schema), {}
    for f in dataclasses.fields(schema):
        if chooser := f.metadata.get("sections"):
            row = MODELS.get(values[chooser])
            if row is not None and row.settings is not None:
                arguments[f.name] = _construct(row.settings, values[row.section])
        elif dataclasses.is_dataclass(hints[f.name]):
            arguments[f.name] = _construct(hints[f.name], values[f.name])
        else:
            arguments[f.name] = _tuples(values[f.name])
    return schema(**arguments)


def _refuse_without_effect(override: str, schema: Any, values: Mapping[str, Any]) -> None:
    """Raises: ValueError for an override in the section of a model that is not the chosen one."""
    parts = [field_name(part) for part in override.partition("=")[0].split(".")]
    for part in parts[:-1]:
        for f in dataclasses.fields(schema):
            row = MODELS.get(values[f.metadata["sections"]]) if "sections" in f.metadata else None
            if row is not None and part in MODELS.sections() and part != row.section:
                theirs = f"its settings are {row.section}.*" if row.section else "it has no settings"
                raise ValueError(f"{override} has no effect with model={row.name}; {theirs}")
        schema, values = _fields(schema)[part], values[part]
        if not dataclasses.is_dataclass(schema):
            return


def _unknown(key: str, schema: Any, prefix: str, where: str) -> ValueError:
    names = sorted(_fields(schema))
    near = difflib.get_close_matches(key.rsplit(".", 1)[-1], names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"keys here are {', '.join(names)}"
    return ValueError(f"{where}: unknown key {prefix}{key}; {hint}")


def _check_keys(values: Mapping[Any, Any], schema: Any, where: str, prefix: str = "") -> None:
    fields = _fields(schema)
    for key, value in values.items():
        if key not in fields:
            raise _unknown(str(key), schema, prefix, where)
        if dataclasses.is_dataclass(fields[key]):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{where}: {prefix}{key}={value!r} is a section; write {prefix}{key}.KEY=VALUE")
            _check_keys(value or {}, fields[key], where, f"{prefix}{key}.")


def _leaf_type(key: str, schema: Any) -> Any:
    """The annotated type of a dotted key; ValueError for unknown keys and for whole sections."""
    parts, prefix = key.split("."), ""
    for depth, part in enumerate(parts):
        fields = _fields(schema)
        if part not in fields:
            raise _unknown(part, schema, prefix, "command line")
        prefix += part + "."
        if depth + 1 < len(parts):
            if typing.get_origin(fields[part]) is dict:
                return Any
            if not dataclasses.is_dataclass(fields[part]):
                raise ValueError(f"command line: {key} goes below {prefix[:-1]}, which has no keys of its own")
            schema = fields[part]
        elif dataclasses.is_dataclass(fields[part]):
            raise ValueError(f"command line: {key} is a section; write {key}.KEY=VALUE")
    return fields[parts[-1]]


def _yes_and_no(values: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """YAML reads a bare yes or no as a boolean; where the words are choices, they are meant as words."""
    fields = _fields(schema)
    words: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(fields[key]):
            words[key] = _yes_and_no(value or {}, fields[key])
        else:
            is_word = isinstance(value, bool) and "yes" in typing.get_args(fields[key])
            words[key] = ("yes" if value else "no") if is_word else value
    return words


def _tuples(value: Any) -> Any:
    """OmegaConf turns tuples into lists; frozen dataclasses hold tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
