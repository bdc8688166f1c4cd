"""`raytrt`: `up` starts a config file on this machine, `check` reads one, `env` prints Ray's switches."""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from serve.config import AppConfig, load_config
from serve.errors import ConfigError
from serve.flags import SERVE_FLAGS
from serve.process_tree import adopt_orphans, end_descendants

POLL_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="raytrt", description="TensorRT-LLM served on Ray Serve.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a config file on this machine and wait until it answers")
    up.add_argument("config", type=Path, help="Serve config file, for instance configs/quickstart.yaml")
    up.add_argument("--address", help="address of a running Ray cluster; without it, Ray is started here")
    check = commands.add_parser("check", help="check a config file without starting anything")
    check.add_argument("config", type=Path)
    commands.add_parser("env", help="print the environment that Ray's processes should have, for eval")
    options = parser.parse_args(argv)
    try:
        match options.command:
            case "up":
                return _up(options.config, options.address)
            case "check":
                for name, config in load_config(options.config).items():
                    print(f"{name}: {', '.join(_summary(model) for model in config.models)}: good")
            case "env":
                for name, value in SERVE_FLAGS.items():
                    print(f"export {name}={shlex.quote(value)}")
    except ConfigError as exc:
        print(f"raytrt: {exc}", file=sys.stderr)
        return 2
    return 0


def _summary(model: Any) -> str:
    return f"{model.id} ({model.engine.kind})"


def _up(config_path: Path, address: str | None) -> int:
    configs = load_config(config_path)
    host, port = _listen_address(config_path)
    if address is None and _in_use(host, port):
        raise ConfigError(
            f"{config_path}: http_options.port: {port} is in use on {host}; stop what listens there (another "
            "`raytrt up`?) or choose another port"
        )
    adopt_orphans()
    command = [str(Path(sys.executable).with_name("serve")), "run", str(config_path)]
    if address is not None:
        command += ["--address", address]
    # Ray Serve's own log lines go to its files only; what matters to an operator, RayTRT says itself.
    child = subprocess.Popen(command, env={**SERVE_FLAGS, "RAY_SERVE_LOG_TO_STDERR": "0", **os.environ})

    def forward(signum: int, _frame: FrameType | None) -> None:
        child.send_signal(signal.SIGINT)

    # Ctrl-C reaches the child by itself, as part of the terminal's process group; `kill` reaches only this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, forward)
    url = _base_url(config_path)
    started_s = time.monotonic()
    if _wait_until_ready(child, url):
        print(_banner(url, next(iter(configs.values())), time.monotonic() - started_s), flush=True)
    status = child.wait()
    end_descendants()
    return status


def _listen_address(config_path: Path) -> tuple[str, int]:
    options = yaml.safe_load(config_path.read_text()).get("http_options") or {}
    host = str(options.get("host", "0.0.0.0"))
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host, int(options.get("port", 8000))


def _in_use(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.connect_ex((host, port)) == 0


def _base_url(config_path: Path) -> str:
    host, port = _listen_address(config_path)
    prefixes = [
        str(entry.get("route_prefix") or "/")
        for entry in yaml.safe_load(config_path.read_text())["applications"]
        if entry.get("import_path") == "serve.app:build_app"
    ]
    return f"http://{host}:{port}{prefixes[0].rstrip('/')}"


def _wait_until_ready(child: "subprocess.Popen[bytes]", url: str) -> bool:
    """Poll /ready, and print what changes; False if the child ended instead."""
    last = ""
    while child.poll() is None:
        ready, state = _readiness(url)
        if state != last and state:
            print(f"raytrt: {state}", flush=True)
            last = state
        if ready:
            return True
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
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "How do I serve on 8 GPUs?"}]})
    return f"""
RayTRT is ready after {seconds:.0f} s at {url}. Ctrl-C stops it. Try, in another terminal:

curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
messages = [{{"role": "user", "content": "What is RayTRT?"}}]
for chunk in client.chat.completions.create(model="{model}", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""


if __name__ == "__main__":
    sys.exit(main())
