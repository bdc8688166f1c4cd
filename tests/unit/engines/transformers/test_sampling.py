"""The vectorised sampler says for each row what a plain one says for it alone."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.core.request import SamplingParams, TokenLogprob
from serve.engines.transformers.sampling import SamplerRow, sample, uniforms

VOCAB_SIZE = 23
CPU = torch.device("cpu")
Logits = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One row: what was generated so far, and how to go on."""

    params: SamplingParams
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    seed: int
    logits: tuple[float, ...]

    def row(self) -> SamplerRow:
        row = SamplerRow(self.params, np.array(self.prompt, dtype=np.uint32), self.seed, VOCAB_SIZE, CPU)
        for token in self.output:
            row.advance(token)
        return row


def params(**fixed: Any) -> st.SearchStrategy[SamplingParams]:
    def floats(low: float, high: float) -> st.SearchStrategy[float]:
        return st.floats(low, high, width=32)

    tokens = st.integers(0, VOCAB_SIZE - 1)
    fields: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.just(0.0) | floats(0.0625, 2.0),
        "top_p": st.just(1.0) | floats(0.0625, 1.0),
        "top_k": st.integers(0, VOCAB_SIZE + 5),
        "min_p": st.just(0.0) | floats(0.0, 1.0),
        "repetition_penalty": st.just(1.0) | floats(0.25, 4.0),
        "presence_penalty": st.just(0.0) | floats(-2.0, 2.0),
        "frequency_penalty": st.just(0.0) | floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(tokens, floats(-100.0, 100.0), max_size=3),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(tokens, max_size=2, unique=True).map(tuple),
        "logprobs": st.none() | st.integers(0, 5),
    }
    fields.update({name: st.just(value) for name, value in fixed.items()})
    return st.fixed_dictionaries(fields).map(lambda values: SamplingParams(**values))


def cases(**fixed: Any) -> st.SearchStrategy[Case]:
    token = st.integers(0, VOCAB_SIZE - 1)
    # Quarters, so that ties, which 16-bit models produce all the time, are common here too.
    logit = st.integers(-40, 40).map(lambda quarter: quarter / 4)
    return st.builds(
        Case,
        params=params(**fixed),
        prompt=st.lists(token, min_size=1, max_size=6).map(tuple),
        output=st.lists(token, max_size=6).map(tuple),
        seed=st.integers(-(2**70), 2**70),
        logits=st.tuples(*[logit] * VOCAB_SIZE),
    )


def edited(case: Case) -> Logits:
    """Penalties, bias and `min_tokens`, token by token as `SamplingParams` words them."""
    sampling, logits = case.params, np.array(case.logits)
    for token in range(VOCAB_SIZE):
        count = case.output.count(token)
        if token in case.prompt or count:
            factor = 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
            logits[token] *= factor
        logits[token] -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
        logits[token] += sampling.logit_bias.get(token, 0.0)
        if token in sampling.stop_token_ids and len(case.output) < sampling.min_tokens:
            logits[token] = -math.inf
    return logits


def probabilities(logits: Logits) -> Logits:
    weights = np.exp(logits - logits.max())
    result: Logits = weights / weights.sum()
    return result


def distribution(case: Case) -> tuple[Logits, Logits]:
    """Return the probabilities to draw by, after top_k, top_p and min_p, and before them."""
    sampling = case.params
    whole = probabilities(edited(case) / sampling.temperature)
    kept = whole.copy()
    if 0 < sampling.top_k < VOCAB_SIZE:
        kept[kept < np.sort(kept)[-sampling.top_k]] = 0
        kept /= kept.sum()
    if sampling.top_p < 1:
        # The least probability that the smallest likeliest set of mass top_p contains; ties with it stay.
        mass, least = 0.0, 0.0
        for probability in np.sort(kept)[::-1]:
            if mass >= sampling.top_p:
                break
            mass, least = mass + probability, probability
        kept[kept < least] = 0
    kept[kept < sampling.min_p * whole.max()] = 0
    return kept / kept.sum(), whole


def choose(case: Case) -> tuple[int, TokenLogprob | None]:
    samples = sample(torch.tensor([case.logits], dtype=torch.float32), [case.row()])
    assert not samples.broken
    return samples.token_ids[0], samples.logprobs[0]


@given(cases(temperature=0.0))
def test_greedy_takes_a_likeliest_token_after_penalties_and_bias(case: Case) -> None:
    logits = edited(case)
    token, _ = choose(case)
    assert logits[token] == pytest.approx(logits.max(), abs=1e-4)


@given(cases().filter(lambda case: case.params.temperature > 0))
def test_a_draw_is_where_the_uniform_number_falls_in_the_filtered_distribution(case: Case) -> None:
    kept, whole = distribution(case)
    token, _ = choose(case)
    position = len(case.prompt) + len(case.output)
    (uniform,) = uniforms([case.seed % 2**64], [position])
    edges = np.concatenate([[0.0], np.cumsum(kept)])
    falls_here = edges[token] - 1e-4 <= uniform <= edges[token + 1] + 1e-4 and kept[token] > 0
    # A filter whose threshold is within rounding of a probability may fall either way.
    assert falls_here or _is_marginal(case, whole)


def _is_marginal(case: Case, whole: Logits) -> bool:
    ordered = np.sort(whole)[::-1]
    sums = np.cumsum(ordered)
    if 0 < case.params.top_k < VOCAB_SIZE:
        first = ordered[ordered >= ordered[case.params.top_k - 1]]
        sums = np.cumsum(first / first.sum())
    near_nucleus = np.abs(sums - case.params.top_p).min() < 1e-4
    near_least = np.abs(ordered - case.params.min_p * ordered[0]).min() < 1e-4
    return bool(near_nucleus or (case.params.min_p > 0 and near_least) or _has_near_ties(ordered))


def _has_near_ties(ordered: Logits) -> bool:
    gaps = np.abs(np.diff(ordered))
    return bool(((gaps > 0) & (gaps < 1e-5)).any())


@settings(max_examples=40)
@given(st.lists(cases(), min_size=1, max_size=6), st.randoms())
def test_a_row_does_not_depend_on_its_batch(batch: list[Case], random: Any) -> None:
    alone = [choose(case) for case in batch]
    order = list(range(len(batch)))
    random.shuffle(order)
    samples = sample(torch.tensor([batch[i].logits for i in order]), [batch[i].row() for i in order])
    for place, i in enumerate(order):
        token, logprob = alone[i]
        assert samples.token_ids[place] == token
        if logprob is None:
            assert samples.logprobs[place] is None
        else:
            _check_equal(samples.logprobs[place], logprob)


def _check_equal(one: TokenLogprob | None, other: TokenLogprob) -> None:
    assert one is not None
    assert one.token_id == other.token_id
    assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-5)


@given(cases().filter(lambda case: case.params.logprobs is not None))
def test_logprobs_are_of_the_raw_logits(case: Case) -> None:
    token, entry = choose(case)
    assert entry is not None
    expected = np.log(probabilities(np.array(case.logits)))
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(expected[token], abs=1e-4)
    count = case.params.logprobs or 0
    assert [value for _, value in entry.top] == pytest.approx(np.sort(expected)[::-1][:count].tolist(), abs=1e-4)
    assert all(expected[i] == pytest.approx(value, abs=1e-4) for i, value in entry.top)
    assert len({i for i, _ in entry.top}) == count


@given(cases(min_tokens=4, stop_token_ids=(1, 5)).filter(lambda case: len(case.output) < 4))
def test_stop_tokens_are_not_drawn_before_min_tokens(case: Case) -> None:
    token, _ = choose(case)
    assert token not in (1, 5)


@given(st.integers(-(2**70), 2**70), st.integers(0, 4000))
def test_a_resumed_sequence_draws_as_the_undisturbed_one(seed: int, tokens: int) -> None:
    # Prompt and output so far, as the prompt of a new request: the position goes on, and so do the draws.
    logits = tuple(np.random.default_rng(0).normal(size=VOCAB_SIZE).tolist())
    sampling = SamplingParams(seed=seed)
    whole = Case(sampling, (3,) * 4, (7,) * tokens, seed, logits)
    resumed = Case(sampling, (3,) * 4 + (7,) * tokens, (), seed, logits)
    assert choose(whole) == choose(resumed)


def test_draws_follow_the_distribution() -> None:
    probabilities_ = np.array([0.5, 0.3, 0.15, 0.05])
    logits = torch.tensor(np.log(probabilities_), dtype=torch.float32).repeat(20_000, 1)
    rows = [SamplerRow(SamplingParams(), np.array([1], dtype=np.uint32), seed, 4, CPU) for seed in range(20_000)]
    counts = np.bincount(sample(logits, rows).token_ids, minlength=4) / 20_000
    assert np.abs(counts - probabilities_).max() < 0.012  # more than three standard deviations


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31)), min_size=1, max_size=50, unique=True))
def test_uniforms_are_in_range_and_depend_on_each_pair_alone(pairs: list[tuple[int, int]]) -> None:
    together = uniforms([seed for seed, _ in pairs], [position for _, position in pairs])
    assert ((together >= 0) & (together < 1)).all()
    assert together.tolist() == [uniforms([seed], [position])[0] for seed, position in pairs]
    assert len(set(together.tolist())) == len(pairs)


def test_uniforms_of_neighbouring_seeds_and_positions_are_spread() -> None:
    values = uniforms([seed for seed in range(200) for _ in range(200)], list(range(200)) * 200)
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 2000).max() < 200
    grid = values.reshape(200, 200)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02


@settings(max_examples=10)
@given(st.integers(2000, 5000), st.floats(0.5, 0.9999), st.integers(0, 100))
def test_a_nucleus_wider_than_the_guess_is_found(vocab_size: int, top_p: float, seed: int) -> None:
    # Nearly flat, so that the likeliest thousand tokens do not hold top_p.
    logits = torch.from_numpy(np.random.default_rng(seed).normal(scale=0.1, size=vocab_size).astype(np.float32))
    prompt = np.array([0], dtype=np.uint32)
    rows = [SamplerRow(SamplingParams(top_p=top_p), prompt, i, vocab_size, CPU) for i in range(64)]
    drawn = set(sample(logits.repeat(64, 1), rows).token_ids)
    order = np.argsort(-logits.numpy(), kind="stable")
    mass = np.cumsum(probabilities(logits.numpy().astype(np.float64))[order])
    size = int((mass < top_p).sum()) + 1
    assert drawn <= set(order[: size + 2].tolist())
    assert len(drawn) > 40


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_finite_logits_are_named_and_do_not_disturb_others(bad: float) -> None:
    good = Case(SamplingParams(logprobs=2), (1,), (), 3, tuple(range(VOCAB_SIZE)))
    row = SamplerRow(SamplingParams(), np.array([1], dtype=np.uint32), 0, VOCAB_SIZE, CPU)
    logits = torch.tensor([[bad] * VOCAB_SIZE, good.logits], dtype=torch.float32)
    samples = sample(logits, [row, good.row()])
    assert samples.broken == [0]
    assert (samples.token_ids[1], samples.logprobs[1]) == choose(good)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-5])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    case = Case(SamplingParams(temperature=temperature), (1,), (), 3, tuple(np.sin(range(VOCAB_SIZE)).tolist()))
    token, _ = choose(case)
    assert token == int(np.argmax(case.logits))
