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
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve.config import AppConfig, load_config
from serve.core.strict_model import describe_mistakes
from serve.errors import ConfigError
from serve.flags import SERVE_FLAGS
from serve.ingress.backend import FAILED
from serve.process_tree import adopt_orphans, end_descendants

POLL_S = 0.5
STOP_TIMEOUT_S = 330  # a little more than replicas take to finish their streams, by default


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
                for name, config in _check(options.config).items():
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
    configs = _check(config_path)
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
    environ = {**SERVE_FLAGS, "RAY_SERVE_LOG_TO_STDERR": "0", **os.environ}
    # A shell that starts this in the background has SIGINT ignored, and `serve run` would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # In a process group of its own, so that a terminal's Ctrl-C reaches it once: through this process.
    child = subprocess.Popen(command, env=environ, process_group=0)
    _forward_signals(child)
    url = _base_url(config_path)
    started_s = time.monotonic()
    if _wait_until_ready(child, url):
        print(_banner(url, next(iter(configs.values())), time.monotonic() - started_s), flush=True)
    status = child.wait()
    end_descendants()
    return status


def _forward_signals(child: "subprocess.Popen[bytes]") -> None:
    """Let Ctrl-C and `kill` stop the child in its own way; a second one, or `STOP_TIMEOUT_S`, ends it at once."""
    asked = False

    def stop(_signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            child.kill()
            return
        asked = True
        print("raytrt: stopping; once more ends everything at once", flush=True)
        child.send_signal(signal.SIGINT)
        signal.alarm(STOP_TIMEOUT_S)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(signum, stop)


def _check(config_path: Path) -> dict[str, AppConfig]:
    """Check our part of a config file and Ray Serve's, or raise ConfigError."""
    configs = load_config(config_path)
    document = yaml.safe_load(config_path.read_text())
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, str(config_path))) from None
    except ValueError as exc:
        raise ConfigError(f"{config_path}: {exc}") from None
    return configs


def _listen_address(config_path: Path) -> tuple[str, int]:
    options = ServeDeploySchema.model_validate(yaml.safe_load(config_path.read_text())).http_options
    return "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host, options.port


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


if __name__ == "__main__":
    sys.exit(main())
