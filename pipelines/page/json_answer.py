"""JSON as the page's server answers it: null where a number is not finite, which no browser would read."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from kinema.configs.json_text import json_text


class JsonAnswer(JSONResponse):
    """An answer in JSON."""

    def render(self, content: Any) -> bytes:
        """As of every response."""
        return json_text(content, separators=(",", ":"), ensure_ascii=False).encode()
