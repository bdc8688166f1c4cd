"""What an engine does, and the time that it takes, give its rates back."""

import random
from itertools import pairwise

import pytest

from serve.core.routing.load import LoadReport
from serve.core.routing.rates import PRIOR, FleetRates, LearnedRates, Rates

H100 = Rates(token_s=1.3e-5, pair_s=8e-10, step_s=4e-3, sequence_s=4e-6, context_s=2.2e-8)
CPU = Rates(token_s=2e-3, pair_s=1e-8, step_s=0.03, sequence_s=1e-3, context_s=1e-7)


def work(rates: Rates, reports: int, seed: int = 0, *, prompts: bool = True) -> list[LoadReport]:
    """Return the reports of an engine of these rates under changing load."""
    rng, made = random.Random(seed), [LoadReport()]
    for _ in range(reports):
        before = made[-1]
        steps, running = rng.randint(1, 8), rng.randint(1, 60)
        context = running * rng.randint(100, 4000)
        tokens = rng.choice((0, 0, 500, 3000, 8000)) if prompts else 0
        pairs = tokens * rng.randint(100, 10_000)
        read = steps * context
        spent = (tokens, pairs, steps, running * steps, read)
        made.append(
            LoadReport(
                running=running,
                context_tokens=context,
                read_tokens=before.read_tokens + read,
                prefilled_tokens=before.prefilled_tokens + tokens,
                prefilled_pairs=before.prefilled_pairs + pairs,
                steps=before.steps + steps,
                generated_tokens=before.generated_tokens + running * steps,
                busy_s=before.busy_s + sum(rate * amount for rate, amount in zip(rates, spent, strict=True)),
            )
        )
    return made


def learn(learned: LearnedRates, reports: list[LoadReport]) -> None:
    for before, after in pairwise(reports):
        learned.learn(before, after)


@pytest.mark.parametrize("rates", [H100, CPU], ids=["h100", "cpu"])
def test_rates_are_found_whatever_the_hardware(rates: Rates) -> None:
    learned = LearnedRates(FleetRates())
    learn(learned, work(rates, 2000))
    assert learned.known
    found = learned.rates
    for pairs in (0.0, 5e3, 1e5):  # of each token: in a short prompt, in a usual one, and at the end of a long one
        assert found.token_s + pairs * found.pair_s == pytest.approx(rates.token_s + pairs * rates.pair_s, rel=0.05)
    assert found.decode_step_s(30, 60_000) == pytest.approx(rates.decode_step_s(30, 60_000), rel=0.05)


def test_nothing_is_learned_from_an_idle_engine() -> None:
    learned = LearnedRates(FleetRates())
    assert not learned.learn(LoadReport(), LoadReport())
    assert not learned.known
    assert learned.rates == PRIOR


def test_a_gpu_that_is_throttled_is_noticed() -> None:
    learned = LearnedRates(FleetRates())
    learn(learned, work(H100, 3000))
    slow = Rates(*(2.0 * rate for rate in H100))
    learn(learned, work(slow, 12_000, seed=1))
    assert learned.rates.token_s == pytest.approx(slow.token_s, rel=0.15)


def test_rates_are_never_negative_and_what_was_not_seen_stays_reasonable() -> None:
    learned = LearnedRates(FleetRates())
    learn(learned, work(H100, 1000, prompts=False))
    assert min(learned.rates) >= 0.0
    assert learned.rates.decode_step_s(30, 60_000) == pytest.approx(H100.decode_step_s(30, 60_000), rel=0.1)


def test_an_engine_that_counts_neither_steps_nor_time_keeps_the_prior() -> None:
    learned = LearnedRates(FleetRates())
    for report in work(H100, 50):
        learned.learn(LoadReport(), LoadReport(prefilled_tokens=report.prefilled_tokens, generated_tokens=5))
    assert learned.rates == PRIOR


def test_a_newcomer_is_taken_to_be_like_the_others_until_it_has_shown_more() -> None:
    fleet = FleetRates()
    for seed in range(3):
        learn(LearnedRates(fleet), work(H100, 1000, seed))
    newcomer = LearnedRates(fleet)
    assert newcomer.rates.token_s == pytest.approx(H100.token_s, rel=0.05)
    learn(newcomer, work(H100, 8, prompts=False))  # what prompts cost does not show
    assert newcomer.rates.token_s == pytest.approx(H100.token_s, rel=0.1)


def test_a_slower_gpu_among_fast_ones_is_found_out() -> None:
    fleet, slow = FleetRates(), Rates(*(3.0 * rate for rate in H100))
    for seed in range(3):
        learn(LearnedRates(fleet), work(H100, 1000, seed))
    learned = LearnedRates(fleet)
    learn(learned, work(slow, 1000))
    assert learned.rates.token_s == pytest.approx(slow.token_s, rel=0.15)
