"""TransferPools: the threads of one transfer. The first failure ends all of it, and is what the caller sees."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from typing import TypeVar

# Ranges in flight: enough to fill a network, few enough for a disk to take them in order.
RANGES_AT_ONCE = 8
FILES_AT_ONCE = 4
_T = TypeVar("_T")


def transfer(bring: Callable[[_T, Executor], None], items: Iterable[_T]) -> None:
    """Call `bring` for each item, some at a time.

    Args:
        bring: Takes an item, and a pool for parts of it.
        items: To bring.

    Raises:
        Exception: The first that `bring` raised. What was under way is cut short, and the rest does not begin.
    """
    ranges = ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="range")
    files = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="file")
    try:
        futures = [files.submit(bring, item, ranges) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        # Who waits for a range that does not begin any more is told that it was cancelled.
        ranges.shutdown(wait=True, cancel_futures=True)
        files.shutdown(wait=True, cancel_futures=True)
