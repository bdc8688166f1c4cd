"""A TrtllmEngine on a double of TensorRT-LLM, in a process of its own: `HostedTrtllm` here, `main` there.

A process can have one line of TensorRT-LLM and one engine. Beside the engine's socket there is one for the test, which
asks what only the hosting process knows.
"""

import asyncio
import importlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from serve.core.blocks import block_hashes, chain_seed
from serve.core.parallel import ParallelLayout
from serve.core.request import GenerateRequest, TokenDelta
from serve.engines.remote.client import RemoteEngine
from serve.engines.remote.server import EngineServer
from serve.engines.trtllm.engine import TrtllmEngine
from serve.engines.trtllm.orchestration import Orchestration, OrchestratorKind
from serve.engines.trtllm.settings import TrtllmSettings
from tests.doubles.install import LineName, double_environ

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "serve" / "models" / "quickstart"


class HostedTrtllm(RemoteEngine):
    """Starts its process with `start`, and waits for its end with `stop`.

    Args:
        line: Which double; None: the TensorRT-LLM that is installed.
        settings: Of the engine.
        model_dir: What it serves.
        layout: How it is cut.
        kind: Who starts its ranks.
        environ: Further variables of the process.
    """

    def __init__(
        self,
        line: LineName | None,
        settings: Mapping[str, Any],
        *,
        model_dir: Path = QUICKSTART,
        layout: Mapping[str, Any] | None = None,
        kind: OrchestratorKind = "in_process",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="raytrt-"))
        self._secret_of_host = secrets.token_hex(16)
        self.faults = self._directory / "faults"
        self.faults.mkdir()
        paths = {"PYTHONPATH": str(REPOSITORY), "TRTLLM_DOUBLE_FAULTS": str(self.faults), "OMP_NUM_THREADS": "1"}
        inherited = {**os.environ, **paths, **(environ or {})}
        self._environ = inherited if line is None else double_environ(line, inherited)
        self._configuration = {
            "secret": self._secret_of_host,
            "settings": dict(settings),
            "model_dir": str(model_dir),
            "layout": dict(layout or {}),
            "kind": kind,
        }
        self.process: asyncio.subprocess.Process | None = None
        super().__init__(self._directory / "engine", self._secret_of_host)

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.contract.trtllm_host", str(self._directory)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environ,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps(self._configuration)}\n".encode())
        while await self.process.stdout.readline() not in (b"listening\n", b""):  # TensorRT-LLM prints, too
            pass
        await super().start()

    async def stop(self) -> None:
        ranks = self.ranks()
        await super().stop()
        if self.process is not None:
            try:
                async with asyncio.timeout(10):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
            for rank in ranks:  # those of 1.2.x outlive a process whose shutdown hangs; launchers see to that
                with suppress(psutil.NoSuchProcess):
                    rank.kill()
            await self.process.communicate()
        shutil.rmtree(self._directory, ignore_errors=True)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes below the hosting one."""
        if self.process is None or self.process.returncode is not None:
            return []
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def fault(self, name: str, text: str = "") -> None:
        """Ask the double for a fault."""
        part = self.faults / f".{name}"
        part.write_text(text)
        part.rename(self.faults / name)

    def ask(self, what: str) -> Any:
        """Ask the hosting process for something, and wait for it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.connect(str(self._directory / "control"))
            control.sendall(f"{what}\n".encode())
            return json.loads(control.makefile().readline())


class Watched(TrtllmEngine):
    """Remembers the salts it was given, and looks into the double."""

    salts: set[str]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        self.salts.add(request.cache_salt)
        async for delta in super().generate(request):
            yield delta

    def told(self) -> list[int]:
        """Return what the KV events add up to."""
        return list(self._ledger.content())

    def content(self) -> list[int]:
        """Return what the double can reuse, as our hashes; what the events tell, if it is in another process."""
        assert self._loaded is not None
        loop = getattr(self._loaded.llm._executor, "_loop", None)
        if loop is None:
            return self.told()
        salt_id = importlib.import_module("trtllm_double.block_key").salt_id
        seeds = {salt_id(salt): chain_seed(salt) for salt in self.salts | {""}}
        size = self.info.tokens_per_block
        found: list[int] = []
        pending = [(root, seeds[key[0]]) for key, root in loop.core.cache._roots.items() if key[0] in seeds]
        while pending:
            node, parent = pending.pop()
            for tokens, child in list(node.children.items()):
                if len(tokens) == size:
                    (block_hash,) = block_hashes(tokens, size, parent).tolist()
                    found.append(block_hash)
                    pending.append((child, block_hash))
        return found


async def host(directory: Path, configuration: dict[str, Any]) -> None:
    """Serve one engine until its replica has left."""
    kind = configuration["kind"]
    engine = Watched(
        Path(configuration["model_dir"]),
        TrtllmSettings.model_validate(configuration["settings"]),
        ParallelLayout.model_validate(configuration["layout"]),
        Orchestration(kind, environ={"TLLM_WORKER_USE_SINGLE_PROCESS": "1"} if kind == "in_process" else {}),
    )
    engine.salts = set()
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.bind(str(directory / "control"))
    control.listen()
    threading.Thread(target=_answer, args=(control, engine, asyncio.get_running_loop()), daemon=True).start()
    server = EngineServer(engine, directory / "engine", configuration["secret"])
    await server.listen()
    print("listening", flush=True)
    await server.run()


def _answer(control: socket.socket, engine: Watched, loop: asyncio.AbstractEventLoop) -> None:
    async def carry_out(what: str) -> Any:
        match what:
            case "content":
                return engine.content()
            case "environ":
                return dict(os.environ)
            case _:
                return engine.told()

    while True:
        connection, _ = control.accept()
        with connection, connection.makefile("rw") as lines:
            what = lines.readline().strip()
            lines.write(json.dumps(asyncio.run_coroutine_threadsafe(carry_out(what), loop).result()) + "\n")


def main() -> None:
    """Run in the process that hosts."""
    configuration = json.loads(sys.stdin.readline())
    asyncio.run(host(Path(sys.argv[1]), configuration))


if __name__ == "__main__":
    main()
