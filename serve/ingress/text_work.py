"""TextWork: where tokenizing happens, so that no stream waits for another's long prompt."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")

LARGE_CHARS = 2**18
INLINE_CHARS = 2048  # about a millisecond of tokenizing; handing it to a thread and back costs a tenth of that


class TextWork:
    """Runs short work at once and long work in one of a few threads; the tokenizer releases the GIL there."""

    def __init__(self) -> None:
        """Make the pool; threads start when they are needed."""
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="gateway-text")
        # One thread of their own for texts that take seconds: they wait for each other, and nobody else for them.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="gateway-large-text")

    async def run(self, size_chars: int, work: Callable[[], _T]) -> _T:
        """Return what `work` returns. `size_chars` says how long the text is that it works on."""
        if size_chars <= INLINE_CHARS:
            return work()
        pool = self._pool if size_chars <= LARGE_CHARS else self._large
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)
