"""Followers: the leader's side of the control channel of a tensor-parallel group.

Decisions travel over a TCP connection to each follower rather than as collectives: a connection may be idle for hours
without timing out, costs nothing while it is, and closes at once when a process at its end dies.
"""

import hmac
import logging
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it from C

from serve.core.framing import FrameReader, frame
from serve.engines.transformers.messages import Answer, Failed, Joined, Order, Stop
from serve.engines.transformers.rendezvous import TensorRank, own_address
from serve.errors import ConfigError, EngineDead, RayTRTError

_log = logging.getLogger(__name__)

MEETING_KEY = "raytrt/leader"
_POLL_S = 0.2  # how soon waiting in `meet` notices that the engine is stopped
_VERDICT_S = 1.0  # how long a failing follower's own words may be behind the collective that it broke
_MAX_JOIN_BYTES = 4096
_ANSWERS = msgspec.msgpack.Decoder(Answer)
_ENCODER = msgspec.msgpack.Encoder()
_Kind = TypeVar("_Kind")


class Followers:
    """All other ranks, as the leader sees them. Made by `meet`.

    A thread listens to them. What it hears of a rank that ended goes to `on_loss`, once and at any time, on that
    thread; everything else waits for `collect`. The other methods are for the engine's thread.

    Args:
        links: A connection to each rank from 1 on.
        on_loss: Called when the group cannot go on.
    """

    def __init__(self, links: dict[int, socket.socket], on_loss: Callable[[RayTRTError], None]) -> None:
        self._links = links
        self._on_loss = on_loss
        self._condition = threading.Condition()
        self._answers: dict[int, deque[Answer]] = {rank: deque() for rank in links}
        self._loss: RayTRTError | None = None
        self._closing = False
        threading.Thread(target=self._listen, name="tensor-followers", daemon=True).start()

    @property
    def loss(self) -> RayTRTError | None:
        """What ended the group, if anything did."""
        return self._loss

    def tell(self, order: Order) -> None:
        """Send an order to every follower.

        Raises:
            EngineDead, ConfigError: A follower is gone.
        """
        data = frame(_ENCODER.encode(order))
        for rank, link in self._links.items():
            try:
                link.sendall(data)
            except OSError as exc:
                raise self.verdict(EngineDead(f"tensor rank {rank} is gone: {exc}")) from exc

    def collect(self, kind: type[_Kind]) -> list[_Kind]:
        """Wait for one answer of each follower; without a time limit, since loading may take minutes.

        Raises:
            EngineDead, ConfigError: A follower is gone, or says something else.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._loss or self._closing or all(self._answers.values()))
            if self._loss is not None:
                raise self._loss
            if self._closing:
                raise EngineDead("the engine was stopped")
            answers = [waiting.popleft() for waiting in self._answers.values()]
        for rank, answer in zip(self._links, answers, strict=True):
            if not isinstance(answer, kind):
                raise EngineDead(f"tensor rank {rank} answered {type(answer).__name__}; {kind.__name__} was due")
        return [answer for answer in answers if isinstance(answer, kind)]

    def verdict(self, error: RayTRTError) -> RayTRTError:
        """Return why the group really ended: a follower's own words, which may be a moment behind `error`."""
        with self._condition:
            self._condition.wait_for(lambda: self._loss is not None, timeout=_VERDICT_S)
            return self._loss or error

    def dismiss(self, reason: str | None) -> None:
        """End the followers, and the connections. Safe to call twice, and from any thread."""
        with self._condition:
            if self._closing:
                return
            self._closing = True
            self._condition.notify_all()
        data = frame(_ENCODER.encode(Stop(reason)))
        for link in self._links.values():
            try:
                link.settimeout(_VERDICT_S)
                link.sendall(data)
                link.shutdown(socket.SHUT_WR)
            except OSError:
                _log.debug("a follower is gone before it was dismissed")

    def _listen(self) -> None:
        readers = {link.fileno(): (rank, FrameReader()) for rank, link in self._links.items()}
        poll = select.poll()
        for number in readers:
            poll.register(number, select.POLLIN)
        while readers:
            for number, _ in poll.poll():
                rank, reader = readers[number]
                if not self._hear(rank, reader):
                    poll.unregister(number)
                    del readers[number]
        for link in self._links.values():
            link.close()

    def _hear(self, rank: int, reader: FrameReader) -> bool:
        """Take what has come from one follower; False if it was the last."""
        try:
            data = self._links[rank].recv(1 << 16)
            answers = [_ANSWERS.decode(body) for body in reader.feed(data)]
        except (OSError, ValueError, msgspec.MsgspecError) as exc:
            self._lose(EngineDead(f"tensor rank {rank} is gone: {exc}"))
            return False
        for answer in answers:
            if isinstance(answer, Failed):
                self._lose(_error_of(rank, answer))
                continue
            with self._condition:
                self._answers[rank].append(answer)
                self._condition.notify_all()
        if not data:
            self._lose(EngineDead(f"tensor rank {rank} is gone: its process closed the connection"))
        return bool(data)

    def _lose(self, error: RayTRTError) -> None:
        with self._condition:
            if self._loss is not None or self._closing:
                return
            self._loss = error
            self._condition.notify_all()
        _log.error("the tensor-parallel group ends: %s", error)
        self._on_loss(error)


def meet(
    rank: TensorRank,
    store: TCPStore,
    software: str,
    on_loss: Callable[[RayTRTError], None],
    is_stopping: Callable[[], bool],
) -> Followers:
    """Wait for all followers to come.

    Raises:
        ConfigError: A follower runs other software.
        EngineDead: One has not come within `rank.timeout_s`, or `is_stopping` while waiting.
    """
    address, token = own_address(rank), secrets.token_hex(16)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    links: dict[int, socket.socket] = {}
    try:
        with socket.create_server((address, 0), family=family, backlog=rank.world_size) as listener:
            store.set(MEETING_KEY, f"{address} {listener.getsockname()[1]} {token}")
            deadline_s = time.monotonic() + rank.timeout_s
            while len(links) < rank.world_size - 1:
                if is_stopping():
                    raise EngineDead("the engine was stopped")
                if time.monotonic() > deadline_s:
                    missing = sorted(set(range(1, rank.world_size)) - set(links))
                    raise EngineDead(f"tensor ranks {missing} did not come within {rank.timeout_s:.0f} s")
                listener.settimeout(_POLL_S)
                try:
                    link, _ = listener.accept()
                except TimeoutError:
                    continue
                number = _admit(link, rank, token, software, taken=set(links))
                if number is not None:
                    links[number] = link
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return Followers(dict(sorted(links.items())), on_loss)


def _admit(link: socket.socket, rank: TensorRank, token: str, software: str, taken: set[int]) -> int | None:
    """Return the rank of a follower; None if whoever has come is none of ours."""
    link.settimeout(rank.timeout_s)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    joined = _read_joined(link)
    if joined is None or not hmac.compare_digest(joined.token, token):
        _log.warning("someone who is no rank of this group connected to it; closed")
        link.close()
        return None
    if joined.software != software:
        link.close()
        raise ConfigError(
            f"parallel.tensor: rank {joined.rank} runs {joined.software}, rank 0 runs {software}; install the same "
            "packages on every node"
        )
    if joined.rank in taken or not 0 < joined.rank < rank.world_size:
        link.close()
        raise EngineDead(f"tensor rank {joined.rank} came twice, or to the wrong group of {rank.world_size}")
    link.settimeout(None)
    return joined.rank


def _read_joined(link: socket.socket) -> Joined | None:
    reader = FrameReader(_MAX_JOIN_BYTES)
    try:
        while data := link.recv(_MAX_JOIN_BYTES):
            for body in reader.feed(data):
                answer = _ANSWERS.decode(body)
                return answer if isinstance(answer, Joined) else None
    except (OSError, ValueError, msgspec.MsgspecError) as exc:
        _log.debug("no greeting: %s", exc)
    return None


def _error_of(rank: int, failed: Failed) -> RayTRTError:
    text = f"tensor rank {rank}: {failed.text}"
    return ConfigError(text) if failed.who == "operator" else EngineDead(text)
