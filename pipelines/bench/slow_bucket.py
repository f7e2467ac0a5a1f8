"""An S3 server (moto) on loopback whose every answer waits: `python -m kinema.pipelines.bench.slow_bucket PORT MS`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def slow_bucket(latency_ms: int) -> Iterator[str]:
    """URL of an empty bucket of a server in a process of its own, found through AWS_ENDPOINT_URL meanwhile."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    names = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench-bench",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    server = subprocess.Popen([sys.executable, "-m", __name__, str(port), str(latency_ms)])
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the S3 server of the benchmark did not start; is moto[s3] installed?")
            time.sleep(0.1)
        import fsspec

        fsspec.filesystem("s3").mkdir("bench")
        yield "s3://bench"
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def serve(port: int, latency_s: float) -> None:
    """Answer for ever."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)

    def late(environ: dict[str, Any], start_response: Any) -> Any:
        time.sleep(latency_s)
        return app(environ, start_response)

    make_server("127.0.0.1", port, late, threaded=True).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]) / 1000)
