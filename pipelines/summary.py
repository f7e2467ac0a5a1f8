"""How a stage's summary is shown: one JSON line for programs, aligned lines for people."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from kinema.configs.json_text import json_text

RESULT_MARK_VARIABLE = "KINEMA_RESULT_MARK"
"""`kinema submit` finds the summary of its job, among all that is printed there, by a mark that it set."""


def summary_fields(summary: Any) -> dict[str, Any]:
    """What a summary says, without the exit status; a summary may have its own order in `flat()`."""
    if hasattr(summary, "flat"):
        fields = summary.flat()
    elif dataclasses.is_dataclass(summary) and not isinstance(summary, type):
        fields = dataclasses.asdict(summary)
    else:
        fields = dict(summary)
    return {key: value for key, value in fields.items() if key != "exit_status"}


def print_summary(summary: Any, as_json: bool, stdout: TextIO) -> None:
    """One JSON object on one line, or for people `key  value` lines: nested keys dotted, empty values left out."""
    fields = summary_fields(summary)
    if as_json:
        mark = os.environ.get(RESULT_MARK_VARIABLE, "")
        stdout.write(f"{mark}{json_text(fields, default=str)}\n")
    else:
        lines = {key: value for key, value in _dotted(fields) if value not in (None, "", (), [])}
        width = max((len(key) for key in lines), default=0)
        for key, value in lines.items():
            value = "; ".join(map(str, value)) if isinstance(value, tuple | list) else value
            shown = f"{value:.6g}" if isinstance(value, float) else value
            stdout.write(f"{key:<{width}}  {shown}\n")
    stdout.flush()


def _dotted(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
