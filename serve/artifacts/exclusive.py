"""Exclusive creation where the storage has none: announce, wait, look who stands.

This is Fischer's mutual exclusion: who finds nothing writes his content, waits until nobody who found nothing as well
can still be writing, and reads. It is right as long as no write takes longer than the wait; that is all that can be
had from storage that only reads and writes, which is why it is the last resort.

Source: L. Lamport, "A Fast Mutual Exclusion Algorithm", ACM TOCS 5(1), 1987, which describes Fischer's.
"""

from collections.abc import Callable

SETTLE_S = 3.0


def create_by_settling(
    read: Callable[[], bytes | None],
    put: Callable[[bytes], None],
    data: bytes,
    sleep: Callable[[float], None],
    settle_s: float = SETTLE_S,
) -> bool:
    """Create an object with reads and writes only.

    Args:
        read: Returns the object as it is now; None: there is none.
        put: Writes it whole.
        data: Has to differ from what every other caller writes.
        sleep: Waits.
        settle_s: Longer than any write takes.

    Returns:
        Whether it is this caller's.
    """
    found = read()
    if found is not None:
        return found == data
    put(data)
    sleep(settle_s)
    return read() == data
