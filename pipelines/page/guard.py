"""What reaches the page's handlers: requests of this page from this machine, with answers that are not cached.

A page of another site can make a browser ask 127.0.0.1 in two ways: directly, where the browser names its `Origin`,
or through a host name of its own that it lets point here later (DNS rebinding), where `Host` is that name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from kinema.pipelines.page.json_answer import JsonAnswer

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine; the port is left open, so that the page can be seen through a forwarded one."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Middleware around an ASGI application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 403, or pass on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        reason = why_refused(Headers(scope=scope))
        if reason:
            return await JsonAnswer({"error": reason}, 403)(scope, receive, send_with_headers)
        return await self._app(scope, receive, send_with_headers)


def why_refused(headers: Headers) -> str | None:
    """Why a request is not from this page, or None."""
    hosts = headers.getlist("host")
    host = hosts[0].lower() if len(hosts) == 1 else ""
    name, colon, port = host.rpartition(":")
    name = name if colon and port.isdigit() else host
    if name not in LOOPBACK:
        return "this page answers to 127.0.0.1 and localhost only"
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"http://{host}":
        return "this page answers its own requests only"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        # Another site may link here, which opens the page; it may not ask for anything else.
        if headers.get("sec-fetch-mode") != "navigate":
            return "this page answers its own requests only"
    return None
