"""From texts through an engine to figures, on an engine whose every figure is known."""

from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.evaluate.comparison import NEXT_TOKEN, Comparison, compare, greedy_agreement
from builders.evaluate.golden import choose_golden
from builders.evaluate.outputs import ModelOutputs, TextOutput, TokenScores, load_outputs, save_outputs
from builders.evaluate.questions import Choice, Question
from builders.evaluate.recording import Recording, probed_positions, record, scoring_concurrency
from builders.texts.encoder import PromptEncoder
from builders.texts.reader import TextSample
from serve.core.request import GenerateRequest, TokenDelta
from serve.errors import ConfigError, EngineDead, RequestError
from tests.unit.builders.evaluate.bigram_engine import BigramEngine

QUICKSTART = Path(__file__).resolve().parents[4] / "serve" / "models" / "quickstart"
VOCABULARY = 64
Logits = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(QUICKSTART)


def logits(seed: int, sharpness: float = 3.0) -> Logits:
    """Make a model of twenty tokens; the others never follow anything."""
    rng = np.random.default_rng(seed)
    rows: Logits = np.full((VOCABULARY, VOCABULARY), -60.0)
    rows[:, 10:30] = sharpness * rng.standard_normal((VOCABULARY, 20))
    return rows


def texts(seed: int, count: int = 12, length: int = 24) -> list[TextSample]:
    rng = np.random.default_rng(seed)
    return [TextSample("", tuple(rng.integers(10, 30, length).tolist()), length // 2) for _ in range(count)]


def questions() -> list[Question]:
    choices = tuple(Choice((10, 11, token), 2, 1) for token in (12, 13, 14))
    return [
        Question("choices", "multiple_choice", (10, 11), 4, choices=choices, right=1),
        Question("regex", "regex", (10, 11), 4, pattern="."),
    ]


async def outputs_of(engine: BigramEngine, encoder: PromptEncoder, samples: list[TextSample]) -> ModelOutputs:
    return await record(engine, "bigram", Recording(samples, questions(), 8, encoder))


async def compared(encoder: PromptEncoder, first: BigramEngine, second: BigramEngine) -> Comparison:
    samples = texts(1)
    return compare(await outputs_of(first, encoder, samples), await outputs_of(second, encoder, samples))


async def test_a_model_beside_itself_shows_no_difference(encoder: PromptEncoder) -> None:
    found = await compared(encoder, BigramEngine(logits(0)), BigramEngine(logits(0)))
    assert found.greedy_agreement is not None
    assert found.perplexity_ratio is not None
    assert found.kl_divergence is not None
    assert (found.greedy_agreement.value, found.perplexity_ratio.value, found.kl_divergence.value) == (1.0, 1.0, 0.0)
    assert [task.name for task in found.tasks] == [NEXT_TOKEN, "choices", "regex"]
    assert all(task.drop.value == 0.0 for task in found.tasks)
    assert (found.texts, found.tokens, found.notes) == (12, 12 * 23, ())


async def test_figures_are_those_of_the_two_models(encoder: PromptEncoder) -> None:
    one, other = logits(0), logits(1)
    found = await compared(encoder, BigramEngine(one), BigramEngine(other))
    log_p, log_q = (rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)) for rows in (one, other))
    pairs = [(a, b) for text in texts(1) for a, b in zip(text.tokens, text.tokens[1:], strict=False)]
    last, following = np.array(pairs).T
    assert found.reference_perplexity == pytest.approx(np.exp(-log_p[last, following].mean()), rel=1e-5)
    assert found.candidate_perplexity == pytest.approx(np.exp(-log_q[last, following].mean()), rel=1e-5)
    assert found.kl_divergence is not None
    true = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)[last].mean()
    assert found.kl_divergence.value == pytest.approx(true, rel=1e-5)  # the engine names all twenty tokens
    accuracy = next(task for task in found.tasks if task.name == NEXT_TOKEN)
    assert accuracy.reference.value == pytest.approx((one[last].argmax(axis=1) == following).mean())
    assert accuracy.candidate.value == pytest.approx((other[last].argmax(axis=1) == following).mean())


async def test_an_engine_that_scores_no_prompts_is_probed(encoder: PromptEncoder) -> None:
    whole = await compared(encoder, BigramEngine(logits(0)), BigramEngine(logits(1)))
    found = await compared(encoder, BigramEngine(logits(0)), BigramEngine(logits(1), scores_prompts=False))
    assert found.kl_divergence is found.perplexity_ratio is None
    assert found.tokens == 12 * 16
    assert [task.name for task in found.tasks] == [NEXT_TOKEN, "regex"]
    assert found.unmeasured_tasks == ("choices",)
    assert "no KL divergence, no perplexity" in found.notes[0]
    assert found.notes[1] == "task choices: multiple_choice needs an engine that scores prompts"
    assert found.greedy_agreement == whole.greedy_agreement


async def test_a_model_that_computes_no_numbers_is_infinitely_bad(encoder: PromptEncoder) -> None:
    broken = logits(0)
    broken[:, :] = np.nan
    found = await compared(encoder, BigramEngine(logits(0)), BigramEngine(broken))
    assert found.kl_divergence is not None
    assert found.perplexity_ratio is not None
    assert found.kl_divergence.value > 10
    assert found.perplexity_ratio.value > 1e10
    assert next(task for task in found.tasks if task.name == NEXT_TOKEN).candidate.value == 0.0


async def test_a_model_whose_engine_refuses_to_go_on_without_numbers_is_as_bad(encoder: PromptEncoder) -> None:
    class Overflowing(BigramEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
            if request.prompt_tokens:
                raise RequestError("the model computed no finite logits", code="model_overflow")
            yield TokenDelta()

    found = await compared(encoder, BigramEngine(logits(0)), Overflowing(logits(0)))
    assert found.greedy_agreement is not None
    assert found.perplexity_ratio is not None
    assert found.greedy_agreement.value == 0.0
    assert found.perplexity_ratio.value > 1e10
    assert [task.candidate.value for task in found.tasks if task.metric in ("next_token", "regex")] == [0.0, 0.0]


async def test_full_engines_are_asked_again_and_never_too_much_at_once(encoder: PromptEncoder) -> None:
    engine = BigramEngine(logits(0), full_first=7)
    recording = Recording(texts(1), questions(), 8, encoder, concurrency=3)
    told: list[tuple[float, float]] = []
    found = await record(engine, "bigram", recording, lambda done, total, _="": told.append((done, total)))
    assert [text.continuation for text in found.texts] == [
        text.continuation for text in (await outputs_of(BigramEngine(logits(0)), encoder, texts(1))).texts
    ]
    assert engine.most_at_once <= 3
    assert told[-1] == (28, 28)  # twelve continuations and scores, three choices and an answer


async def test_the_death_of_an_engine_is_told_as_it_is(encoder: PromptEncoder) -> None:
    with pytest.raises(EngineDead, match="it died"):
        await outputs_of(BigramEngine(logits(0), dies_after=9), encoder, texts(1))


async def test_texts_that_do_not_fit_are_a_mistake_with_a_remedy(encoder: PromptEncoder) -> None:
    with pytest.raises(ConfigError, match=r"Lower verify\.texts\.max_tokens"):
        await outputs_of(BigramEngine(logits(0), context_tokens=16), encoder, texts(1))


async def test_outputs_survive_their_files_and_make_the_same_bytes(encoder: PromptEncoder, tmp_path: Path) -> None:
    for scores_prompts in (True, False):
        outputs = await outputs_of(BigramEngine(logits(0), scores_prompts=scores_prompts), encoder, texts(1))
        written = []
        for name in ("a", "b"):
            directory = tmp_path / f"{name}{scores_prompts}"
            directory.mkdir()
            save_outputs(outputs, directory)
            written.append({path.name: path.read_bytes() for path in directory.iterdir()})
        assert written[0] == written[1]
        again = load_outputs(directory)
        assert (again.model, again.questions, again.answers, again.notes) == (
            *(outputs.model, outputs.questions, outputs.answers, outputs.notes),
        )
        figures = [compare(a, b) for a, b in ((outputs, outputs), (again, again), (again, outputs))]
        assert figures[0] == figures[1] == figures[2]


async def test_golden_samples_are_answers_that_come_again(encoder: PromptEncoder) -> None:
    outputs = await outputs_of(BigramEngine(logits(0)), encoder, texts(1))
    golden = await choose_golden(BigramEngine(logits(0)), outputs.texts, (2,), 3)
    assert len(golden) == 3
    continuations = {text.tokens[: text.prompt_tokens]: text.continuation for text in outputs.texts}
    assert all(continuations[sample.prompt] == sample.tokens for sample in golden)
    assert not await choose_golden(BigramEngine(logits(5)), outputs.texts, (2,), 3)


@given(st.integers(2, 10**5), st.integers(1, 10**6), st.integers(1, 64))
def test_prompts_scored_at_once_have_room_for_their_logits(tokens: int, vocabulary: int, most: int) -> None:
    found = scoring_concurrency(tokens, vocabulary, most)
    assert 1 <= found <= most
    assert found == 1 or 4 * found * tokens * vocabulary <= 2**30


@given(st.integers(2, 2000))
def test_probed_positions_are_inside_and_spread(tokens: int) -> None:
    positions = probed_positions(tokens)
    assert positions == sorted(set(positions))
    assert len(positions) == min(16, tokens - 1)
    assert positions[0] == 1
    assert positions[-1] <= tokens - 1
    assert tokens < 20 or positions[-1] == tokens - 1


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=20))
def test_agreement_counts_no_token_behind_the_first_that_differs(shapes: list[tuple[int, int]]) -> None:
    pairs = []
    for same, different in shapes:
        a = (7,) * same + (8,) * different
        b = (7,) * same + (9,) * different
        pairs.append((continued(a), continued(b)))
    found = greedy_agreement(pairs)
    compared_tokens = sum(same + (different > 0) for same, different in shapes)
    if sum(1 for same, different in shapes if same or different) < 2:
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(sum(same for same, _ in shapes) / compared_tokens)
    assert 0 <= found.low <= found.value <= found.high <= 1


def continued(tokens: tuple[int, ...]) -> TextOutput:
    empty = np.empty((0, 0))
    scores = TokenScores(
        np.empty(0, np.int32), np.empty(0, np.float32), empty.astype(np.int32), empty.astype(np.float32)
    )
    return TextOutput((1, 2), 1, tokens, scores)
