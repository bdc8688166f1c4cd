"""The shell around the board, driven as Ray Serve drives it (without Ray: nothing here needs a cluster)."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

from serve.core.request import GenerateRequest
from serve.router import registry
from serve.router.board import MAX_BEST, RoutingBoard
from serve.router.replica_router import ReplicaRouter, router_config
from tests.unit.router.boards import SIZE, heard, holds, make_board, metadata, prompt, request

APP, DEPLOYMENT = "app", "model-m"


@dataclass
class Running:
    """A RunningReplica, as far as routers look at one."""

    replica_id: ReplicaID
    replica_metadata: dict[str, Any]
    max_ongoing_requests: int = 4

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def replica(name: str) -> Running:
    return Running(ReplicaID(name, DeploymentID(DEPLOYMENT, APP)), metadata())


def full_id(name: str) -> str:
    text: str = replica(name).replica_id.to_full_id_str()
    return text


def pending(argument: object) -> PendingRequest:
    identity = RequestMetadata(request_id="r", internal_request_id="i")
    return PendingRequest(
        args=[argument], kwargs={}, metadata=identity, future=asyncio.get_running_loop().create_future()
    )


def names(ranks: Sequence[Sequence[Running]]) -> list[list[str]]:
    return [[member.replica_id.unique_id for member in rank] for rank in ranks]


@pytest.fixture
def board() -> Iterator[RoutingBoard]:
    board, _, _ = make_board()
    registry.register(APP, DEPLOYMENT, board)
    yield board
    registry.unregister(APP, DEPLOYMENT)


def make_router(count: int) -> ReplicaRouter:
    config = RequestRouterConfig(**router_config(DEPLOYMENT, "m", {"policy": "longest_prefix"}))
    # Serve's way: pickled by value, made in another process.
    router: ReplicaRouter = config.get_request_router_class()(
        deployment_id=DeploymentID(DEPLOYMENT, APP),
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        prefer_local_node_routing=False,
    )
    router.initialize_state(**config.request_router_kwargs)
    router.update_replicas([replica(f"r{number}") for number in range(count)])
    return router


async def test_it_finds_the_board_of_its_process_though_it_was_pickled(board: RoutingBoard) -> None:
    router = make_router(3)
    assert heard(board) == (0, 3)
    holds(board, full_id("r1"), prompt(1))
    asked = pending(request("one", prompt(1)))
    ranks = names(await router.choose_replicas(router._replicas_list, asked))
    assert ranks[0] == ["r1"]
    assert sorted(name for rank in ranks for name in rank) == ["r0", "r1", "r2"]
    assert asked.routing_context.should_backoff
    sent = asked.args[0]
    assert isinstance(sent, GenerateRequest)
    assert sent.expected_cached_tokens == 8 * SIZE


async def test_the_best_are_tried_one_by_one_and_the_others_are_equal(board: RoutingBoard) -> None:
    router = make_router(12)
    ranks = names(await router.choose_replicas(router._replicas_list, pending(request("one", prompt(1)))))
    assert [len(rank) for rank in ranks] == [1] * MAX_BEST + [12]
    assert len({name for rank in ranks[:-1] for name in rank}) == MAX_BEST
    assert len(set(ranks[-1])) == 12


async def test_a_replica_that_serve_knows_to_be_full_is_not_tried_first(board: RoutingBoard) -> None:
    router = make_router(3)
    holds(board, full_id("r1"), prompt(1))
    router.on_new_queue_len_info(replica("r1").replica_id, 4)
    ranks = names(await router.choose_replicas(router._replicas_list, pending(request("one", prompt(1)))))
    assert [len(rank) for rank in ranks] == [1, 1, 3]
    assert ["r1"] not in ranks


async def test_who_did_not_take_it_is_not_asked_next(board: RoutingBoard) -> None:
    router = make_router(3)
    holds(board, full_id("r1"), prompt(1))
    asked = pending(request("one", prompt(1)))
    first = await router.choose_replicas(router._replicas_list, asked)
    again = await router.choose_replicas(router._replicas_list, asked)
    assert names(again)[0] == ["r1"], "nobody was asked meanwhile"
    asked.future.set_result(first[0][0])
    asked.reset_future()
    ranks = names(await router.choose_replicas(router._replicas_list, asked))
    assert ranks[-1] == ["r1"]
    assert board.counts.refusals == 1
    router.on_request_routed(asked, replica("r2").replica_id, object())


async def test_a_dead_replica_is_forgotten_at_once(board: RoutingBoard) -> None:
    router = make_router(3)
    holds(board, full_id("r1"), prompt(1))
    router.on_replica_actor_died(replica("r1").replica_id)
    ranks = names(await router.choose_replicas(router._replicas_list, pending(request("one", prompt(1)))))
    assert sorted(name for rank in ranks for name in rank) == ["r0", "r2"]


@pytest.mark.parametrize("argument", ["no request", None])
async def test_other_calls_go_anywhere(board: RoutingBoard, argument: object) -> None:
    router = make_router(2)
    ranks = names(await router.choose_replicas(router._replicas_list, pending(argument)))
    assert ranks == [["r0", "r1"]]
    router.on_request_routed(pending(argument), replica("r0").replica_id, object())


async def test_a_defect_of_routing_leaves_the_choice_to_serve(
    board: RoutingBoard, caplog: pytest.LogCaptureFixture
) -> None:
    router = make_router(2)
    broken = GenerateRequest("one", "m", b"abc")  # no whole number of tokens
    ranks = names(await router.choose_replicas(router._replicas_list, pending(broken)))
    assert ranks == [["r0", "r1"]]
    assert "A routing decision failed" in caplog.text


async def test_a_process_without_gateway_routes_too() -> None:
    router = make_router(2)
    try:
        asked = pending(request("one", prompt(1)))
        ranks = names(await router.choose_replicas(router._replicas_list, asked))
        assert [len(rank) for rank in ranks] == [1, 1]
        router.on_request_routed(asked, replica(ranks[0][0]).replica_id, object())
    finally:
        router._board.roster.feeds.close()
        registry.unregister(APP, DEPLOYMENT)
