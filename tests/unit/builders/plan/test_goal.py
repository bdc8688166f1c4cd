"""Goals from flags and files."""

from pathlib import Path

import pytest

from builders.plan.goal import Goal, read_goal
from serve.errors import ConfigError
from tests.unit.builders.plan.requests import request


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "goal.yaml"
    path.write_text("ttft_ms: 300\ntpot_ms: 40\nrate_per_s: 5\n")
    goal = read_goal(path, {"ttft_ms": 100.0})
    assert (goal.ttft_ms, goal.tpot_ms, goal.rate_per_s) == (100.0, 40.0, 5.0)
    assert read_goal(None, {}) == Goal()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ttft: 5", "goal.yaml: .ttft: there is no such setting"),
        ("rate_per_s: 0", "rate_per_s: .*greater than 0"),
        ("output_tokens: 1", "output_tokens: .*greater than or equal to 2"),
        ("cached_share: 1.0", "cached_share: .*less than 1"),
        ("objective: cheapest", "objective: .*'fewest_gpus'"),
        ("objective: fewest_gpus", "objective=fewest_gpus needs rate_per_s"),
        ("{input_tokens: 9, output_tokens: 9, context_tokens: 10}", "context_tokens=10 is less than .* raise it"),
        ("- 5", "a goal is a mapping such as"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "goal.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_goal(path, {})


def test_what_is_cached_is_not_computed() -> None:
    assert Goal(input_tokens=1000, cached_share=0.75).computed_tokens == 250
    assert Goal(input_tokens=1000, output_tokens=24).sequence_tokens == 1024


def test_the_objective_follows_from_what_is_known() -> None:
    assert request().objective == "max_tokens_per_gpu_hour"
    assert request(rate_per_s=1).objective == "fewest_gpus"
    assert request(gpu="h100,l4", rate_per_s=1).objective == "fewest_gpus"  # no prices
    assert request(rate_per_s=1, objective="lowest_latency").objective == "lowest_latency"
