"""Synthetic workloads: what their description says, and the same again for the same seed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.yaml_file import read_settings
from sim.slo import Slo
from sim.workload import SimRequest, Workload
from sim.workload_synthetic import SyntheticWorkload, synthesise

CONFIGS = Path(__file__).parents[3] / "configs"
SIZE = 16


def described(**stream: Any) -> SyntheticWorkload:
    fields: dict[str, Any] = {
        "arrivals": {"per_s": 2},
        "message_tokens": {"mean": 100},
        "output_tokens": {"mean": 40},
        **stream,
    }
    return SyntheticWorkload.model_validate({"duration_s": 300, "streams": [fields]})


def gaps(workload: Workload) -> Any:
    return np.diff([request.arrival_s for request in workload.requests])


def test_the_same_seed_makes_the_same_requests_and_another_others() -> None:
    settings = described(turns=3, system_prompts={"count": 3, "tokens": {"mean": 200}})
    settings = settings.model_copy(update={"duration_s": 60.0})
    assert synthesise(settings, SIZE) == synthesise(settings, SIZE)
    other = settings.model_copy(update={"seed": 1})
    assert synthesise(other, SIZE) != synthesise(settings, SIZE)


def test_a_turn_begins_with_all_that_was_said_before() -> None:
    workload = synthesise(described(turns=4, gap_s=5), SIZE)
    talks: dict[str, list[SimRequest]] = {}
    for request in workload.requests:
        talks.setdefault(request.session, []).append(request)
    turns = [turn for talk in talks.values() for turn in pairwise(talk)]
    assert len(turns) > 300
    for before, after in turns:
        said = [*before.hashes, *before.output_hashes]
        assert list(after.hashes[: len(said)]) == said
        assert len(said) == (before.prompt_tokens + before.output_tokens) // SIZE
        assert len(after.hashes) == after.prompt_tokens // SIZE
        assert after.arrival_s >= before.arrival_s + 0.5 + 0.02 * before.output_tokens


def test_popular_system_prompts_are_zipf_distributed() -> None:
    prompts = {"count": 4, "tokens": {"mean": 64, "deviation": 0}, "zipf": 1.0}
    workload = synthesise(described(arrivals={"per_s": 7}, system_prompts=prompts), SIZE)
    firsts = [request.hashes[0] for request in workload.requests]
    shares = sorted((firsts.count(first) / len(firsts) for first in set(firsts)), reverse=True)
    assert shares == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.05)


@pytest.mark.parametrize("variation", [0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_variation_that_were_asked_for(variation: float) -> None:
    workload = synthesise(described(arrivals={"per_s": 7, "variation": variation}), SIZE)
    assert len(workload.requests) == pytest.approx(2100, rel=0.1 * max(1.0, variation))
    assert gaps(workload).std() / gaps(workload).mean() == pytest.approx(variation, rel=0.2)


def test_a_burst_comes_at_once_and_shares_its_prompt() -> None:
    arrivals = {"per_s": 0.001, "burst_every_s": 30, "burst_size": 20}
    prompts = {"count": 50, "tokens": {"mean": 64, "deviation": 0}, "zipf": 0}
    workload = synthesise(described(arrivals=arrivals, system_prompts=prompts), SIZE)
    bursts: dict[float, set[int]] = {}
    for request in workload.requests:
        bursts.setdefault(request.arrival_s, set()).add(request.hashes[0])
    sizes = [sum(request.arrival_s == at_s for request in workload.requests) for at_s in bursts]
    assert sizes.count(20) >= 4
    assert all(len(firsts) == 1 for firsts in bursts.values())


def test_lengths_have_the_mean_that_was_asked_for_and_keep_to_their_maximum() -> None:
    workload = synthesise(
        described(arrivals={"per_s": 7}, output_tokens={"mean": 100, "deviation": 0.5, "max": 250}), SIZE
    )
    outputs = np.array([request.output_tokens for request in workload.requests])
    assert outputs.mean() == pytest.approx(100, rel=0.1)
    assert outputs.max() == 250
    assert outputs.min() >= 1


def test_conversations_that_go_on_are_cut() -> None:
    workload = synthesise(described(turns=4, gap_s=50), SIZE)
    assert 280 < workload.duration_s <= 300


def test_a_conversation_ends_before_it_is_too_long() -> None:
    workload = synthesise(described(arrivals={"per_s": 0.3}, turns=50, context_tokens=1000), SIZE)
    lengths = [request.prompt_tokens + request.output_tokens for request in workload.requests]
    assert 800 < max(lengths) <= 1000


def test_adapters_do_not_share_blocks() -> None:
    prompts = {"count": 1, "tokens": {"mean": 64, "deviation": 0}}
    workload = synthesise(described(loras=3, system_prompts=prompts), SIZE)
    firsts = {(request.lora, request.hashes[0]) for request in workload.requests}
    assert len(firsts) == len({lora for lora, _ in firsts}) == 3


@pytest.mark.parametrize("path", sorted((CONFIGS / "workloads").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_workloads_in_the_repository_can_be_made(path: Path) -> None:
    settings = read_settings(SyntheticWorkload, path)
    short = settings.model_copy(update={"duration_s": 30.0})
    assert len(synthesise(short, 64).requests) > 10
    assert settings.name == path.stem


@pytest.mark.parametrize("path", sorted((CONFIGS / "slo").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_slos_in_the_repository_are_good(path: Path) -> None:
    assert read_settings(Slo, path) != Slo()
