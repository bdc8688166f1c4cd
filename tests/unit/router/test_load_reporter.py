"""LoadReporter against a count made anew for each report."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, SamplingParams, TokenDelta, pack_tokens
from serve.core.routing.load import LoadReport
from serve.core.routing.request import route_id
from serve.engines.protocol import EngineStats
from serve.router.load_reporter import LoadReporter

SIZE = 4


@dataclass
class Life:
    """A sequence: how it is asked for, and what comes of it."""

    name: str
    prompt_tokens: int
    max_tokens: int
    expected_tokens: int
    cached_tokens: int
    outputs: list[int]
    fails: bool
    request: GenerateRequest = field(init=False)

    def __post_init__(self) -> None:
        self.request = request_of(self.name, self.prompt_tokens, self.max_tokens, self.expected_tokens)

    def deltas(self) -> list[TokenDelta]:
        deltas = []
        for number, tokens in enumerate(self.outputs):
            prefill = PrefillInfo(cached_tokens=min(self.cached_tokens, self.prompt_tokens - 1)) if not number else None
            last = number == len(self.outputs) - 1 and not self.fails
            deltas.append(TokenDelta((7,) * tokens, FinishReason.LENGTH if last else None, prefill=prefill))
        return deltas


def request_of(name: str, prompt_tokens: int, max_tokens: int = 8, expected_tokens: int = 0) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    prompt = pack_tokens([1] * prompt_tokens)
    return GenerateRequest(name, "m", prompt, sampling, expected_cached_tokens=expected_tokens)


lives = st.builds(
    Life,
    st.sampled_from("abc"),  # ids come again, after one another and at once
    st.integers(1, 20),
    st.integers(0, 9),
    st.integers(0, 25),
    st.integers(0, 25),
    st.lists(st.integers(0, 3), max_size=4),
    st.booleans(),
)
LARGE = EngineStats(queued_prefill_tokens=10**9)


@given(data=st.data(), sequences=st.lists(lives, max_size=6))
def test_every_report_is_what_a_fresh_count_says(data: st.DataObject, sequences: list[Life]) -> None:
    reporter = LoadReporter(SIZE)
    waiting, running = list(range(len(sequences))), dict[int, list[TokenDelta]]()
    seen: dict[int, list[TokenDelta]] = {}
    accepted: list[Life] = []
    while waiting or running:
        choice = data.draw(st.integers(0, 2))
        if choice == 0 and waiting:
            number = waiting.pop(0)
            reporter.accepted(sequences[number].request)
            accepted.append(sequences[number])
            running[number], seen[number] = sequences[number].deltas(), []
        elif running:
            number = data.draw(st.sampled_from(sorted(running)))
            life, left = sequences[number], running[number]
            if left:
                seen[number].append(left.pop(0))
                assert reporter.delta(life.request, seen[number][-1]) == (len(seen[number]) == 1)
            else:
                del running[number]
                reporter.ended(life.request)
                reporter.ended(life.request)
        if choice == 2:
            report = reporter.report(LARGE)
            assert report.accepted == tuple(route_id(life.name) for life in accepted)
            accepted.clear()
            check(report, [(sequences[number], seen[number]) for number in running])
            check_prefills(report, [(sequences[number], deltas) for number, deltas in seen.items()])


def check(report: LoadReport, running: list[tuple[Life, list[TokenDelta]]]) -> None:
    assert report.queued_prefill_tokens == sum(
        max(0, life.prompt_tokens - life.expected_tokens) for life, deltas in running if not deltas
    )
    assert report.committed_blocks == sum(blocks_of(life) for life, _ in running)
    assert report.context_tokens == sum(
        life.prompt_tokens + sum(len(delta.token_ids) for delta in deltas) for life, deltas in running if deltas
    )


def check_prefills(report: LoadReport, sequences: list[tuple[Life, list[TokenDelta]]]) -> None:
    pairs = tokens = 0
    for life, deltas in sequences:
        if deltas and deltas[0].prefill is not None:
            computed = life.prompt_tokens - deltas[0].prefill.cached_tokens
            tokens += computed
            pairs += sum(range(deltas[0].prefill.cached_tokens + 1, life.prompt_tokens + 1))
    assert (report.prefilled_tokens, report.prefilled_pairs) == (tokens, pairs)


def blocks_of(life: Life) -> int:
    return -(-(life.prompt_tokens + life.max_tokens) // SIZE)


def test_what_the_engine_knows_is_taken_from_it() -> None:
    stats = EngineStats(running=1, waiting=2, used_blocks=3, total_blocks=5, generated_tokens=6, steps=7, busy_s=8.0)
    report = LoadReporter(SIZE).report(stats)
    assert report == LoadReport(
        running=1, waiting=2, used_blocks=3, total_blocks=5, generated_tokens=6, steps=7, busy_s=8.0
    )


def test_the_queue_is_what_both_sides_think_that_is_left_of_it() -> None:
    reporter, request = LoadReporter(SIZE), request_of("a", 100, expected_tokens=60)
    reporter.accepted(request)
    assert reporter.report(EngineStats(queued_prefill_tokens=100)).queued_prefill_tokens == 40
    assert reporter.report(EngineStats(queued_prefill_tokens=25)).queued_prefill_tokens == 25


def test_an_engine_that_counts_what_it_computes_is_believed() -> None:
    reporter, request = LoadReporter(SIZE), request_of("a", 100)
    reporter.accepted(request)
    chunk = EngineStats(computed_prompt_tokens=64, computed_prompt_pairs=2080.0)
    assert reporter.report(chunk).prefilled_tokens == 64
    assert reporter.report(chunk).prefilled_pairs == 2080.0
    reporter.delta(request, TokenDelta((1,), prefill=PrefillInfo()))
    done = EngineStats(computed_prompt_tokens=100, computed_prompt_pairs=5050.0)
    assert reporter.report(done).prefilled_tokens == 100


def test_pairs_that_an_engine_does_not_count_are_those_of_the_usual_prompt() -> None:
    reporter, request = LoadReporter(SIZE), request_of("a", 100)
    reporter.accepted(request)
    reporter.delta(request, TokenDelta((1,), prefill=PrefillInfo(cached_tokens=80)))
    report = reporter.report(EngineStats(computed_prompt_tokens=40))
    assert report.prefilled_pairs == 2 * (20 * 80 + 20 * 21 / 2)


def test_totals_never_fall() -> None:
    reporter = LoadReporter(SIZE)
    before = reporter.report(
        EngineStats(generated_tokens=5, steps=5, busy_s=5.0, computed_prompt_tokens=5, computed_prompt_pairs=5.0)
    )
    after = reporter.report(EngineStats())  # it died
    assert (after.generated_tokens, after.steps, after.busy_s) == (5, 5, 5.0)
    assert (after.prefilled_tokens, after.prefilled_pairs) == (before.prefilled_tokens, before.prefilled_pairs)


def test_the_totals_of_a_new_engine_begin_at_zero() -> None:
    reporter, request = LoadReporter(SIZE), request_of("a", 8)
    reporter.accepted(request)
    reporter.delta(request, TokenDelta((1,), prefill=PrefillInfo()))
    reporter.report(EngineStats(generated_tokens=5, steps=5, busy_s=5.0))
    reporter.forget_totals()
    report = reporter.report(EngineStats(generated_tokens=1, steps=1, busy_s=1.0))
    assert (report.generated_tokens, report.steps, report.busy_s) == (1, 1, 1.0)
    assert (report.prefilled_tokens, report.prefilled_pairs) == (0, 0.0)
    assert report.context_tokens == 9


def test_a_refused_twin_does_not_end_the_first() -> None:
    reporter, first, twin = LoadReporter(SIZE), request_of("a", 8), request_of("a", 8)
    reporter.accepted(first)
    reporter.accepted(twin)
    reporter.ended(twin)
    assert reporter.report(LARGE).committed_blocks == 4
    reporter.ended(first)
    assert reporter.report(LARGE).committed_blocks == 0
