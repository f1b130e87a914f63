"""HTTP servers on this machine, for the services that tests stand in for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Quiet:
    """Base of handlers that log no requests."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def serving_http(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """Run a server on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # The default interval of half a second is how long `shutdown` would wait.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
