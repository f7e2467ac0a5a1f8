"""Help text of a config dataclass: every key with its default and the docstring under the field."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import keyword
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

from kinema.configs.models.table import MODELS


def describe(schema: Any, prefix: str = "", required: Sequence[str] = ()) -> str:
    """One entry per key with what it may be, sections flattened to dotted keys, those of models under their names.

    Args: required, keys that must be given: they come first and are marked.
    """
    docs, hints, lines = field_docs(schema), typing.get_type_hints(schema), []
    for field in sorted(dataclasses.fields(schema), key=lambda field: field.name not in required):
        if "sections" in field.metadata:
            for section, settings in MODELS.sections().items():
                models = ", ".join(name for name, row in MODELS.items() if row.section == section and row.recipe)
                lines += [f"  settings of model={models}:", describe(settings, f"{prefix}{section}.")]
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            lines.append(describe(hints[field.name], f"{prefix}{field.name}."))
            continue
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        allowed = choices(hints[field.name], field.metadata)
        mark = "  REQUIRED" if field.name in required else ""
        lines.append(
            f"  {prefix}{key_of(field.name)}={default}" + (f"  ({' | '.join(allowed)})" if allowed else "") + mark
        )
        lines.append(textwrap.fill(docs.get(field.name, ""), 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


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
    for parent in filter(dataclasses.is_dataclass, schema.__bases__):
        docs |= field_docs(parent)
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                docs[node.target.id] = " ".join(after.value.value.split())
    return docs
