"""Token watchdog: long prompts are given their time, silence is not."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from serve.core.watchdog import Progress, TokenLimits, TokenWatch

LIMITS = TokenLimits(
    floor_s=10.0,
    first_floor_s=60.0,
    slack=3.0,
    prefill_tokens_per_s=1000.0,
    max_s=300.0,
    batch_tokens=8192,
    look_s=0.25,
)
TOKENS = st.integers(0, 200_000)
RATES = st.floats(10.0, 1e6)


def warm(limits: TokenLimits = LIMITS) -> TokenWatch:
    """A watchdog that has seen a token."""
    return TokenWatch(limits, deltas=1)


def verdicts(watch: TokenWatch, until_s: float, pending_tokens: int = 0, step_s: float = 0.0) -> list[Progress]:
    """Look every quarter of a second while one stream waits and nothing comes."""
    seen = []
    for tick in range(round(until_s / 0.25)):
        watch, verdict = watch.look(
            tick * 0.25,
            deltas=watch.deltas,
            waiting=1,
            pending_tokens=pending_tokens,
            longest_tokens=pending_tokens,
            step_s=step_s,
        )
        seen.append(verdict)
    return seen


@given(tokens=TOKENS, more=TOKENS, rate=RATES, step_s=st.floats(0, 10))
def test_a_longer_prompt_never_shortens_the_deadline(tokens: int, more: int, rate: float, step_s: float) -> None:
    watch = warm().prefilled(10_000, 10_000 / rate)
    shorter, longer = (watch.deadline_s(count, count, step_s) for count in (tokens, tokens + more))
    assert LIMITS.floor_s <= shorter <= longer <= LIMITS.max_s


@given(tokens=TOKENS, rate=RATES)
def test_an_engine_as_fast_as_before_is_never_stalled(tokens: int, rate: float) -> None:
    watch = warm()
    for _ in range(5):
        watch = watch.prefilled(4096, 4096 / rate)
    assert watch.deadline_s(tokens, tokens, 0.0) >= min(tokens / rate * 2.99, LIMITS.max_s)


@given(samples=st.lists(st.tuples(TOKENS, st.floats(0, 100)), max_size=20), tokens=TOKENS)
def test_a_deadline_is_finite_whatever_was_measured(samples: list[tuple[int, float]], tokens: int) -> None:
    watch = warm()
    for computed, seconds in samples:
        watch = watch.prefilled(computed, seconds)
    assert LIMITS.floor_s <= watch.deadline_s(tokens, tokens, 1.0) <= LIMITS.max_s


@given(ticks=st.lists(st.booleans(), min_size=50, max_size=200))
def test_progress_in_time_is_never_a_stall(ticks: list[bool]) -> None:
    watch, deltas, silent = warm(), 1, 0
    for tick, token in enumerate(ticks):
        silent = 0 if token or silent >= 38 else silent + 1
        deltas += silent == 0
        watch, verdict = watch.look(
            tick * 0.25, deltas=deltas, waiting=2, pending_tokens=0, longest_tokens=0, step_s=0.02
        )
        assert verdict is not Progress.STALLED


def test_silence_is_slow_and_then_a_stall() -> None:
    seen = verdicts(warm(), 12.0)
    assert seen.index(Progress.SLOW) * 0.25 == 5.25
    assert seen.index(Progress.STALLED) * 0.25 == 10.25


def test_a_long_prompt_moves_the_deadline() -> None:
    watch = warm().prefilled(8192, 1.0)
    assert Progress.STALLED not in verdicts(watch, 40.0, pending_tokens=128_000)
    assert Progress.STALLED in verdicts(watch, 50.0, pending_tokens=128_000)


def test_the_first_token_may_take_longer() -> None:
    seen = verdicts(TokenWatch(LIMITS), 61.0)
    assert seen.index(Progress.STALLED) * 0.25 == 60.25


def test_an_idle_engine_and_a_slow_reader_are_no_stall() -> None:
    watch = warm()
    for tick in range(1000):
        watch, verdict = watch.look(tick * 0.25, deltas=1, waiting=0, pending_tokens=0, longest_tokens=0, step_s=0.0)
        assert verdict is Progress.IDLE
    _, verdict = watch.look(250.0, deltas=1, waiting=1, pending_tokens=0, longest_tokens=0, step_s=0.0)
    assert verdict is Progress.GOING


@given(deaf_s=st.floats(0.0, 1e4))
def test_a_look_that_comes_late_is_not_the_engine_s_silence(deaf_s: float) -> None:
    watch, _ = warm().look(0.0, deltas=1, waiting=1, pending_tokens=0, longest_tokens=0, step_s=0.0)
    _, verdict = watch.look(deaf_s, deltas=1, waiting=1, pending_tokens=0, longest_tokens=0, step_s=0.0)
    assert verdict is Progress.GOING


def test_recent_prompts_count_more() -> None:
    watch = warm(replace(LIMITS, floor_s=0.1))
    for _ in range(3):
        watch = watch.prefilled(1000, 0.01)
    fast = watch.prefill_tokens_per_s
    for _ in range(10):
        watch = watch.prefilled(1000, 10.0)
    assert watch.prefill_tokens_per_s < fast / 100


@given(prompts=st.lists(TOKENS, min_size=1), more=TOKENS, rate=RATES)
def test_the_queue_moves_the_deadline_by_no_more_than_a_batch(prompts: list[int], more: int, rate: float) -> None:
    watch = warm().prefilled(10_000, 10_000 / rate)
    longest = max(prompts)
    deadline_s = watch.deadline_s(sum(prompts), longest, 0.0)
    assert deadline_s <= watch.deadline_s(sum(prompts) + more, longest + more, 0.0) <= LIMITS.max_s
    assert deadline_s <= watch.deadline_s(longest + 8192, longest + 8192, 0.0)


def test_prompts_that_end_together_are_one_measurement() -> None:
    watch = warm().prefilled(1000, 64.0)
    for _ in range(63):
        watch = watch.prefilled(1000, 1e-5)
    assert 999 < watch.prefill_tokens_per_s < 1001
