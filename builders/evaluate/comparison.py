"""PURE: a candidate's outputs beside the reference's -> how far they are apart, each figure with its interval.

| figure | definition |
|---|---|
| greedy agreement | same tokens / compared tokens of the continuations, up to and with the first that differs: behind it the two sides continue different texts. It estimates how often one token is the same after the same tokens |
| same outputs | continuations that are the same to their end |
| next-token accuracy | positions of the texts at which the likeliest token is the one that stands there |
| KL divergence | mean over the positions of the texts of `distributions.kl_lower_bound`, nats a token |
| perplexity | exp(- mean log probability of the texts' tokens); the first token of a text, which nothing predicts, not counted |
| task accuracy | right answers / questions |
"""  # noqa: E501  # a table

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from builders.evaluate.distributions import kl_lower_bound
from builders.evaluate.intervals import paired_difference, ratio_of_sums, share, wider
from builders.evaluate.outputs import UNKNOWN, ModelOutputs, TextOutput
from builders.evaluate.questions import is_right
from builders.texts.encoder import common_prefix
from serve.artifacts.certificates import Estimate, TaskAccuracy

NEXT_TOKEN = "next token"
_MAX_EXPONENT = 700.0  # exp of more is no number
Pairs = Sequence[tuple[TextOutput, TextOutput]]


@dataclass(frozen=True)
class Comparison:
    """Figures; None: it could not be measured, and `notes` says why."""

    texts: int
    tokens: int
    greedy_agreement: Estimate | None
    same_outputs: Estimate | None
    kl_divergence: Estimate | None
    reference_perplexity: float | None
    candidate_perplexity: float | None
    perplexity_ratio: Estimate | None
    tasks: tuple[TaskAccuracy, ...]
    unmeasured_tasks: tuple[str, ...]
    notes: tuple[str, ...]


def compare(reference: ModelOutputs, candidate: ModelOutputs) -> Comparison:
    """Compare two models' outputs on the same texts and questions."""
    pairs = list(zip(reference.texts, candidate.texts, strict=True))
    if any(a.tokens != b.tokens for a, b in pairs) or reference.questions != candidate.questions:
        raise ValueError("the two sides were not given the same texts and questions")
    notes = [*(f"reference: {note}" for note in reference.notes), *candidate.notes]
    if len(pairs) < 2:
        notes.append("one text tells nothing about chance: give two or more")
    scored = [(a, b) for a, b in pairs if a.scores.has_probabilities and b.scores.has_probabilities]
    perplexities = _perplexities(scored) if len(scored) > 1 else (None, None, None)
    next_token = next_token_accuracy(pairs)
    tasks, unmeasured = _tasks(reference, candidate)
    return Comparison(
        texts=len(pairs),
        tokens=sum(int(_measured(a, b).sum()) for a, b in pairs),
        greedy_agreement=greedy_agreement(pairs),
        same_outputs=_same_outputs(pairs),
        kl_divergence=_kl_divergence(scored) if len(scored) > 1 else None,
        reference_perplexity=perplexities[0],
        candidate_perplexity=perplexities[1],
        perplexity_ratio=perplexities[2],
        tasks=(*([next_token] if next_token is not None else []), *tasks),
        unmeasured_tasks=unmeasured,
        notes=tuple(notes),
    )


def greedy_agreement(pairs: Pairs) -> Estimate | None:
    """Estimate how often the next greedy token is the same, after the same tokens; None: nothing was compared."""
    same = [common_prefix(a.continuation, b.continuation) for a, b in pairs]
    compared = [n + (a.continuation != b.continuation) for n, (a, b) in zip(same, pairs, strict=True)]
    kept = [(n, of) for n, of in zip(same, compared, strict=True) if of]
    if len(kept) < 2:
        return None
    same, compared = [n for n, _ in kept], [of for _, of in kept]
    return wider(share(sum(same), sum(compared)), ratio_of_sums(same, compared), lowest=0.0)


def next_token_accuracy(pairs: Pairs) -> TaskAccuracy | None:
    """Compare how often each side expects the token that stands in the text; None: nothing was measured by both."""
    table = np.zeros((2, 2), dtype=np.int64)  # [reference right, candidate right]
    drops, positions = [], []
    for a, b in pairs:
        measured = _measured(a, b)
        targets = np.array(a.tokens[1:], dtype=np.int32)[measured]
        right_a, right_b = a.scores.best[measured] == targets, b.scores.best[measured] == targets
        np.add.at(table, (right_a.astype(np.int64), right_b.astype(np.int64)), 1)
        if len(targets):
            drops.append(int(right_a.sum()) - int(right_b.sum()))
            positions.append(len(targets))
    if len(positions) < 2:
        return None
    accuracy = _paired(
        "next_token", NEXT_TOKEN, *(int(n) for n in (table[1, 1], table[1, 0], table[0, 1], table[0, 0]))
    )
    return accuracy.model_copy(update={"drop": wider(accuracy.drop, ratio_of_sums(drops, positions))})


def _measured(a: TextOutput, b: TextOutput) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    measured: np.ndarray[tuple[int], np.dtype[np.bool_]] = (a.scores.best != UNKNOWN) & (b.scores.best != UNKNOWN)
    return measured


def _same_outputs(pairs: Pairs) -> Estimate | None:
    told = [a.continuation == b.continuation for a, b in pairs if a.continuation or b.continuation]
    return share(sum(told), len(told)) if told else None


def _kl_divergence(scored: Pairs) -> Estimate:
    sums = []
    for a, b in scored:
        sides = (a.scores.ids, a.scores.logprobs.astype(np.float64), b.scores.ids, b.scores.logprobs.astype(np.float64))
        sums.append(float(kl_lower_bound(*sides).sum()))
    estimate = ratio_of_sums(sums, [len(a.scores.own) for a, _ in scored])
    return estimate.model_copy(update={"low": max(0.0, estimate.low)})


def _perplexities(scored: Pairs) -> tuple[float, float, Estimate]:
    lengths = [len(a.scores.own) for a, _ in scored]
    first, second = (
        [-float(side.scores.own.sum(dtype=np.float64)) for side in sides] for sides in zip(*scored, strict=True)
    )
    ratio = ratio_of_sums([b - a for a, b in zip(first, second, strict=True)], lengths)
    exponents = {name: _exp(getattr(ratio, name)) for name in ("value", "low", "high")}
    return _exp(sum(first) / sum(lengths)), _exp(sum(second) / sum(lengths)), ratio.model_copy(update=exponents)


def _exp(value: float) -> float:
    return math.exp(min(value, _MAX_EXPONENT))


def _tasks(reference: ModelOutputs, candidate: ModelOutputs) -> tuple[list[TaskAccuracy], tuple[str, ...]]:
    tables: dict[str, list[int]] = {}
    metrics, unmeasured = {}, []
    for question, first, second in zip(reference.questions, reference.answers, candidate.answers, strict=True):
        metrics[question.task] = question.metric
        if first is None or second is None:
            unmeasured.append(question.task)
            continue
        table = tables.setdefault(question.task, [0, 0, 0, 0])
        right = (is_right(question, first), is_right(question, second))
        table[{(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[right]] += 1
    lost = set(unmeasured)
    told = [_paired(metrics[task], task, *table) for task, table in tables.items() if task not in lost]
    return told, tuple(dict.fromkeys(unmeasured))


def _paired(metric: str, name: str, both: int, first: int, second: int, neither: int) -> TaskAccuracy:
    n = both + first + second + neither
    return TaskAccuracy(
        name=name,
        metric=metric,  # type: ignore[arg-type]  # one of the literals
        reference=share(both + first, n),
        candidate=share(both + second, n),
        drop=paired_difference(both, first, second, neither),
    )
