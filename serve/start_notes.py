"""StartNotes: what replicas that are starting let others know.

Serve awaits a replica's constructor before it calls anything else of it, so that nobody could ask a replica that is
still downloading. It writes down instead what it does, and which bundles have failed; gateways and other replicas read.
"""

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote

from serve.cluster_kv import KeyValues

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
_STALE_S = 30.0  # a replica that has not written for so long is gone; nodes' clocks may differ by some of it
_FORGET_S = 600.0
_LATELY_S = 3600.0
_ROOT = "start"


class StartNotes:
    """The notes of one replica.

    Args:
        values: Where they are kept.
        app, deployment, replica: Whose they are.
        now_s: The clock, seconds since the epoch.
    """

    def __init__(
        self,
        values: KeyValues,
        app: str,
        deployment: str,
        replica: str,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._values = values
        self._place = f"{_ROOT}/{quote(app, safe='')}/{quote(deployment, safe='')}"
        self._replica = quote(replica, safe="")
        self._now_s = now_s
        self._text = ""

    def say(self, text: str) -> None:
        """Say what the replica does; gateways show it within a few seconds. Cheap, from any thread."""
        self._text = text

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what was said last written down, and remove it at the end. Needs a running event loop."""
        writing = asyncio.get_running_loop().create_task(self._write())
        try:
            yield
        finally:
            writing.cancel()

    async def _write(self) -> None:
        key = f"{self._place}/says/{self._replica}"
        writing: asyncio.Future[None] | None = None
        try:
            while True:
                writing = asyncio.ensure_future(asyncio.to_thread(self._put, key, {"text": self._text}))
                await asyncio.shield(writing)
                await asyncio.sleep(PERIOD_S)
        finally:
            if writing is not None:
                await writing  # else it might come after the removal
            await asyncio.to_thread(self._delete, key)

    # Bundles that failed

    def note_failure(self, fingerprint: str) -> None:
        """Note that a start of a bundle has failed here. Blocks for milliseconds."""
        self._put(f"{self._place}/failed/{fingerprint}/{self._replica}", {})

    def failures_elsewhere(self, fingerprint: str) -> int:
        """Return how many other replicas have noted that within the last hour. Blocks for milliseconds."""
        notes = self._read(f"{self._place}/failed/{fingerprint}/", _LATELY_S)
        return sum(not key.endswith(f"/{self._replica}") for key in notes)

    def note_success(self, fingerprint: str) -> None:
        """Note that a bundle works in this deployment, and forget earlier failures. Blocks for milliseconds."""
        self._put(f"{self._place}/works/{fingerprint}", {})
        self._forget_failures(fingerprint)

    def has_worked(self, fingerprint: str) -> bool:
        """Return whether a replica of this deployment ever started with a bundle. Blocks for milliseconds."""
        return bool(self._read(f"{self._place}/works/{fingerprint}", float("inf")))

    def note_rejection(self, fingerprint: str) -> None:
        """Note that a bundle is not to be tried again, and forget its failures. Blocks for milliseconds."""
        self._put(f"{self._place}/rejected/{fingerprint}", {})
        self._forget_failures(fingerprint)

    def rejections(self) -> Mapping[str, float]:
        """Return the bundles of this deployment that were rejected within the last hour, and when.

        The store knows it for good; this is for replicas that may not write there.
        """
        notes = self._read(f"{self._place}/rejected/", _LATELY_S)
        return {key.rpartition("/")[2]: float(note["at_s"]) for key, note in notes.items()}

    def _forget_failures(self, fingerprint: str) -> None:
        for key in self._read(f"{self._place}/failed/{fingerprint}/", _LATELY_S):
            self._delete(key)

    def _put(self, key: str, note: dict[str, Any]) -> None:
        try:
            self._values.put(key, json.dumps(note | {"at_s": self._now_s()}).encode())
        except Exception as exc:  # a note is a convenience: a start must not fail of it
            logger.warning("A note of this replica's start could not be written: %s", exc)

    def _read(self, prefix: str, within_s: float) -> dict[str, dict[str, Any]]:
        return read_notes(self._values, prefix, self._now_s() - within_s)

    def _delete(self, key: str) -> None:
        try:
            self._values.delete(key)
        except Exception as exc:
            logger.warning("A note of this replica's start could not be removed: %s", exc)


def starts_of(values: KeyValues, app: str, now_s: float) -> Mapping[str, Sequence[str]]:
    """Return what the starting replicas of an application's deployments say, by deployment. Blocks for milliseconds.

    Args:
        values: Where notes are kept.
        app: The application.
        now_s: Seconds since the epoch.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    prefix = f"{_ROOT}/{quote(app, safe='')}/"
    for key, note in sorted(read_notes(values, prefix, now_s - _STALE_S, now_s - _FORGET_S).items()):
        deployment, _, rest = key.removeprefix(prefix).partition("/")
        if rest.startswith("says/") and note.get("text"):
            found[unquote(deployment)].append(str(note["text"]))
    return found


def read_notes(
    values: KeyValues, prefix: str, since_s: float, forget_s: float = float("-inf")
) -> dict[str, dict[str, Any]]:
    """Return the notes under a prefix that are not older than `since_s`; nothing if they cannot be read.

    Args:
        values: Where notes are kept.
        prefix: Of the keys.
        since_s: Time, seconds since the epoch.
        forget_s: Of what replicas that were killed said before this time, nothing is left.
    """
    notes: dict[str, dict[str, Any]] = {}
    try:
        for key in values.keys(prefix):
            value = values.get(key)
            note = json.loads(value) if value is not None else {}
            at_s = float(note.get("at_s", 0.0))
            if at_s >= since_s:
                notes[key] = note
            elif "/says/" in key and at_s < forget_s:
                values.delete(key)
    except Exception as exc:  # whatever it is: nobody's work may depend on a note
        logger.warning("Notes of starting replicas could not be read: %s", exc)
    return notes
