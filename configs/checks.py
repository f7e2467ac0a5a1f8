"""The form in which every setting refuses a value: key, value, rule."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raises: ValueError naming key, value and rule unless the rule holds."""
    if not holds:
        raise ValueError(f"{key}={value} is out of range: {rule}")


def require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises: ValueError naming the choices, and the nearest one, unless the value is among them."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{key}={value} is not known; {hint}choices are {', '.join(choices)}")
