"""JSON as its standard has it: the one place where values become text. Python writes NaN and Infinity, nobody reads
them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def finite(value: Any) -> Any:
    """The same value with null for nan and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, *, default: Callable[[Any], Any] | None = None, **layout: Any) -> str:
    """Like `json.dumps`, with null for nan and infinity.

    Args: default, makes what JSON cannot hold; layout, `indent`, `sort_keys`, `separators`, `ensure_ascii`.
    Raises: TypeError for values of other types.
    """
    made = None if default is None else lambda item: finite(default(item))
    return json.dumps(finite(value), default=made, allow_nan=False, **layout)
