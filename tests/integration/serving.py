"""Serving: a real `raytrt up`, as a user would start it, on free ports, with everything it starts ended afterwards."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml

START_TIMEOUT_S = 180.0


def free_port() -> int:
    """Return a TCP port that nothing listens on, and that no outgoing connection will be given meanwhile."""
    while True:
        port = random.randrange(10_000, 20_000)  # below what Linux gives away, and what Ray and Serve choose from
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Serving:
    """A running `raytrt up` (or another command) over a config.

    Args:
        args: `args` of the application.
        directory: Where config file and log go.
        command: What to run instead of `raytrt up`, without the config file's path.
        environ: Added to the environment.
        import_path: The application's builder.
    """

    def __init__(
        self,
        args: dict[str, Any],
        directory: Path,
        command: tuple[str, ...] | None = None,
        environ: dict[str, str] | None = None,
        import_path: str = "serve.app:build_app",
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config_path = directory / "config.yaml"
        self.document: dict[str, Any] = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "logging_config": {"log_level": "WARNING"},
            "applications": [
                {"name": "llm", "import_path": import_path, "route_prefix": "/", "args": args},
            ],
        }
        self.write_config()
        self.log_path = directory / "log.txt"
        bin_dir = Path(sys.executable).parent
        program, *rest = command or ("raytrt", "up")
        line = [program if program == "env" else str(bin_dir / program), *rest]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*line, str(self.config_path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | _own_ports() | (environ or {}),
            )

    def write_config(self) -> None:
        """Write `document` to the config file."""
        self.config_path.write_text(yaml.safe_dump(self.document))

    def log(self) -> str:
        """Return what was printed so far."""
        return self.log_path.read_text(errors="replace")

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until /ready says 200; fails with the log if the process ends or time runs out."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log()}"
            if self.get("/ready")[0] == 200:
                return
            time.sleep(0.25)  # nothing announces readiness but the endpoint itself
        raise AssertionError(f"not ready after {timeout_s} s: {self.get('/ready')}\n{self.log()}")

    def get(self, path: str) -> tuple[int, Any]:
        """GET a path; status 0 if nothing answers. The body is parsed if it is JSON."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as exc:
            with exc:
                status, body = exc.code, exc.read()
        except OSError as exc:
            return 0, str(exc)
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Return everything that it started and that is alive."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def process_names(self) -> set[str]:
        """Return the names of what it started and that is alive; Ray's own helpers come and go meanwhile."""
        names = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                names.add(process.name())
        return names

    def replica_pids(self, deployment: str) -> list[int]:
        """Return the process ids of a deployment's replicas, oldest first."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"ServeReplica:llm:{deployment}" in " ".join(process.cmdline()):
                    found.append((process.create_time(), process.pid))
        return [pid for _, pid in sorted(found)]

    def interrupt(self, timeout_s: float = 60.0) -> int:
        """Press Ctrl-C: SIGINT to the process group, as a terminal sends it; returns the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """End everything, however it stands."""
        children = self.processes()
        if self.process.poll() is None:
            try:
                self.interrupt()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for child in children:
            if child.is_running():
                child.kill()


def _own_ports() -> dict[str, str]:
    """Serve's fixed ports, moved, so that two test runs, or a running `make serve`, are not in each other's way."""
    names = (
        "RAY_SERVE_HAPROXY_METRICS_PORT",
        "RAY_SERVE_HAPROXY_STATS_PORT",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    )
    return {name: str(free_port()) for name in names}
