"""A build with stand-in steps in a process of its own, as `raytrt build` runs it, to be killed by tests.

Made by a fork of a process that has imported everything: a new interpreter would take longer than the build itself.
"""

import json
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console

from builders.build import BuildOptions, build
from builders.display import LineDisplay
from builders.inputs import inputs_of
from builders.spec import read_spec
from serve.artifacts.store import open_store
from tests.forks import fork_server

PACKAGE = "tests.integration.stand_in_steps"
INTERRUPTED = 130
_WAIT_S = 60.0


class BuildProgram:
    """The process.

    Args:
        directory: Where its build file is put, which is not where it runs.
        document: The build file.
        store: URL of the store.
        address: Of a Ray cluster; `local`: it starts one.
    """

    def __init__(self, directory: Path, document: dict[str, Any], store: str, address: str) -> None:
        directory.mkdir()
        self._file, self._said, self._result = directory / "build.yaml", directory / "said", directory / "result"
        self._file.write_text(json.dumps(document))  # JSON is YAML
        environ = dict(os.environ)
        arguments = (self._file, self._said, self._result, store, address, environ)
        self._process: BaseProcess = fork_server().Process(target=_main, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def said(self) -> str:
        """All that it said so far."""
        return self._said.read_text() if self._said.exists() else ""

    def kill(self) -> None:
        """Kill it, as the kernel does when memory is short."""
        self._process.kill()
        self._process.join()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.kill(self.pid, signal.SIGINT)

    def wait(self) -> tuple[int | None, str]:
        """Return its exit status, and the fingerprint of the bundle, if there is one."""
        self._process.join(_WAIT_S)
        return self._process.exitcode, self._result.read_text() if self._result.exists() else ""


def _main(file: Path, said: Path, result: Path, store: str, address: str, environ: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir("/")
    with said.open("a", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.exit(_build(file, result, store, address))


def _build(file: Path, result: Path, store: str, address: str) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    inputs = inputs_of(read_spec(file), file.parent, package=PACKAGE)
    options = BuildOptions(None if address == "local" else address)
    try:
        with LineDisplay(Console(stderr=True, width=400)) as display:
            built = build(inputs, open_store(store), options, display)
    except KeyboardInterrupt:
        return INTERRUPTED
    result.write_text(built.manifest.fingerprint)
    return 0
