"""KV-cache events in upstream's JSON form, in a ring buffer (reference 2.7)."""

import threading
from collections import deque
from typing import Any

from trtllm_double import line


class EventBuffer:
    """Thread-safe. Reading removes; the oldest are dropped when it is full, which leaves a gap in the ids.

    Args:
        size: Events it holds; 0: no events at all.
        windows: Attention window sizes; each event is told once a window.
        attention_dp_rank: Present in the events only with attention DP.
    """

    def __init__(self, size: int, windows: list[int], num_blocks: list[int], attention_dp_rank: int | None) -> None:
        self._lock = threading.Lock()
        self._events: deque[dict[str, Any]] = deque(maxlen=max(size, 1))
        self._on = size > 0
        self._windows = windows
        self._rank = attention_dp_rank
        self._next_id = 0
        self._removed: list[int] = []
        self._record({"type": "created", "num_blocks_per_cache_level": num_blocks})

    def stored(self, parent: int | None, blocks: list[dict[str, Any]]) -> None:
        self.flush()
        self._record({"type": "stored", "parent_hash": parent, "blocks": blocks})

    def removed(self, block_hash: int) -> None:
        self._removed.append(block_hash)

    def moved(self, block_hash: int, old: int, new: int) -> None:
        self.flush()
        diff = {"type": "event_diff", "new_value": new, "old_value": old}
        self._record({"type": "updated", "block_hash": block_hash, "cache_level": diff, "priority": None})

    def flush(self) -> None:
        """Put removals that belong together into one event."""
        if self._removed:
            hashes, self._removed = self._removed, []
            self._record({"type": "removed", "block_hashes": hashes})

    def take(self) -> list[dict[str, Any]]:
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events

    def _record(self, data: dict[str, Any]) -> None:
        if not self._on:
            return
        with self._lock:
            for window in self._windows:
                event: dict[str, Any] = {"event_id": self._next_id, "data": data, "window_size": window}
                if line.current().is_newest:
                    event["hash_algo"] = "v1_block_key"
                if self._rank is not None:
                    event["attention_dp_rank"] = self._rank
                self._next_id += 1
                self._events.append(event)


def stored_block(block_hash: int, tokens: tuple[int, ...], level: int, priority: int) -> dict[str, Any]:
    """Return one block of a stored event."""
    unique = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    return {
        "type": "stored_block",
        "block_hash": block_hash,
        "tokens": unique,
        "cache_level": level,
        "priority": priority,
    }
