"""The demo's page on loopback while it grows: one file, with a tag that changes when it does."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOST = "127.0.0.1"


class PageServer:
    """Serves one HTML file at `.address` until `close`."""

    def __init__(self, path: Path, port: int = 0):
        handler = type("Handler", (_Handler,), {"path_on_disk": path})
        self._server = ThreadingHTTPServer((HOST, port), handler)
        self._server.daemon_threads = True
        self.address = f"http://{HOST}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="kinema-demo-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; the file stays."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    path_on_disk: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (HOST, "localhost") or self.path.partition("?")[0] not in ("/", "/report.html"):
            self.send_error(404)
            return
        try:
            body, state = self.path_on_disk.read_bytes(), self.path_on_disk.stat()
        except FileNotFoundError:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{state.st_mtime_ns:x}-{len(body):x}"')
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line."""
