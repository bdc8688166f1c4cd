"""Start and end of the library's LLM object: in threads, in bounded time, and not in silence."""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from serve.engines.trtllm.daemon_threads import call_in_thread
from serve.errors import BundleMismatch, ConfigError, EngineDead

_log = logging.getLogger(__name__)

LIBRARY_LOGGER = "TRT-LLM"
PROGRESS_S = 30.0
_STAGES = (
    ("download", re.compile(r"download|snapshot|fetching", re.IGNORECASE)),
    ("build", re.compile(r"build(ing)? .*engine|converting|quantiz", re.IGNORECASE)),
    ("autotune", re.compile(r"auto.?tun", re.IGNORECASE)),
    ("graph capture", re.compile(r"cuda.?graph|captur|warm.?up", re.IGNORECASE)),
    ("KV cache", re.compile(r"kv.?cache|paged|max_num_blocks|memory usage", re.IGNORECASE)),
    ("load", re.compile(r"load|weight|checkpoint|shard", re.IGNORECASE)),
)
_TOO_FEW_GPUS = re.compile(r"Only \d+ GPUs? (is|are) available")
_claim = threading.Lock()  # process-wide on purpose, as what it guards is: TensorRT-LLM changes the environment


def claim_process() -> None:
    """Make this process that of one engine, for ever.

    The constructor leaves variables behind that would turn the next engine into another kind, and threads and memory
    are free only when the process has ended.

    Raises:
        ConfigError: It has had one already.
    """
    if not _claim.acquire(blocking=False):
        raise ConfigError(
            "engine: this process has had a TensorRT-LLM engine already, and can have only one; start each engine in a "
            "process of its own"
        )


def stage_of(message: str) -> str | None:
    """Return which stage of a start a line of the library's log belongs to; None if it tells none."""
    return next((stage for stage, pattern in _STAGES if pattern.search(message)), None)


class Progress(logging.Handler):
    """Follows the library's log while it starts, and says how far it is: at each new stage, and every half minute.

    Args:
        timeout_s: When the start is given up; told with each line.
        now: Clock.
    """

    def __init__(self, timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._timeout_s = timeout_s
        self._now = now
        self._begin_s = now()
        self._told_s = self._begin_s
        self.stage = "import"

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of a line of the library's log."""
        stage = stage_of(record.getMessage())
        if stage is not None and stage != self.stage:
            self.stage = stage
            self._tell()

    def tick(self) -> None:
        """Say that it is still going on, if nothing was said for long."""
        if self._now() - self._told_s >= PROGRESS_S:
            self._tell()

    @property
    def elapsed_s(self) -> float:
        """Time since the beginning."""
        return self._now() - self._begin_s

    def _tell(self) -> None:
        self._told_s = self._now()
        _log.info(
            "TensorRT-LLM is starting: %s, after %.0f s of at most %.0f s.",
            self.stage,
            self.elapsed_s,
            self._timeout_s,
        )


async def construct_in_thread(construct: Callable[[], Any], progress: Progress, timeout_s: float) -> Any:
    """Call `construct` in a thread without an event loop, and say how it goes.

    An object that comes too late is shut down by its thread.

    Raises:
        ConfigError, BundleMismatch: As `construct` does, or because TensorRT-LLM refuses its arguments.
        EngineDead: TensorRT-LLM failed, or did not start in time.
    """
    library_log = logging.getLogger(LIBRARY_LOGGER)
    library_log.addHandler(progress)
    ticker = asyncio.ensure_future(_tick(progress))
    try:
        async with asyncio.timeout(timeout_s):
            return await call_in_thread(construct, "trtllm-start", discard=lambda llm: llm.shutdown())
    except TimeoutError:
        raise EngineDead(
            f"TensorRT-LLM did not start within {timeout_s:.0f} s (last seen: {progress.stage}); raise "
            "engine.start_timeout_s, or shorten the start (cuda_graphs.batch_sizes, autotuner: false, a local disk)"
        ) from None
    except (ConfigError, BundleMismatch, EngineDead):
        raise
    except (ValueError, TypeError) as exc:  # what its constructors and pydantic models raise
        _log.info("TensorRT-LLM refuses the configuration.", exc_info=True)
        raise ConfigError(f"engine: TensorRT-LLM refuses the configuration: {exc}") from exc
    except Exception as exc:
        _log.error("TensorRT-LLM failed while starting.", exc_info=True)
        if _TOO_FEW_GPUS.search(str(exc)):
            raise ConfigError(f"parallel: {exc} Lower parallel, or give the engine more GPUs.") from exc
        raise EngineDead(f"TensorRT-LLM failed while starting ({progress.stage}): {type(exc).__name__}: {exc}") from exc
    finally:
        ticker.cancel()
        library_log.removeHandler(progress)


async def _tick(progress: Progress) -> None:
    while True:
        await asyncio.sleep(1.0)
        progress.tick()


async def shut_down_in_thread(llm: Any, timeout_s: float) -> bool:
    """Call `llm.shutdown()` in a thread, and wait for it at most so long.

    Returns:
        Whether it came back. If not, only the end of the process frees the GPU.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await call_in_thread(llm.shutdown, "trtllm-stop")
    except TimeoutError:
        _log.error("TensorRT-LLM did not shut down within %.0f s; its process has to be ended.", timeout_s)
        return False
    except Exception:
        _log.exception("TensorRT-LLM did not shut down as it should.")
    return True
