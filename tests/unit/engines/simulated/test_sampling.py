"""Tokens are a function of what came before, and parameters do what they say."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.request import SamplingParams
from serve.engines.simulated.sampling import Sampler, describe, draw_seed
from serve.engines.simulated.tokens import LADDER, TokenSource

VOCAB = 300
SOURCE = TokenSource(seed=1, vocab_size=VOCAB, first_id=10, last_id=250)
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5]),
    min_p=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 9),
    logit_bias=st.sampled_from([{}, {5: 3.0}, {20: -100.0}]),
)


def sampler(prompt: list[int], sampling: SamplingParams, source: TokenSource = SOURCE, hazard: float = 0.0) -> Sampler:
    return Sampler(source, sampling, np.asarray(prompt, dtype=np.uint32), draw_seed(sampling, "id"), hazard)


def generate(prompt: list[int], sampling: SamplingParams, count: int = 12, hazard: float = 0.0) -> list[int]:
    chosen = sampler(prompt, sampling, hazard=hazard)
    return [chosen.next() for _ in range(count)]


@given(prompt=prompts)
def test_the_state_of_a_prompt_is_that_of_its_tokens_one_by_one(prompt: list[int]) -> None:
    array = np.asarray(prompt, dtype=np.uint32)
    source = TokenSource(0, VOCAB, 0, VOCAB - 1)  # a fresh one: its table of powers has to grow
    states = list(source.states(array))
    assert [source.state_after(array[:i]) for i in range(1, len(prompt))] == states[1:]
    assert source.state_after(array) == source.next_state(states[-1], prompt[-1])


@given(prompt=prompts, sampling=params, done=st.integers(0, 11))
def test_a_sequence_goes_on_elsewhere_as_it_would_have(prompt: list[int], sampling: SamplingParams, done: int) -> None:
    whole = generate(prompt, sampling)
    assert whole[:done] + generate(prompt + whole[:done], sampling, 12 - done) == whole


@given(prompt=prompts, sampling=params)
def test_generated_ids_are_in_the_range(prompt: list[int], sampling: SamplingParams) -> None:
    assert all(10 <= token <= 250 or token in sampling.logit_bias for token in generate(prompt, sampling))


@given(prompt=prompts, other=prompts)
def test_another_prompt_or_model_says_something_else(prompt: list[int], other: list[int]) -> None:
    greedy = SamplingParams(temperature=0.0)
    if prompt != other:
        assert generate(prompt, greedy) != generate(other, greedy)
    elsewhere = sampler(prompt, greedy, TokenSource(2, VOCAB, 10, 250))
    assert [elsewhere.next() for _ in range(12)] != generate(prompt, greedy)


def test_ids_are_spread_evenly() -> None:
    counts = Counter(generate([1], SamplingParams(temperature=0.0), 24_100))
    assert len(counts) == 241
    assert max(counts.values()) < 2 * 100
    assert min(counts.values()) > 100 / 2


def test_draws_follow_the_distribution() -> None:
    sampling = SamplingParams(temperature=1.0, seed=3)
    array = np.asarray([1], dtype=np.uint32)
    rungs: Counter[int] = Counter()
    chosen = Sampler(SOURCE, sampling, array, draw_seed(sampling, ""))
    for _ in range(20_000):
        state = chosen.state
        rungs[(chosen.next() - SOURCE.ladder_token(state, 0)) % 241] += 1
    weights = [math.exp(logit) for logit in SOURCE.ladder_logits]
    for rung in range(5):
        assert rungs[rung] / 20_000 == pytest.approx(weights[rung] / sum(weights), abs=0.015)


@given(prompt=prompts)
def test_probabilities_add_up_to_about_one(prompt: list[int]) -> None:
    state = SOURCE.state_after(np.asarray(prompt, dtype=np.uint32))
    total = sum(math.exp(describe(SOURCE, state, token, 0).logprob) for token in range(VOCAB))
    assert total == pytest.approx(1.0, abs=0.02)


@given(prompt=prompts, count=st.integers(0, LADDER))
def test_the_likeliest_are_the_likeliest(prompt: list[int], count: int) -> None:
    state = SOURCE.state_after(np.asarray(prompt, dtype=np.uint32))
    every = {token: describe(SOURCE, state, token, 0).logprob for token in range(VOCAB)}
    ranked = sorted(every, key=lambda token: -every[token])[:count]
    top = describe(SOURCE, state, 11, count).top
    assert [token for token, _ in top] == ranked
    assert [value for _, value in top] == pytest.approx([every[token] for token in ranked])


@given(prompt=prompts, sampling=params, bias=st.floats(-100, 100))
def test_a_bias_on_a_token_never_chosen_changes_nothing_unless_it_lifts_it(
    prompt: list[int], sampling: SamplingParams, bias: float
) -> None:
    greedy = SamplingParams(temperature=0.0)
    plain = generate(prompt, greedy)
    unused = next(token for token in range(10, 250) if token not in plain)
    biased = generate(prompt, SamplingParams(temperature=0.0, logit_bias={unused: bias}))
    assert biased == plain or bias > 0


@given(prompt=prompts, forbidden=st.integers(1, 60))
def test_forbidden_tokens_leave_the_next_likeliest(prompt: list[int], forbidden: int) -> None:
    state = SOURCE.state_after(np.asarray(prompt, dtype=np.uint32))
    banned = {SOURCE.ladder_token(state, rung): -100.0 for rung in range(forbidden)}
    (token,) = generate(prompt, SamplingParams(temperature=0.0, logit_bias=banned), 1)
    assert token not in banned
    if forbidden < LADDER:
        assert token == SOURCE.ladder_token(state, forbidden)


@given(prompt=prompts, count=st.integers(1, 8))
def test_stop_tokens_are_held_back_for_min_tokens(prompt: list[int], count: int) -> None:
    free = generate(prompt, SamplingParams(temperature=0.0))
    stops = tuple(free[:3])
    tokens = generate(prompt, SamplingParams(temperature=0.0, stop_token_ids=stops, min_tokens=count), count)
    assert not set(tokens) & set(stops)


def test_a_hazard_ends_sequences_at_its_rate_and_not_before_min_tokens() -> None:
    sampling = SamplingParams(temperature=0.0, stop_token_ids=(2,), min_tokens=5)
    lengths = []
    for prompt in range(400):
        chosen = sampler([prompt % VOCAB, prompt], sampling, hazard=0.1)
        lengths.append(next(i for i in range(10_000) if chosen.is_stop(chosen.next())))
    assert min(lengths) == 5
    assert sum(lengths) / len(lengths) == pytest.approx(5 + 9, abs=1.5)
    assert 2 not in generate([1], SamplingParams(temperature=0.0), 200, hazard=0.5)


def test_without_a_seed_the_request_id_is_the_seed() -> None:
    sampling = SamplingParams(temperature=1.0)
    assert draw_seed(sampling, "a") == draw_seed(sampling, "a") != draw_seed(sampling, "b")
    seeded = SamplingParams(temperature=1.0, seed=-5)
    assert draw_seed(seeded, "a") == draw_seed(seeded, "b")
