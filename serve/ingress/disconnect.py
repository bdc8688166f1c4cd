"""cancel_on_disconnect: stops working for a client that has gone."""

import asyncio
import logging
from types import TracebackType

from serve.ingress.exchange import ClientGone, Receive

_logger = logging.getLogger("raytrt.gateway")

GRACE_S = 0.1  # a request that is answered sooner is spared the cost of a task


class cancel_on_disconnect:  # used like a function, as asyncio.timeout
    """Cancels the body of an `async with` when the client closes the connection; it then raises `ClientGone`.

    Begins to watch after `GRACE_S`. A server that cancels the task itself, as Ray Serve does, needs no help: that
    cancellation passes through.
    """

    __slots__ = ("_gone", "_main", "_receive", "_timer", "_watcher")

    def __init__(self, receive: Receive) -> None:
        """Take the `receive` of a request whose body has been read."""
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None
        self._gone = False

    async def __aenter__(self) -> "cancel_on_disconnect":
        main = asyncio.current_task()
        assert main is not None
        self._main = main
        self._timer = asyncio.get_running_loop().call_later(GRACE_S, self._start)
        return self

    def _start(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except Exception:
            _logger.warning("the server no longer says whether the client is there", exc_info=True)
            return
        self._gone = True
        self._main.cancel()

    def stop(self) -> None:
        """Watch no longer: the answer is complete, and servers then report a disconnect."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self._gone and self._main.uncancel() == 0:  # else the server cancelled too
            raise ClientGone from None
