"""Help text of a config dataclass: every key with its default and the docstring under the field."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import keyword
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from kinema.configs.models.table import MODELS


def describe(schema: Any, required: Sequence[str] = (), common: Sequence[str] = ()) -> str:
    """One entry per key with what it may be, sections flattened to dotted keys, those of models under their names.

    Args: required, keys that must be given: they come first and are marked; common, keys that are often set: they come
        next, before all others. Both as dotted keys.
    """
    entries, of_models = dict(_entries(schema, "", required)), _model_sections(schema, "")
    often = [key for key in entries if key in common and key not in required]
    rest = [key for key in entries if key not in (*required, *often)]
    lines = [entries[key] for key in (*required, *often) if key in entries]
    if lines and rest:
        lines.append("  rarely set:")
    return "\n".join([*lines, *(entries[key] for key in rest), *of_models])


def _entries(schema: Any, prefix: str, required: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """(dotted key, its lines of help) of all keys but those of models."""
    docs, hints = field_docs(schema), typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if "sections" in field.metadata:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _entries(hints[field.name], f"{prefix}{field.name}.", required)
            continue
        key = f"{prefix}{key_of(field.name)}"
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        allowed = choices(hints[field.name], field.metadata)
        first = f"  {key}={default}" + (f"  ({' | '.join(allowed)})" if allowed else "")
        text = textwrap.fill(docs.get(field.name, ""), 100, initial_indent="      ", subsequent_indent="      ")
        yield key, f"{first}{'  REQUIRED' if key in required else ''}\n{text}"


def _model_sections(schema: Any, prefix: str) -> list[str]:
    """The keys of each model's settings, under the names of the models that take them."""
    lines, hints = [], typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if "sections" in field.metadata:
            for section, settings in MODELS.sections().items():
                models = ", ".join(name for name, row in MODELS.items() if row.section == section and row.recipe)
                lines += [f"  settings of model={models}:", *dict(_entries(settings, f"{prefix}{section}.")).values()]
        elif dataclasses.is_dataclass(hints[field.name]):
            lines += _model_sections(hints[field.name], f"{prefix}{field.name}.")
    return lines


def key_of(field_name: str) -> str:
    """The key of a field: Python's own words (`from`) end in an underscore as field names only."""
    bare = field_name.removesuffix("_")
    return bare if keyword.iskeyword(bare) else field_name


def key_names(schema: Any, prefix: str = "") -> list[str]:
    """Every key of a schema, dotted."""
    hints, names = typing.get_type_hints(schema), []
    for field in dataclasses.fields(schema):
        if "sections" in field.metadata:
            for section, settings in MODELS.sections().items():
                names += key_names(settings, f"{prefix}{section}.")
        elif dataclasses.is_dataclass(hints[field.name]):
            names += key_names(hints[field.name], f"{prefix}{field.name}.")
        else:
            names.append(f"{prefix}{key_of(field.name)}")
    return names


def choices(hint: Any, metadata: Any) -> tuple[str, ...]:
    """The values that a key may have, if they are words; empty otherwise."""
    if "choices" in metadata:
        return tuple(metadata["choices"]())
    inner = next(iter(typing.get_args(hint)), None) if typing.get_origin(hint) is tuple else hint
    return tuple(map(str, typing.get_args(inner))) if typing.get_origin(inner) is typing.Literal else ()


@functools.cache
def field_docs(schema: Any) -> dict[str, str]:
    """{field: docstring} of a dataclass, read from its source and its parents'."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    parents: tuple[Any, ...] = schema.__bases__
    for parent in parents:
        if dataclasses.is_dataclass(parent):
            docs |= field_docs(parent)
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                docs[node.target.id] = " ".join(after.value.value.split())
    return docs
