"""An S3 server on loopback (moto) that can be slow, refuse, hang up and cut what it sends."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest

KEY, SECRET = "AKIAKINEMATESTKEY000", "kinema-test-secret-never-in-a-log-0123456789"
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"


@dataclass
class Faults:
    """What the server does to the next requests that match; each entry is used once.

    Entries: "500", "503" (SlowDown), "hang" (no answer for `hang_s`), "cut" (half of the body), "lost" (the request
    is carried out and the answer is not sent: 500).
    """

    latency_s: float = 0.0
    hang_s: float = 3.0
    queue: list[tuple[str, str]] = field(default_factory=list)
    """(pattern of "METHOD /path", fault)."""
    log: list[str] = field(default_factory=list)
    """"METHOD /path" of every request."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fault: str, times: int = 1, where: str = "") -> None:
        """Queue a fault for requests whose "METHOD /path?query" matches the pattern."""
        self.queue += [(where, fault)] * times

    def next(self, request: str) -> str:
        """The fault for this request, or an empty string."""
        with self.lock:
            self.log.append(request)
            for place, (where, fault) in enumerate(self.queue):
                if re.search(where, request):
                    del self.queue[place]
                    return fault
        return ""


class Faulty:
    """WSGI around moto."""

    def __init__(self, app, faults: Faults):
        self.app, self.faults = app, faults

    def __call__(self, environ, start_response) -> Iterable[bytes]:
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        fault = self.faults.next(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{query}")
        time.sleep(self.faults.latency_s)
        if fault in ("500", "503"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = "SlowDown" if fault == "503" else "InternalError"
            return self._error(start_response, fault, code)
        if fault == "hang":
            time.sleep(self.faults.hang_s)
        if fault == "lost":
            b"".join(self.app(environ, lambda *_: None))
            return self._error(start_response, "500", "InternalError")
        if fault == "cut":
            status, body = [], b""

            def keep(*given):
                status.extend(given)

            body = b"".join(self.app(environ, keep))
            # The promised length stays: the client sees a connection that ends too early.
            start_response(status[0], status[1])
            return [body[: len(body) // 2]]
        return self.app(environ, start_response)

    @staticmethod
    def _error(start_response, status: str, code: str) -> list[bytes]:
        body = ERROR.format(code=code).encode()
        start_response(f"{status} injected", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
        return [body]


@contextlib.contextmanager
def s3_server(bucket: str = "kinema") -> Iterator[Faults]:
    """A server with one empty bucket, found through AWS_ENDPOINT_URL of this process and those it starts."""
    pytest.importorskip("s3fs", reason="object stores need the extra s3: pip install 'kinema[s3]'")
    server_module = pytest.importorskip("moto.server", reason="the S3 server of the tests is moto[s3]")
    import fsspec
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faults = Faults()
    app = Faulty(server_module.DomainDispatcherApplication(server_module.create_backend_app), faults)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    names = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        reset = urllib.request.Request(f"{names['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()
        fsspec.filesystem("s3").mkdir(bucket)
        faults.log.clear()
        yield faults
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.shutdown()
        thread.join()
        server.server_close()
