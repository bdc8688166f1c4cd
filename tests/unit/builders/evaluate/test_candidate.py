"""Settings of a candidate: the specification's, and over them what an earlier step has found."""

from hypothesis import given
from hypothesis import strategies as st

from builders.evaluate.candidate import merged

values = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
)
sections = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


def test_sections_are_merged_key_by_key() -> None:
    base = {"max_batch_size": 8, "kv_cache": {"memory_fraction": 0.8, "block_reuse": False}}
    over = {"kv_cache": {"memory_fraction": 0.9}, "scheduler": {}}
    assert merged(base, over) == {
        "max_batch_size": 8,
        "kv_cache": {"memory_fraction": 0.9, "block_reuse": False},
        "scheduler": {},
    }


@given(sections, sections)
def test_merging_again_changes_nothing_nor_does_merging_nothing(a: dict[str, object], b: dict[str, object]) -> None:
    before = (repr(a), repr(b))
    assert merged(merged(a, b), b) == merged(a, b)
    assert merged(a, {}) == merged({}, a) == a
    assert (repr(a), repr(b)) == before
