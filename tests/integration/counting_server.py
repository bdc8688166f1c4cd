"""A store of bundles behind HTTP, which counts how often each blob is asked for."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class CountingServer:
    """Serves a directory, whole files and ranges.

    Attributes:
        url: Of the directory.
        reads: How often each path was read, in whole or in part.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.reads: Counter[str] = Counter()


@contextmanager
def serve_counted(directory: Path) -> Iterator[CountingServer]:
    """Serve a directory on a port of this machine until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, with_body: bool) -> None:
            path = directory / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            content, status = path.read_bytes(), 200
            whole = len(content)
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(match[1]), int(match[2] or whole - 1)
                content, status = content[start : end + 1], 206
            self.send_response(status)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{whole}")
            self.end_headers()
            if with_body:
                counting.reads[self.path] += 1
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    counting = CountingServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield counting
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
