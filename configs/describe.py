"""Help text of a config dataclass: every key with its default and the docstring under the field."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from typing import Any


def describe(schema: Any, prefix: str = "") -> str:
    """One entry per key, sections flattened to dotted keys."""
    docs, hints, lines = field_docs(schema), typing.get_type_hints(schema), []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            lines.append(describe(hints[field.name], f"{prefix}{field.name}."))
            continue
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        lines.append(f"  {prefix}{field.name}={default}")
        lines.append(textwrap.fill(docs.get(field.name, ""), 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


@functools.cache
def field_docs(schema: Any) -> dict[str, str]:
    """{field: docstring} of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                docs[node.target.id] = " ".join(after.value.value.split())
    return docs
