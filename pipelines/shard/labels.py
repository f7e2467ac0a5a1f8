"""Labels as JSON can hold them."""

from __future__ import annotations

import json
from typing import Any

from kinema.configs.json_text import finite


def plain_labels(value: Any) -> Any:
    """A value of JSON's types: nan and infinity become null, what is no text becomes its text, half characters `?`."""
    if isinstance(value, dict):
        return {_text(str(key)): plain_labels(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_labels(item) for item in value]
    if isinstance(value, str):
        return _text(value)
    return finite(value) if isinstance(value, int | float | bool) or value is None else _text(str(value))


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def read_json(text: str) -> Any:
    """The value, or the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
