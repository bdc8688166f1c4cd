"""RankLoop: the thread of rank 0 that runs the core, step by step."""

import threading
import time
from collections.abc import Callable
from typing import Any

from trtllm_double import line, switches
from trtllm_double.core import EngineCore
from trtllm_double.engine_request import EngineResponse

_PUSH_S = 0.2  # reference 2.6


class RankLoop:
    """Commands in from any thread, messages out from its own.

    Args:
        send: Called with `("responses", [...])`, `("stats", [...])`, `("events", [...])` and, once, `("fatal", error)`.
        collective: Called in every step before anything is computed: the other ranks take part there.
    """

    def __init__(
        self, core: EngineCore, send: Callable[[tuple[str, Any]], None], collective: Callable[[], None]
    ) -> None:
        self.core = core
        self._send, self._collective = send, collective
        self._commands: list[tuple[str, Any]] = []
        self._changed = threading.Condition()
        self._was_asked = False
        self._pushed_s = 0.0
        self._push_s = switches.number("PUSH_S", _PUSH_S)
        self._thread = threading.Thread(target=self._run, name="double-rank-0", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, kind: str, value: Any = None) -> None:
        """Give a command: submit, cancel, stop."""
        with self._changed:
            self._commands.append((kind, value))
            self._changed.notify()

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def take(self, kind: str) -> list[Any]:
        """Read statistics or events directly, as an RPC call does; reading removes."""
        if kind == "events":
            return self.core.events.take()
        records = []
        while self.core.stats:
            records.append(self.core.stats.popleft())
        return records

    def _run(self) -> None:
        try:
            while self._handle_commands():
                self._step()
                self._push()
        except Exception as error:
            self._send(("fatal", error))

    def _handle_commands(self) -> bool:
        with self._changed:
            if not self._commands and not self.core.is_busy:
                self._changed.wait(self._idle_s())
            commands, self._commands = self._commands, []
        refused = []
        for kind, value in commands:
            if kind == "stop":
                return False
            if kind == "cancel":
                self.core.cancel(value)
            else:
                self._was_asked = True
                response = self.core.add(value)
                if response is not None:
                    refused.append(response)
        if refused:
            self._send(("responses", refused))
        return True

    def _idle_s(self) -> float | None:
        return self._push_s if line.current().pushes and self._was_asked else None

    def _step(self) -> None:
        if not self.core.is_busy:
            return
        started = time.perf_counter()
        self._faults()
        broken = switches.fault_text("forward_error")
        responses = self.core.step(self._collective) if broken is None else self.core.fail_step(broken)
        rest_s = switches.number("STEP_S", 0) - (time.perf_counter() - started)
        if rest_s > 0:
            time.sleep(rest_s)
        text = switches.take_fault("request_error") if responses else None
        if text is not None:  # one request fails with a text of our choice; the engine goes on
            first = responses[0]
            self.core.cancel(first.id)
            responses[0] = EngineResponse(first.id, error=text, is_final=True)
        if responses:
            self._send(("responses", responses))

    def _faults(self) -> None:
        while switches.fault_is_set("stall"):
            time.sleep(0.01)
        text = switches.take_fault("crash")
        if text is not None:
            raise RuntimeError(text or "the step loop crashed")

    def _push(self) -> None:
        now = time.monotonic()
        if not (line.current().pushes and self._was_asked) or now - self._pushed_s < self._push_s:
            return
        self._pushed_s = now
        for kind in ("stats", "events"):
            data = self.take(kind)
            if data:
                self._send((kind, data))
