"""How tensor-parallel ranks meet and talk: whoever is missing, strange, silent or gone is noticed and named."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it from C

from serve.core.framing import frame
from serve.engines.transformers.followers import MEETING_KEY, Followers, meet
from serve.engines.transformers.leader_link import LeaderLink, follow
from serve.engines.transformers.messages import CacheMade, Cancel, Failed, Joined, Loaded, Order, Sampled, Step, Stop
from serve.engines.transformers.rendezvous import TensorRank, open_store, own_address, visit_store
from serve.errors import ConfigError, EngineDead, RayTRTError

HOST = "127.0.0.1"


class Losses:
    """Takes what ends a group."""

    def __init__(self) -> None:
        self.errors: list[RayTRTError] = []
        self.came = threading.Event()

    def __call__(self, error: RayTRTError) -> None:
        self.errors.append(error)
        self.came.set()


@pytest.fixture
def rank() -> Iterator[TensorRank]:
    store, port = open_store(HOST)
    yield TensorRank(0, 2, HOST, port, None, 20.0)
    del store


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def met(rank: TensorRank, pool: ThreadPoolExecutor, losses: Losses) -> tuple[Followers, list[LeaderLink]]:
    """Have all ranks of a group meet."""
    leading = pool.submit(meet, rank, visit_store(rank), "same", losses, lambda: False)
    others = [replace(rank, rank=number) for number in range(1, rank.world_size)]
    links = [pool.submit(follow, other, visit_store(other), "same", lambda: None) for other in others]
    return leading.result(20), [link.result(20) for link in links]


def end(followers: Followers, links: list[LeaderLink]) -> None:
    followers.dismiss(None)
    for link in links:
        link.close()


def test_orders_reach_every_rank_in_order_and_answers_come_by_rank(rank: TensorRank, pool: ThreadPoolExecutor) -> None:
    followers, links = met(replace(rank, world_size=3), pool, losses := Losses())
    orders: list[Order] = [Cancel("a"), Step(), Sampled(list(range(100_000)))]  # more than the sockets hold

    def tell() -> None:
        for order in orders:
            followers.tell(order)

    sending = pool.submit(tell)
    for link in links:
        assert [link.next_order() for _ in orders] == orders
    sending.result(20)
    for blocks, link in ((7, links[1]), (5, links[0])):
        link.answer(CacheMade(blocks))
    assert followers.collect(CacheMade) == [CacheMade(5), CacheMade(7)]
    end(followers, links)
    assert losses.errors == []


def test_a_follower_that_is_dismissed_is_told_why(rank: TensorRank, pool: ThreadPoolExecutor) -> None:
    followers, (link,) = met(rank, pool, losses := Losses())
    followers.tell(Step())
    followers.dismiss("because")
    followers.dismiss("twice")
    assert [link.next_order(), link.next_order()] == [Step(), Stop("because")]
    with pytest.raises(EngineDead, match="leader"):
        link.next_order()
    link.close()
    link.close()
    assert losses.errors == []


@pytest.mark.parametrize(("who", "kind"), [("operator", ConfigError), ("engine", EngineDead)])
def test_what_a_follower_says_of_its_end_is_why_the_group_ends(
    who: str, kind: type[RayTRTError], rank: TensorRank, pool: ThreadPoolExecutor
) -> None:
    followers, (link,) = met(rank, pool, losses := Losses())
    waiting = pool.submit(followers.collect, Loaded)
    link.answer(Failed(who, "no weights here"))  # type: ignore[arg-type]  # parametrized
    link.close()
    with pytest.raises(kind, match="tensor rank 1: no weights here"):
        waiting.result(20)
    assert isinstance(followers.verdict(EngineDead("a collective failed")), kind)
    assert losses.came.wait(20)
    assert [type(error) for error in losses.errors] == [kind]
    followers.dismiss("it is over")


def test_a_follower_that_is_gone_ends_the_group_while_nothing_is_asked_of_it(
    rank: TensorRank, pool: ThreadPoolExecutor
) -> None:
    followers, links = met(replace(rank, world_size=3), pool, losses := Losses())
    links[1].close()
    assert losses.came.wait(20)
    assert "tensor rank 2 is gone" in str(losses.errors[0])
    with pytest.raises(EngineDead, match="tensor rank 2 is gone"):
        followers.collect(Loaded)
    end(followers, links)


def test_an_answer_that_was_not_due_is_an_error(rank: TensorRank, pool: ThreadPoolExecutor) -> None:
    followers, links = met(rank, pool, Losses())
    links[0].answer(CacheMade(3))
    with pytest.raises(EngineDead, match="Loaded was due"):
        followers.collect(Loaded)
    end(followers, links)


def test_a_peer_that_speaks_something_else_ends_the_group(rank: TensorRank, pool: ThreadPoolExecutor) -> None:
    losses = Losses()
    ours, theirs = socket.socketpair()
    followers = Followers({1: ours}, losses)
    theirs.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert losses.came.wait(20)
    assert "tensor rank 1 is gone" in str(losses.errors[0])
    followers.dismiss(None)
    theirs.close()


def test_a_collect_ends_when_the_engine_is_stopped(rank: TensorRank, pool: ThreadPoolExecutor) -> None:
    followers, links = met(rank, pool, Losses())
    waiting = pool.submit(followers.collect, Loaded)
    followers.dismiss(None)
    with pytest.raises(EngineDead, match="stopped"):
        waiting.result(20)
    links[0].close()


def test_a_follower_beats_while_it_waits_and_notices_that_the_leader_is_gone() -> None:
    ours, theirs = socket.socketpair()
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 3:
            theirs.close()

    link = LeaderLink(ours, beat)
    hung_up = threading.Event()
    link.watch(hung_up.set)
    with pytest.raises(EngineDead, match="leader"):
        link.next_order()
    assert beats >= 3
    assert hung_up.wait(20), "what it may be computing meanwhile was not aborted"
    link.close()


def test_hanging_up_is_no_loss_of_the_leader() -> None:
    ours, theirs = socket.socketpair()
    link = LeaderLink(ours, lambda: None)
    hung_up = threading.Event()
    link.watch(hung_up.set)
    watching = [thread for thread in threading.enumerate() if thread.name == "tensor-leader"]
    link.close()
    for thread in watching:
        thread.join(20)
    assert not hung_up.is_set()
    theirs.close()


def test_strangers_are_turned_away_and_the_meeting_goes_on(rank: TensorRank, pool: ThreadPoolExecutor) -> None:
    store = visit_store(rank)  # each its own: one waits for its turn while another waits for a key
    leading = pool.submit(meet, rank, visit_store(rank), "same", Losses(), lambda: False)
    for greeting in (b"", b"nonsense that is no frame", frame(msgspec.msgpack.encode(Joined("wrong", 1, "same")))):
        with connected(store) as stranger:
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    link = follow(replace(rank, rank=1), store, "same", lambda: None)
    end(leading.result(20), [link])


def connected(store: TCPStore) -> socket.socket:
    host, port, _ = store.get(MEETING_KEY).decode().split()
    return socket.create_connection((host, int(port)), timeout=20)


def test_a_rank_with_other_software_is_refused(rank: TensorRank, pool: ThreadPoolExecutor) -> None:
    leading = pool.submit(meet, rank, visit_store(rank), "torch 1", Losses(), lambda: False)
    link = follow(replace(rank, rank=1), visit_store(rank), "torch 2", lambda: None)
    with pytest.raises(ConfigError, match="rank 1 runs torch 2, rank 0 runs torch 1"):
        leading.result(20)
    with pytest.raises(EngineDead, match="leader"):
        link.next_order()
    link.close()


def test_a_rank_that_comes_twice_is_an_error(rank: TensorRank, pool: ThreadPoolExecutor) -> None:
    three = replace(rank, world_size=3)
    leading: Future[Followers] = pool.submit(meet, three, visit_store(rank), "same", Losses(), lambda: False)
    links = [follow(replace(three, rank=1), visit_store(rank), "same", lambda: None) for _ in range(2)]
    with pytest.raises(EngineDead, match="rank 1 came twice"):
        leading.result(20)
    for link in links:
        link.close()


def test_a_leader_that_does_not_come_is_an_error(rank: TensorRank) -> None:
    other = replace(rank, rank=1, timeout_s=0.2)
    with pytest.raises(EngineDead, match="found no leader within"):
        follow(other, visit_store(other), "same", lambda: None)


def test_an_address_that_others_can_reach(rank: TensorRank) -> None:
    assert own_address(rank) == HOST


def test_a_rank_beyond_its_group_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=2"):
        TensorRank(2, 2, HOST, 1)
