"""Intervals: published examples, exact coverage, and what holds for any sample."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.evaluate.intervals import paired_difference, ratio_of_sums, samples_needed, share, wider
from serve.artifacts.certificates import Estimate

counts = st.integers(0, 200)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [  # Newcombe 1998, paired data, method 10, the examples with 50 pairs and a difference of 0.2
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
    ],
)
def test_paired_difference_is_newcombes(table: tuple[int, int, int, int], low: float, high: float) -> None:
    found = paired_difference(*table)
    assert found.value == pytest.approx(0.2)
    assert [found.low, found.high] == pytest.approx([low, high], abs=1e-4)


def test_share_is_wilsons() -> None:
    found = share(81, 263)  # Newcombe 1998, "Two-sided confidence intervals for the single proportion"
    assert [found.low, found.high] == pytest.approx([0.2553, 0.3662], abs=1e-4)


@given(counts, counts, counts, counts)
def test_interval_holds_the_estimate_and_swaps_with_the_sides(a: int, b: int, c: int, d: int) -> None:
    if not a + b + c + d:
        return
    found, swapped = paired_difference(a, b, c, d), paired_difference(a, c, b, d)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert [swapped.low, swapped.high] == pytest.approx([-found.high, -found.low])


def test_no_difference_in_a_small_sample_proves_little() -> None:
    few, many = paired_difference(20, 0, 0, 0), paired_difference(2000, 0, 0, 2000)
    assert few.high > 0.1
    assert many.high < 0.001


@pytest.mark.parametrize("cells", [(0.8, 0.1, 0.05, 0.05), (0.5, 0.02, 0.0, 0.48), (0.9, 0.05, 0.05, 0.0)])
def test_exact_coverage_is_about_what_is_claimed(cells: tuple[float, float, float, float]) -> None:
    n, truth, covered = 30, cells[1] - cells[2], 0.0
    for a, b, c in product(range(n + 1), repeat=3):
        if a + b + c > n:
            continue
        d = n - a - b - c
        interval = paired_difference(a, b, c, d)
        if interval.low - 1e-12 <= truth <= interval.high + 1e-12:
            ways = math.factorial(n) / math.prod(math.factorial(k) for k in (a, b, c, d))
            covered += ways * math.prod(p**k for p, k in zip(cells, (a, b, c, d), strict=True))
    assert covered >= 0.94


def test_ratio_of_sums_is_the_mean_where_all_weights_are_one() -> None:
    found = ratio_of_sums([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    reach = 3.182446 * math.sqrt(5 / 3 / 4)  # t(3, 97.5 %) and the standard error
    assert [found.value, found.low, found.high] == pytest.approx([2.5, 2.5 - reach, 2.5 + reach], abs=1e-5)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 50)), min_size=2, max_size=40), st.floats(0.1, 10))
def test_ratio_of_sums_scales_with_its_numerators(pairs: list[tuple[float, int]], factor: float) -> None:
    numerators, weights = [y for y, _ in pairs], [w for _, w in pairs]
    plain, scaled = ratio_of_sums(numerators, weights), ratio_of_sums([factor * y for y in numerators], weights)
    assert plain.low <= plain.value <= plain.high
    assert scaled.high - scaled.value == pytest.approx(factor * (plain.high - plain.value), abs=1e-6)


def test_one_text_or_none_has_no_interval() -> None:
    for values, weights in (([1.0], [1.0]), ([], []), ([1.0, 2.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="two samples or more"):
            ratio_of_sums(values, weights)
    with pytest.raises(ValueError, match="samples"):
        share(0, 0)


def test_wider_stays_in_the_figures_range() -> None:
    narrow = Estimate(value=0.98, low=0.97, high=0.99, samples=100)
    bursts = Estimate(value=0.98, low=0.9, high=1.06, samples=4)
    assert wider(narrow, bursts, lowest=0.0) == Estimate(value=0.98, low=0.9, high=1.0, samples=100)


def test_samples_needed_grows_with_the_square_of_what_is_missing() -> None:
    wide = Estimate(value=0.0, low=-0.04, high=0.04, samples=100)
    assert samples_needed(wide, 0.01) == 1600
    assert samples_needed(wide, 0.0) is None
