"""Logits -> the next token and its log probabilities."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from trtllm_double.engine_request import EngineRequest


def check(request: EngineRequest) -> str | None:
    """Return what the C++ SamplingConfig refuses; the worker answers with an error (reference 3.1)."""
    rules: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "top_p": (request.top_p, lambda v: 0 < v <= 1),
        "top_k": (request.top_k, lambda v: v >= 0),
        "min_p": (request.min_p, lambda v: 0 <= v <= 1),
        "temperature": (request.temperature, lambda v: v >= 0),
        "repetition_penalty": (request.repetition_penalty, lambda v: v > 0),
        "seed": (request.seed, lambda v: 0 <= v < 1 << 64),
    }
    for name, (value, allows) in rules.items():
        if value is not None and not allows(value):
            return f"Encountered an error: {name} has the value {value}, which is out of range"
    return None


def is_greedy(request: EngineRequest) -> bool:
    """Reference 3.1: temperature, top_p and top_k all None, or temperature 0, or top_k 1."""
    asked = (request.temperature, request.top_p, request.top_k)
    return asked == (None, None, None) or request.temperature == 0 or request.top_k == 1


def next_token(logits: Any, request: EngineRequest, output: list[int]) -> int:
    """Choose the next token: penalties, bias, min_tokens; then temperature, top_k, top_p, min_p and the draw."""
    row = _edited(logits, request, output)
    if is_greedy(request):
        return int(row.argmax())
    row = row / np.float32(1.0 if request.temperature is None else request.temperature)
    order = np.argsort(-row, kind="stable")
    row = row[order].astype(np.float64)
    if request.top_k:
        row[request.top_k :] = -np.inf
    probabilities = np.exp(row - row[0])
    probabilities /= probabilities.sum()
    if request.top_p is not None and request.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        probabilities[before >= request.top_p] = 0
    if request.min_p:
        probabilities[probabilities < request.min_p * probabilities[0]] = 0
    # Without a seed the runtime's default is 0: two requests then draw the same (reference 3.1).
    rng = np.random.default_rng((request.seed or 0, len(output)))
    draw = rng.random() * probabilities.sum()
    return int(order[min(int(np.searchsorted(np.cumsum(probabilities), draw, "right")), len(order) - 1)])


def _edited(logits: Any, request: EngineRequest, output: list[int]) -> Any:
    row = logits.astype(np.float32, copy=True)
    if request.repetition_penalty not in (None, 1.0):
        seen = np.unique(np.asarray(request.prompt + output, dtype=np.int64))
        values = row[seen]
        penalty = np.float32(request.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if output and (request.presence_penalty or request.frequency_penalty):
        for token, count in Counter(output).items():
            row[token] -= np.float32((request.presence_penalty or 0) + (request.frequency_penalty or 0) * count)
    if request.embedding_bias is not None:
        row += request.embedding_bias
    for word in request.bad_words:
        if word[:-1] == (output[-len(word) + 1 :] if len(word) > 1 else []):
            row[word[-1]] = -np.inf
    # Only the end id is held back, not stop words (upstream's `_apply_min_length_penalty`).
    if request.min_tokens and len(output) < request.min_tokens and request.end_id is not None and request.end_id >= 0:
        row[request.end_id] = -np.inf
    return row


def log_softmax(logits: Any) -> Any:
    row = logits.astype(np.float64)
    row = row - row.max(-1, keepdims=True)
    return row - np.log(np.exp(row).sum(-1, keepdims=True))


def describe(logprobs: Any, count: int, token: int | None) -> list[tuple[int, float, int]]:
    """Return the `count` likeliest tokens of one position, with ranks from 1, and `token` if it is not among them."""
    order = np.argpartition(-logprobs, min(count, len(logprobs) - 1))[:count] if count else np.empty(0, np.int64)
    order = order[np.argsort(-logprobs[order], kind="stable")]
    entries = [(int(t), float(logprobs[t]), rank) for rank, t in enumerate(order, 1)]
    if token is not None and token not in {t for t, _, _ in entries}:
        entries.append((token, float(logprobs[token]), int((logprobs > logprobs[token]).sum()) + 1))
    return entries
