"""A dashboard whose Serve does what a test says, behind real HTTP."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Called with the configs of a PUT; returns the applications' details from then on, one for each GET, the last for ever.
Reaction = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def running(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Deploy at once."""
    return [state("RUNNING", configs)]


def failing(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Begin, and fail."""
    return [state("DEPLOYING", configs), state("DEPLOY_FAILED", configs, "it failed\nValueError: no such thing")]


def state(status: str, configs: list[dict[str, Any]], message: str = "") -> dict[str, Any]:
    """Return the details of applications that all have one status."""
    deployment = {"status": "HEALTHY" if status == "RUNNING" else "UPDATING", "replicas": [{"state": "RUNNING"}]}
    return {
        config["name"]: {
            "status": status,
            "message": message,
            "deployed_app_config": config,
            "deployments": {"model-m": deployment},
        }
        for config in configs
    }


class FakeServe:
    """What the dashboard knows.

    Attributes:
        reactions: To one PUT each.
        puts: Their documents.
        token: That is asked for; empty: none.
        down: How many of the next requests are answered with an error.
    """

    def __init__(self) -> None:
        self.reactions: list[Reaction] = []
        self.puts: list[dict[str, Any]] = []
        self.token = ""
        self.down = 0
        self.url = ""
        self._states: list[dict[str, Any]] = [{}]

    def answer(self, method: str, token: str, body: bytes) -> tuple[int, bytes]:
        """Answer a request."""
        if self.token and token != f"Bearer {self.token}":
            return 401, b"Unauthorized"
        if self.down:
            self.down -= 1
            return 503, b"not now"
        if method == "GET":
            states = self._states
            return 200, json.dumps({"applications": states.pop(0) if len(states) > 1 else states[0]}).encode()
        document = json.loads(body)
        if "refuse" in document:
            return 400, b"a bad config"
        self.puts.append(document)
        self._states = self.reactions.pop(0)(document["applications"])
        return 200, b""


@contextmanager
def serving(fake: FakeServe) -> Iterator[FakeServe]:
    """Answer on a port of this machine until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = fake.answer(self.command, self.headers.get("Authorization", ""), body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # the base class calls it so
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
