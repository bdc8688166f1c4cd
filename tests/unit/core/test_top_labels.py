from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serve.core.top_labels import OTHER, TopLabels


def test_the_first_names_get_labels_and_the_rest_are_other() -> None:
    labels = TopLabels(2)
    assert [labels.label(name) for name in ("a", "b", "c", "a")] == ["a", "b", OTHER, "a"]
    assert labels.retired == []


def test_a_name_that_becomes_busy_takes_the_place_of_one_that_is_not() -> None:
    labels = TopLabels(2)
    for name in ("a", "a", "b"):
        labels.label(name)
    assert [labels.label("c") for _ in range(3)] == [OTHER, "c", "c"]
    assert labels.retired == ["b"]
    assert labels.label("b") == OTHER


@given(names=st.lists(st.integers(0, 60).map(str), max_size=600), size=st.integers(1, 5))
def test_labels_are_few_and_a_busy_name_has_one(names: list[str], size: int) -> None:
    labels = TopLabels(size)
    in_use: set[str] = set()
    for name in names:
        label = labels.label(name)
        assert label in (name, OTHER)
        in_use = (in_use | {label}) - set(labels.retired)
        labels.retired.clear()
        assert len(in_use - {OTHER}) <= size
    counts = Counter(names)
    for name, count in counts.items():
        if count > 2 * len(names) / size:
            assert labels.label(name) == name
