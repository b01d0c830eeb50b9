"""A local S3 server that can be told to fail and to be slow, as a process-wide context of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

BUCKET = "studies"
SECRETS = ("testing-key", "not-a-secret-at-all")  # which the server's errors tell
_BODY = f"<Error><Code>InternalError</Code><Message>injected, {SECRETS}</Message></Error>".encode()
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass
class Faults:
    """What the server does to the requests that it gets.

    Attributes:
        every: each so many-th request is answered by 500 or 503, in turn; 0 is none.
        delay_s: pause before each answer.
        stall_s: one pause more, before the next answer only.
        refuse: answers 500 to requests (method, path) of which it is true.
    """

    every: int = 0
    delay_s: float = 0.0
    stall_s: float = 0.0
    refuse: Callable[[str, str], bool] = lambda method, path: False
    failed: int = 0
    count: int = 0

    def around(self, app: App) -> App:
        """The application behind the faults."""
        guard = threading.Lock()

        def faulty(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            with guard:
                self.count += 1
                fails = self.refuse(method, path) or (self.every > 0 and self.count % self.every == 0)
                self.failed += fails
                status = ("500 Internal Server Error", "503 Service Unavailable")[self.failed % 2]
                stall, self.stall_s = self.stall_s, 0.0
            time.sleep(self.delay_s + stall)
            if not fails:
                return app(environ, start)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(_BODY)))])
            return [_BODY]

        return faulty


@contextmanager
def serve(patch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Serve an empty bucket, to which this process's environment points, until the end."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install '.[s3,test]'")
    pytest.importorskip("flask_cors", reason="moto's server is not installed: pip install '.[s3,test]'")
    pytest.importorskip("moto", reason="moto is not installed: pip install '.[s3,test]'")
    import s3fs
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    faults = Faults()
    app = faults.around(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": SECRETS[0],
        "AWS_SECRET_ACCESS_KEY": SECRETS[1],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(BUCKET)
    try:
        yield faults
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
