"""FallbackWatch: which models are not served by what was configured, asked of their replicas every few seconds."""

import asyncio
import logging
from collections.abc import Iterable, Mapping

from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

PERIOD_S = 2.0
TIMEOUT_S = 10.0


class FallbackWatch:
    """Asks in the background; what it heard last can be had at once. Models without a stand-in cost nothing.

    Args:
        handles: Model id to the deployment of its replicas, of every model that has a stand-in: a fallback
            engine, or an earlier bundle.
    """

    def __init__(self, handles: Mapping[str, DeploymentHandle]) -> None:
        self._handles = dict(handles)
        self._heard: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def heard(self) -> Mapping[str, str]:
        """Model id to the engine or bundle that serves it in the place of what was configured."""
        return self._heard

    def start(self) -> None:
        """Begin to ask, on the running loop."""
        if self._handles:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Stop asking."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            for model, handle in self._handles.items():
                self._note(model, await _ask(handle))
            await asyncio.sleep(PERIOD_S)

    def _note(self, model: str, answers: Iterable[object] | None) -> None:
        if answers is None:
            return  # what was heard last still stands
        found = sorted({text for text in answers if isinstance(text, str) and text})
        before = self._heard.get(model, "")
        now = ", ".join(found)
        if now == before:
            return
        if now:
            self._heard[model] = now
            logger.warning(
                "%s is not served as configured, but by %s; see the replica's log for the reason.", model, now
            )
        else:
            del self._heard[model]
            logger.info("%s is served as configured again.", model)


async def _ask(handle: DeploymentHandle) -> Iterable[object] | None:
    try:
        # Reaches every replica that runs and takes no slot of theirs.
        answers: Iterable[object] = await handle.broadcast("stand_in").results_async(
            timeout_s=TIMEOUT_S, return_exceptions=True
        )
    except Exception as exc:  # whatever it is, asking again is all that can be done
        logger.debug("no answer about fallbacks: %s", exc)
        return None
    return answers
