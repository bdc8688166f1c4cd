"""The KL divergence of which only the likeliest tokens are known is never more than the true one."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.evaluate.distributions import Floats, Ids, kl_lower_bound

VOCABULARY = 40


def top(p: Floats, k: int) -> tuple[Ids, Floats]:
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k].astype(np.int32)
    return ids, np.log(np.take_along_axis(p, ids.astype(np.int64), axis=1))


def distributions(seed: int, sharpness: float, count: int = 5) -> Floats:
    logits = sharpness * np.random.default_rng(seed).standard_normal((count, VOCABULARY))
    p: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p


def exact(p: Floats, q: Floats) -> Floats:
    kl: Floats = (p * np.log(p / q)).sum(axis=1)
    return kl


@given(st.integers(0, 2**32 - 1), st.integers(1, VOCABULARY), st.integers(1, VOCABULARY), st.floats(0.0, 6.0))
def test_estimate_is_a_lower_bound(seed: int, k: int, m: int, sharpness: float) -> None:
    p, q = distributions(seed, sharpness), distributions(seed + 1, sharpness)
    found = kl_lower_bound(*top(p, k), *top(q, m))
    assert (found >= 0).all()
    assert (found <= exact(p, q) + 1e-9).all()


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 6.0))
def test_estimate_is_exact_where_all_tokens_are_named(seed: int, sharpness: float) -> None:
    p, q = distributions(seed, sharpness), distributions(seed + 1, sharpness)
    found = kl_lower_bound(*top(p, VOCABULARY), *top(q, VOCABULARY))
    assert found == pytest.approx(exact(p, q), abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, VOCABULARY))
def test_equal_sides_are_not_apart(seed: int, k: int) -> None:
    p = distributions(seed, 2.0)
    assert kl_lower_bound(*top(p, k), *top(p, k)) == pytest.approx(np.zeros(5), abs=1e-9)


def test_little_is_missed_where_the_likeliest_tokens_have_most_of_it() -> None:
    p = distributions(0, 4.0, count=200)
    q = 0.8 * p + 0.2 * distributions(1, 4.0, count=200)
    found, true = kl_lower_bound(*top(p, 20), *top(q, 20)).mean(), exact(p, q).mean()
    assert 0.95 * true < found <= true


def test_sides_that_name_no_common_token_are_far_apart() -> None:
    """The bound would be worth nothing if a ruined model looked like a good one."""
    ids: Ids = np.array([[0, 1]], dtype=np.int32)
    other: Ids = np.array([[2, 3]], dtype=np.int32)
    sure: npt.NDArray[np.float64] = np.log([[0.7, 0.299]])
    assert kl_lower_bound(ids, sure, other, np.log([[0.9, 0.0001]]))[0] > 5.0
