"""Choosing the next token of every sequence of a batch, each by its own parameters: tensors in, token ids out.

A row's result depends on that row alone: not on which other rows are there, nor on their parameters. Draws are by
inverse transform of one uniform number, which is a function of the row's seed and of the token's position in the
sequence. So a seeded sequence that moves to another engine, prompt and output so far as its new prompt, goes on as it
would have here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from serve.core.request import SamplingParams, TokenLogprob

_MASK = (1 << 64) - 1
_NUCLEUS_GUESS = 1024  # likeliest tokens that nearly always hold the mass top_p asks for; else all are sorted
_LEAST_LOGPROB = -9999.0  # what OpenAI's API says instead of minus infinity, which JSON cannot say


class SamplerRow:
    """One sequence as the sampler sees it: its parameters, and what they need to remember.

    Args:
        params: Validated; `top_k` may exceed the vocabulary.
        prompt: (prompt_tokens,), each below `vocab_size`.
        seed: Any int; for a request without one, something random.
        vocab_size: Number of logits.
        device: Where the logits are.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: npt.NDArray[np.uint32],
        seed: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self.seed = seed & _MASK
        self.position = len(prompt)  # index in the sequence of the token to be chosen next
        self.num_output = 0
        self.greedy = params.temperature == 0.0
        self.top_k = min(params.top_k, vocab_size) if params.top_k else vocab_size
        self._vocab_size = vocab_size
        # float32: counts stay exact up to 2**24, and are multiplied with float32 logits.
        self._output_counts = torch.zeros(vocab_size, device=device) if self._penalises_output else None
        self._seen: torch.Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.from_numpy(prompt.astype(np.int64)).to(device)] = True
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        if params.logit_bias:
            self._bias = (
                torch.tensor(list(params.logit_bias), dtype=torch.long, device=device),
                torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device),
            )
        self._stop_ids: torch.Tensor | None = None
        if params.min_tokens > 0 and params.stop_token_ids:
            self._stop_ids = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)

    @property
    def _penalises_output(self) -> bool:
        return self.params.presence_penalty != 0.0 or self.params.frequency_penalty != 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether `edit` changes anything now."""
        held_back = self._stop_ids is not None and self.num_output < self.params.min_tokens
        return held_back or not (self._seen is None and self._output_counts is None and self._bias is None)

    def edit(self, logits: torch.Tensor) -> None:
        """Apply penalties, bias and the mask of `min_tokens` to this row's logits, (vocab_size,), in place."""
        if self._seen is not None:
            penalty = self.params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._seen, penalised, logits))
        if self._output_counts is not None:
            logits.sub_(self._output_counts, alpha=self.params.frequency_penalty)
            logits.sub_((self._output_counts > 0).to(logits.dtype), alpha=self.params.presence_penalty)
        if self._bias is not None:
            ids, values = self._bias
            logits.index_add_(0, ids, values)
        if self._stop_ids is not None and self.num_output < self.params.min_tokens:
            logits.index_fill_(0, self._stop_ids, -torch.inf)

    def advance(self, token_id: int) -> None:
        """Take note of the token that was chosen."""
        self.num_output += 1
        self.position += 1
        if self._output_counts is not None:
            self._output_counts[token_id] += 1
        if self._seen is not None:
            self._seen[token_id] = True


@dataclass(frozen=True)
class Samples:
    """What `sample` chose for each row.

    Attributes:
        token_ids: One a row; meaningless for a broken row.
        logprobs: One a row; None where none were asked for.
        broken: Rows whose logits are not finite, so that nothing could be chosen.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    broken: list[int]


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> Samples:
    """Choose one token a row, and advance the rows.

    Args:
        logits: (len(rows), vocab_size), float32, the model's raw ones; overwritten.
        rows: At least one.
    """
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[wanted] if wanted else None
    for i, row in enumerate(rows):
        if row.edits_logits:
            row.edit(logits[i])
    best, tokens = logits.max(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    if len(drawn) == len(rows):
        tokens = _draw(logits, best, rows)
    elif drawn:
        tokens[drawn] = _draw(logits[drawn], best[drawn], [rows[i] for i in drawn])
    finite = torch.isfinite(best).tolist()
    token_ids: list[int] = tokens.tolist()
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    if raw is not None:
        counts = [rows[i].params.logprobs or 0 for i in wanted]
        for i, entry in zip(wanted, token_logprobs(raw, tokens[wanted], counts), strict=True):
            logprobs[i] = entry
    for row, token_id, usable in zip(rows, token_ids, finite, strict=True):
        if usable:
            row.advance(token_id)
    return Samples(token_ids, logprobs, [i for i, usable in enumerate(finite) if not usable])


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprob]:
    """Return the log probability of a token a row, and of the `counts` likeliest tokens.

    Args:
        logits: (num_rows, vocab_size), raw, float32.
        token_ids: (num_rows,), int64.
        counts: (num_rows,), each >= 0.
    """
    logprobs = logits.log_softmax(dim=-1).clamp_(min=_LEAST_LOGPROB)
    own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs.topk(min(max(counts), logits.shape[1]), dim=-1)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token_id, logprob, row_ids, row_values, count in zip(
            token_ids.tolist(), own, ids.tolist(), values.tolist(), counts, strict=True
        )
    ]


def _draw(logits: torch.Tensor, best: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """Draw a token a row by temperature, top_k, top_p and min_p.

    Every filter is a threshold on the logit, and keeps tokens that tie with the last one kept. The result is then
    independent of the order in which a kernel sorts ties, which are common among 16-bit logits.
    """
    device = logits.device
    temperature = torch.tensor([row.params.temperature for row in rows], dtype=torch.float32, device=device)
    # Relative to the best first: a tiny temperature then gives 0 and minus infinity instead of infinities and NaN.
    scaled = (logits - best.unsqueeze(1)) / temperature.unsqueeze(1)
    threshold = _threshold(scaled, rows)
    if threshold is not None:
        scaled = scaled.masked_fill(scaled < threshold.unsqueeze(1), -torch.inf)
    mass = scaled.double().exp_().cumsum(dim=-1)
    total = mass[:, -1]
    uniform = torch.from_numpy(uniforms([row.seed for row in rows], [row.position for row in rows])).to(device)
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, target.unsqueeze(1), right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _threshold(scaled: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor | None:
    """Return the least scaled logit that each row keeps, (num_rows,); None if every row keeps all."""
    vocab_size = scaled.shape[1]
    threshold: torch.Tensor | None = None
    top_ks = [row.top_k for row in rows]
    if min(top_ks) < vocab_size:
        ks = torch.tensor([k if k < vocab_size else 0 for k in top_ks], device=scaled.device)
        likeliest = scaled.topk(int(ks.max()), dim=-1).values
        least = likeliest.gather(1, (ks - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        threshold = torch.where(ks > 0, least, -torch.inf)
    top_ps = [row.params.top_p for row in rows]
    if min(top_ps) < 1.0:
        kept = scaled if threshold is None else scaled.masked_fill(scaled < threshold.unsqueeze(1), -torch.inf)
        top_p = torch.tensor(top_ps, dtype=torch.float64, device=scaled.device)
        nucleus = torch.where(top_p < 1.0, _nucleus(kept, top_p), -torch.inf)
        threshold = nucleus if threshold is None else torch.maximum(threshold, nucleus)
    min_ps = [row.params.min_p for row in rows]
    if max(min_ps) > 0.0:
        least = torch.tensor(min_ps, dtype=torch.float64, device=scaled.device).log_().to(scaled.dtype)
        threshold = least if threshold is None else torch.maximum(threshold, least)
    return threshold


def _nucleus(kept: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the least logit of the smallest set of likeliest tokens that has a mass of `top_p`, (num_rows,)."""
    total = kept.double().logsumexp(dim=-1, keepdim=True)
    width = min(_NUCLEUS_GUESS, kept.shape[1])
    while True:
        likeliest = kept.topk(width, dim=-1).values
        mass = (likeliest.double() - total).exp_().cumsum_(dim=-1)
        # A token belongs to the nucleus if those before it do not reach top_p yet; the first one always does.
        size = 1 + (mass[:, :-1] < top_p.unsqueeze(1)).sum(dim=-1, keepdim=True)
        if width == kept.shape[1] or bool(((size < width).squeeze(1) | (top_p >= 1.0)).all()):
            return likeliest.gather(1, size - 1).squeeze(1)
        width = kept.shape[1]


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each pair of a seed (below 2**64) and a position, equal for equal pairs.

    Source: finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014),
    applied to the seed, then to its sum with the position's multiple of the golden ratio.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    mixed = _mix(np.array(seeds, dtype=np.uint64) + golden)
    mixed = _mix(mixed + golden * np.array(positions, dtype=np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
