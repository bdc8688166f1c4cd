"""`raytrt up`: a config file on this machine, from the first process to the last."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import yaml

from serve import build_report
from serve.artifacts.store import open_store
from serve.config import AppConfig
from serve.config_file import ConfigFile
from serve.errors import ConfigError
from serve.flags import SERVE_FLAGS
from serve.ingress.backend import FAILED
from serve.pins import find_pins, pin_document
from serve.process_tree import adopt_orphans, end_descendants, interrupt_with_parent
from serve.ready import readiness

POLL_S = 0.5
# Ray Serve's, with its defaults; one of each a machine.
_OWN_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}
_STOP_MARGIN_S = 30.0  # beyond the time that replicas may take to finish their streams


def up(config: ConfigFile, address: str | None) -> int:
    """Start a config file, wait until it answers, and stay until it is stopped; returns the exit status.

    Args:
        config: What to start.
        address: Of a running Ray cluster; None starts Ray here.

    Raises:
        ConfigError: Its port is taken, or a bundle is not there.
    """
    pins = find_pins(config.applications, open_store)
    for pin in pins:
        print(f"raytrt: {pin}", flush=True)
    if address is None and _in_use(config.host, config.port):
        raise ConfigError(
            f"{config.path}: http_options.port: {config.port} is in use on {config.host}; stop what listens there "
            "(another `raytrt up`?) or choose another port"
        )
    adopt_orphans()
    # Ray Serve's own log lines go to its files only; what matters to an operator, RayTRT says itself.
    # gRPC would report every process that a replica starts as a fork that it had to look past.
    quiet = {"RAY_SERVE_LOG_TO_STDERR": "0", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    environ = {**SERVE_FLAGS, **quiet, **os.environ}
    if address is None:
        # `serve run` alone would join any Ray that happens to run on this machine, and leave its Serve there.
        environ["RAY_ADDRESS"] = "local"
        _move_taken_ports(environ)
    # A shell that starts this in the background has SIGINT ignored, and `serve run` would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # In a process group of its own, so that a terminal's Ctrl-C reaches it once: through this process.
    with tempfile.TemporaryDirectory(prefix="raytrt-") as directory:
        path = config.path
        if pins:
            path = Path(directory, path.name)
            path.write_text(yaml.safe_dump(pin_document(config.document, pins), sort_keys=False))
        command = [str(Path(sys.executable).with_name("serve")), "run", str(path)]
        if address is not None:
            command += ["--address", address]
        report = Path(directory, "build")
        environ[build_report.VARIABLE] = str(report)
        child = subprocess.Popen(command, env=environ, process_group=0, preexec_fn=interrupt_with_parent)
        _forward_signals(child, int(config.drain_timeout_s + _STOP_MARGIN_S))
        started_s = time.monotonic()
        failure = _wait_until_ready(child, config.url, report)
        if failure is None and child.poll() is None:
            first = next(iter(config.applications.values()))
            print(_banner(config.url, first, time.monotonic() - started_s), flush=True)
        status = child.wait()
        end_descendants()
    if failure is not None:
        print(f"raytrt: {failure}", file=sys.stderr)
        return 1
    return status


def _move_taken_ports(environ: dict[str, str]) -> None:
    """Choose other ports for those of Serve's own that something else has, unless the user chose them."""
    for name, port in _OWN_PORTS.items():
        if name not in environ and _in_use("127.0.0.1", port):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                environ[name] = str(probe.getsockname()[1])


def _forward_signals(child: "subprocess.Popen[bytes]", limit_s: int) -> None:
    """Let Ctrl-C and `kill` stop the child in its own way; a second one, or `limit_s`, ends it at once."""
    asked = False

    def stop(_signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            child.kill()
            return
        asked = True
        print("raytrt: stopping; once more ends everything at once", flush=True)
        child.send_signal(signal.SIGINT)
        signal.alarm(limit_s)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(signum, stop)


def _in_use(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.connect_ex((host, port)) == 0


def _wait_until_ready(child: "subprocess.Popen[bytes]", url: str, report: Path) -> str | None:
    """Poll /ready, and print what changes, until it is, or the child ends.

    Returns:
        None, or why the child was told to end: the application cannot be built, or a model not be started.
    """
    last = ""
    while child.poll() is None:
        ready, state = readiness(url)
        if state != last and state:
            print(f"raytrt: {state}", flush=True)
            last = state
        if ready:
            return None
        failure = build_report.read(report) or ("giving up: a model failed to start" if FAILED in state else None)
        if failure is not None:
            child.send_signal(signal.SIGINT)
            return failure
        time.sleep(POLL_S)
    return None


def _banner(url: str, config: AppConfig, seconds: float) -> str:
    model = config.models[0].id
    messages = [{"role": "user", "content": "How do I serve on 8 GPUs?"}]
    body = json.dumps({"model": model, "messages": messages, "temperature": 0})
    return f"""
RayTRT is ready after {seconds:.0f} s at {url}. Ctrl-C stops it. Try, in another terminal:

curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'

from openai import OpenAI  # pip install openai
client = OpenAI(base_url="{url}/v1", api_key="none")
messages = [{{"role": "user", "content": "What is RayTRT?"}}]
for chunk in client.chat.completions.create(model="{model}", messages=messages, temperature=0, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""
