import pytest

from serve.core.blocks import block_hashes
from serve.core.routing.policies.predictive import PredictivePolicy
from serve.core.routing.request import RouteRequest, route_id
from serve.core.routing.router import Router


def request(name: str, first_token: int = 0) -> RouteRequest:
    hashes = block_hashes(range(first_token, first_token + 64), 16).tolist()
    return RouteRequest(route_id(name), hashes, 64, 16)


def make_router() -> Router:
    router = Router(PredictivePolicy(), 16)
    for name in ("a", "b"):
        router.add(name, 0.0)
    return router


def test_a_recalled_request_counts_nowhere() -> None:
    router, one = make_router(), request("one")
    before = router.fleet.view(0.0)
    decision = router.route(one, 0.0)
    assert decision is not None
    router.commit(one, decision, 0.0)
    assert router.fleet.view(0.0).waiting.sum() == 1
    router.recall(one.route_id)
    after = router.fleet.view(0.0)
    for column in ("waiting", "queued_prefill_tokens", "active_blocks", "committed_blocks", "assigned_share"):
        assert getattr(after, column).tolist() == getattr(before, column).tolist(), column


def test_routing_a_waiting_request_again_and_again_counts_its_work_once() -> None:
    router, one = make_router(), request("one")
    for _ in range(10):
        router.recall(one.route_id)
        decision = router.route(one, 0.0)
        assert decision is not None
        router.commit(one, decision, 0.0)
    two = request("two", 1000)
    decision = router.route(two, 0.0)
    assert decision is not None
    router.commit(two, decision, 0.0)
    assert router.fleet.view(0.0).assigned_share == pytest.approx([1.0, 1.0], abs=0.01)


def test_a_request_that_is_routed_again_does_not_look_like_many_with_one_prompt() -> None:
    router, one = make_router(), request("one")
    for _ in range(40):
        decision = router.route(one, 0.0)
        assert decision is not None
        router.commit(one, decision, 0.0)
        router.recall(one.route_id)
    decision = router.route(request("other"), 0.0)
    assert decision is not None
    assert decision.match.common_blocks == 0
