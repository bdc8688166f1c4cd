"""Fleets of different GPUs, and of very many."""

import numpy as np

from serve.core.routing.policies.least_load import RoundRobinPolicy
from serve.core.routing.policies.predictive import PredictivePolicy
from serve.engines.simulated.settings import RooflineSettings, SimulatedSettings
from sim.simulator import simulate
from sim.workload import SimRequest


def engine(gpu: str) -> SimulatedSettings:
    return SimulatedSettings(tokens_per_block=512, latency=RooflineSettings(gpu=gpu))


def requests(count: int, per_s: float, tokens: int = 6000) -> list[SimRequest]:
    blocks = tokens // 512
    return [
        SimRequest(number / per_s, tokens, 40, [number * blocks + block + 1 for block in range(blocks)], max_tokens=40)
        for number in range(count)
    ]


def test_a_mixed_fleet_needs_no_configuration() -> None:
    engines = [engine("h100"), engine("h100"), engine("l40s"), engine("l40s")]
    asked = requests(900, 16.0)
    learned = simulate(asked, engines, PredictivePolicy())
    blind = simulate(asked, engines, RoundRobinPolicy())
    fast, slow = (np.isin(learned.replica, rows).sum() for rows in ((0, 1), (2, 3)))
    assert fast > 1.5 * slow  # prompts of one size: an H100 computes them about three times as fast
    assert slow > 50
    assert np.percentile(learned.ttft_s, 90) < 0.5 * np.percentile(blind.ttft_s, 90)


def test_thousands_of_replicas_are_simulated() -> None:
    outcome = simulate(requests(200, 500.0), [engine("h100")] * 2000, PredictivePolicy())
    assert outcome.served.all()
    assert len(set(outcome.replica.tolist())) == 200  # nobody waits behind another
