"""record: texts and questions through an engine -> ModelOutputs.

Of each text: the greedy continuation of its beginning, and how likely each of its tokens is (`prompt_logprobs`). An
engine that keeps no logits of prompts is asked instead, at some positions of each text, for the one token that it would
go on with: that is enough for the next-token accuracy, and for nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from builders.context import StepProgress, no_step_progress
from builders.evaluate.outputs import BROKEN, UNKNOWN, WORST_LOGPROB, ModelOutputs, TextOutput, TokenScores
from builders.evaluate.questions import Answer, Choice, Question
from builders.evaluate.requests import Asked, Told, ask, ask_all
from builders.texts.encoder import PromptEncoder
from builders.texts.reader import TextSample
from serve.core.request import SamplingParams, TokenLogprob
from serve.engines.protocol import Engine
from serve.errors import ConfigError, RequestError

CONCURRENCY = 16
_TOP = 20  # likeliest tokens at each position: what the KL divergence is estimated from
_LOGITS_BYTES = 1 << 30  # of all prompts that are scored at once
_PROBES = 16  # positions of a text, where its tokens cannot be scored


@dataclass(frozen=True)
class Recording:
    """What is recorded, and how.

    Attributes:
        texts: Samples; they fit the engine's context with `output_tokens`.
        questions: Of all tasks.
        output_tokens: Of each continuation.
        encoder: Of the model: its stop tokens, and the text of its answers.
        concurrency: Requests in flight.
    """

    texts: Sequence[TextSample]
    questions: Sequence[Question]
    output_tokens: int
    encoder: PromptEncoder
    concurrency: int = CONCURRENCY


async def record(
    engine: Engine, model: str, recording: Recording, progress: StepProgress = no_step_progress
) -> ModelOutputs:
    """Run all of it.

    Args:
        engine: Started.
        model: What it is, for people.
        recording: What to ask.
        progress: Told of each request.

    Raises:
        ConfigError: A text or question does not fit the engine.
        EngineDead: The engine is gone.
    """
    recorder = _Recorder(engine, recording, progress)
    continuations = await recorder.continuations()
    scores = await recorder.scores()
    answers = await recorder.answers()
    outputs = zip(recording.texts, continuations, scores, strict=True)
    return ModelOutputs(
        model=model,
        texts=tuple(TextOutput(text.tokens, text.prompt_tokens, told, score) for text, told, score in outputs),
        questions=tuple(recording.questions),
        answers=answers,
        notes=tuple(recorder.notes),
    )


class _Recorder:
    def __init__(self, engine: Engine, recording: Recording, progress: StepProgress) -> None:
        self._engine, self._recording = engine, recording
        self._progress, self._done = progress, 0
        self._total = 2 * len(recording.texts) + sum(max(1, len(q.choices)) for q in recording.questions)
        self._stops = recording.encoder.stop_token_ids
        self._scores_prompts = True
        self.notes: list[str] = []

    async def continuations(self) -> list[tuple[int, ...]]:
        sampling = self._greedy(self._recording.output_tokens)
        told = await self._ask([Asked(text.prompt, sampling) for text in self._recording.texts], "continuations")
        return [_with_stop(answer) for answer in told]

    async def scores(self) -> list[TokenScores]:
        texts = self._recording.texts
        top = min(_TOP, self._engine.info.max_logprobs)
        sampling = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=top)
        refusal = await self._why_not_scored(Asked(texts[0].tokens, sampling))
        if refusal is None:
            told = await self._ask([Asked(text.tokens, sampling) for text in texts], "scores", scoring=True)
            return [_scores(text.tokens, answer) for text, answer in zip(texts, told, strict=True)]
        self._scores_prompts = False
        self.notes.append(
            f"no KL divergence, no perplexity, and the next-token accuracy at {_PROBES} positions of each text only, "
            f"as the engine cannot score prompts: {refusal}"
        )
        return await self._probe()

    async def answers(self) -> tuple[Answer | None, ...]:
        questions = self._recording.questions
        asked, counts = [], []
        for question in questions:
            requests = self._requests_of(question)
            asked += requests
            counts.append(len(requests))
        scoring = any(question.choices for question in questions)
        told = iter(await self._ask(asked, "questions", scoring=scoring))
        answers = tuple(
            self._answer(question, [next(told) for _ in range(count)])
            for question, count in zip(questions, counts, strict=True)
        )
        unmeasured = dict.fromkeys(q.task for q, answer in zip(questions, answers, strict=True) if answer is None)
        self.notes += [f"task {task}: multiple_choice needs an engine that scores prompts" for task in unmeasured]
        return answers

    def _requests_of(self, question: Question) -> list[Asked]:
        if question.metric != "multiple_choice":
            return [Asked(question.prompt, self._greedy(question.max_tokens))]
        if not self._scores_prompts:
            return []
        sampling = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)
        return [Asked(choice.tokens, sampling) for choice in question.choices]

    def _answer(self, question: Question, told: Sequence[Told]) -> Answer | None:
        if question.metric != "multiple_choice":
            return Answer(text=self._recording.encoder.decode(told[0].tokens))
        if not told:
            return None
        return Answer(
            scores=tuple(choice_score(choice, answer) for choice, answer in zip(question.choices, told, strict=True))
        )

    async def _why_not_scored(self, asked: Asked) -> str | None:
        """Ask for the first score, to find out whether the engine can tell any."""
        told = await ask(self._engine, asked)
        if told.error is None or told.overflowed:
            return None
        if told.error.param != "prompt_logprobs":
            raise _does_not_fit(told.error)
        return str(told.error)

    async def _probe(self) -> list[TokenScores]:
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        places = [probed_positions(len(text.tokens)) for text in self._recording.texts]
        self._total += sum(map(len, places)) - len(places)
        asked = [
            Asked(text.tokens[:position], sampling)
            for text, positions in zip(self._recording.texts, places, strict=True)
            for position in positions
        ]
        told = iter(await self._ask(asked, "next tokens"))
        return [
            _probed(len(text.tokens), {position: (*next(told).tokens, BROKEN)[0] for position in positions})
            for text, positions in zip(self._recording.texts, places, strict=True)
        ]

    def _greedy(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=self._stops)

    async def _ask(self, asked: Sequence[Asked], what: str, *, scoring: bool = False) -> list[Told]:
        concurrency = self._recording.concurrency
        if scoring:
            longest = max((len(request.prompt) for request in asked), default=1)
            concurrency = scoring_concurrency(longest, self._engine.info.vocab_size, concurrency)
        results = await ask_all(self._engine, asked, concurrency, self._tell(what))
        for result in results:
            if result.error is not None and not result.overflowed:
                raise _does_not_fit(result.error)
        return results

    def _tell(self, what: str) -> Callable[[int], None]:
        def tell(count: int) -> None:
            self._done += count
            self._progress(self._done, self._total, what)

        return tell


def scoring_concurrency(tokens: int, vocab_size: int, most: int) -> int:
    """Return how many prompts are scored at once: engines hold a logit of each token and word, on the GPU and here."""
    return max(1, min(most, _LOGITS_BYTES // (4 * tokens * vocab_size)))


def choice_score(choice: Choice, told: Told) -> float:
    """Return the mean log probability of a byte of a choice."""
    entries = _entries(choice.tokens, told)[choice.begins_at - 1 :]
    return sum(_finite(entry.logprob) for entry in entries) / choice.size_bytes


def probed_positions(tokens: int) -> list[int]:
    """Return at which positions of a text the next token is asked for: evenly spread, none twice, not the first."""
    count = min(_PROBES, tokens - 1)
    return sorted({1 + i * (tokens - 2) // max(1, count - 1) for i in range(count)})


def _with_stop(told: Told) -> tuple[int, ...]:
    if told.overflowed:
        return (BROKEN,)
    return told.tokens if told.stop_token_id is None else (*told.tokens, told.stop_token_id)


def _entries(tokens: Sequence[int], told: Told) -> list[TokenLogprob]:
    """Return what was told of each token but the first; of a model that computes no numbers, that."""
    if told.overflowed:
        return [TokenLogprob(token, math.nan) for token in tokens[1:]]
    assert told.prompt_logprobs is not None, "they were asked for"
    return [entry for entry in told.prompt_logprobs if entry is not None]


def _scores(tokens: Sequence[int], answer: Told) -> TokenScores:
    told = _entries(tokens, answer)
    top = [
        [(token, _finite(value)) for token, value in entry.top] if math.isfinite(entry.logprob) else []
        for entry in told
    ]
    width = max((len(row) for row in top), default=1) or 1
    for row in top:  # where the model computed no number, it expects tokens that nobody else names
        row += [(BROKEN - i, WORST_LOGPROB) for i in range(width - len(row))]
    return TokenScores(
        best=np.array([row[0][0] if row and row[0][0] >= 0 else BROKEN for row in top], dtype=np.int32),
        own=np.array([_finite(entry.logprob) for entry in told], dtype=np.float32),
        ids=np.array([[token for token, _ in row] for row in top], dtype=np.int32).reshape(len(told), width),
        logprobs=np.array([[value for _, value in row] for row in top], dtype=np.float32).reshape(len(told), width),
    )


def _probed(tokens: int, found: dict[int, int]) -> TokenScores:
    best = np.full(tokens - 1, UNKNOWN, dtype=np.int32)
    for position, token in found.items():
        best[position - 1] = token
    nothing = np.empty((tokens - 1, 0))
    return TokenScores(best, np.empty(0, dtype=np.float32), nothing.astype(np.int32), nothing.astype(np.float32))


def _finite(value: float) -> float:
    return max(WORST_LOGPROB, value) if math.isfinite(value) else WORST_LOGPROB


def _does_not_fit(error: RequestError) -> ConfigError:
    return ConfigError(
        f"verify: the engine refuses a request of the evaluation: {error} Lower verify.texts.max_tokens or "
        "verify.output_tokens, shorten the questions, or raise the engine's context_tokens"
    )
