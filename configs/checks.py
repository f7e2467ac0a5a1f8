"""The form in which every setting refuses a value: key, value, rule."""

from __future__ import annotations


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raises: ValueError naming key, value and rule unless the rule holds."""
    if not holds:
        raise ValueError(f"{key}={value} is out of range: {rule}")
