"""`raytrt up`: a config file on this machine, from the first process to the last."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from serve.config import AppConfig
from serve.config_file import ConfigFile
from serve.errors import ConfigError
from serve.flags import SERVE_FLAGS
from serve.ingress.backend import FAILED
from serve.process_tree import adopt_orphans, end_descendants

POLL_S = 0.5
_STOP_MARGIN_S = 30.0  # beyond the time that replicas may take to finish their streams


def up(config: ConfigFile, address: str | None) -> int:
    """Start a config file, wait until it answers, and stay until it is stopped; returns the exit status.

    Args:
        config: What to start.
        address: Of a running Ray cluster; None starts Ray here.

    Raises:
        ConfigError: Its port is taken.
    """
    if address is None and _in_use(config.host, config.port):
        raise ConfigError(
            f"{config.path}: http_options.port: {config.port} is in use on {config.host}; stop what listens there "
            "(another `raytrt up`?) or choose another port"
        )
    adopt_orphans()
    command = [str(Path(sys.executable).with_name("serve")), "run", str(config.path)]
    if address is not None:
        command += ["--address", address]
    # Ray Serve's own log lines go to its files only; what matters to an operator, RayTRT says itself.
    # gRPC would report every process that a replica starts as a fork that it had to look past.
    quiet = {"RAY_SERVE_LOG_TO_STDERR": "0", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    environ = {**SERVE_FLAGS, **quiet, **os.environ}
    if address is None:
        # `serve run` alone would join any Ray that happens to run on this machine, and leave its Serve there.
        environ["RAY_ADDRESS"] = "local"
    # A shell that starts this in the background has SIGINT ignored, and `serve run` would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # In a process group of its own, so that a terminal's Ctrl-C reaches it once: through this process.
    child = subprocess.Popen(command, env=environ, process_group=0)
    _forward_signals(child, int(config.drain_timeout_s + _STOP_MARGIN_S))
    started_s = time.monotonic()
    if _wait_until_ready(child, config.url):
        first = next(iter(config.applications.values()))
        print(_banner(config.url, first, time.monotonic() - started_s), flush=True)
    status = child.wait()
    end_descendants()
    return status


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


def _wait_until_ready(child: "subprocess.Popen[bytes]", url: str) -> bool:
    """Poll /ready, and print what changes; False if the child ended, or was ended because a model cannot start."""
    last = ""
    while child.poll() is None:
        ready, state = _readiness(url)
        if state != last and state:
            print(f"raytrt: {state}", flush=True)
            last = state
        if ready:
            return True
        if FAILED in state:
            print("raytrt: giving up", file=sys.stderr, flush=True)
            child.send_signal(signal.SIGINT)
            return False
        time.sleep(POLL_S)
    return False


def _readiness(url: str) -> tuple[bool, str]:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            status, body = response.status, response.read()
    except urllib.error.HTTPError as exc:
        status, body = exc.code, exc.read()
    except OSError:
        return False, ""
    try:
        models = json.loads(body)["models"]
        return status == 200, "; ".join(
            f"{model['id']}: {model['ready_replicas']} of {model['target_replicas']} replicas ready"
            + (f" ({model['message']})" if model.get("message") else "")
            for model in models
        )
    except (ValueError, KeyError, TypeError):
        return False, ""


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
