"""PURE: how far two next-token distributions are apart, of which only the likeliest tokens are known."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
_TINY = 1e-30


def kl_lower_bound(ids: Ids, logprobs: Floats, other_ids: Ids, other_logprobs: Floats) -> Floats:
    """Estimate KL(first || other) at each position, in nats; never more than it is.

    Known of each side are its k likeliest tokens. Tokens that both name count as they are. Tokens that only the first
    names have an unknown probability on the other side, though none of them more than the least likely token named
    there (or it would have been named); they are taken together, and given as much as that allows. All remaining
    tokens are one bucket. Taking events together never raises a divergence (log-sum inequality), hence a lower bound;
    it is exact if the tokens named are all that have any probability, and with k = 20 misses no more than what happens
    within the tail.

    Args:
        ids: (positions, k) tokens named by the first side, in any order, none twice in a row.
        logprobs: (positions, k) their log probabilities.
        other_ids: (positions, m) tokens named by the other side.
        other_logprobs: (positions, m) theirs.

    Returns:
        (positions,), at least 0.

    Source: the log-sum inequality, Cover and Thomas, "Elements of Information Theory", theorem 2.7.1.
    """
    p, q = np.exp(logprobs), np.exp(other_logprobs)
    same = ids[:, :, None] == other_ids[:, None, :]
    shared = same.any(axis=2)
    q_of_p = np.einsum("nkm,nm->nk", same, q)
    within = np.where(shared, _term(p, np.where(shared, q_of_p, 1.0)), 0.0).sum(axis=1)
    p_only = np.where(shared, 0.0, p).sum(axis=1)
    p_rest = np.clip(1.0 - p.sum(axis=1), 0.0, 1.0)
    q_left = np.clip(1.0 - np.where(shared, q_of_p, 0.0).sum(axis=1), 0.0, 1.0)
    # In proportion to what the first side gives them, the two buckets would tell nothing apart.
    fair = q_left * p_only / np.maximum(p_only + p_rest, _TINY)
    most = (~shared).sum(axis=1) * q.min(axis=1)
    q_only = np.minimum(most, fair)
    kl: Floats = within + _term(p_only, q_only) + _term(p_rest, q_left - q_only)
    return np.maximum(kl, 0.0)


def _term(p: Floats, q: Floats) -> Floats:
    """Return p log(p / q), which is 0 where p is."""
    term: Floats = np.where(p > _TINY, p * np.log(np.maximum(p, _TINY) / np.maximum(q, _TINY)), 0.0)
    return term
