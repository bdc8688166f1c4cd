from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from serve.core.routing.common_prefix import CommonPrefix

# Chains over two letters: what comes before is part of each name, as it is of a chained hash.
chains = st.text("ab", max_size=6).map(lambda text: [hash(text[: end + 1]) for end in range(len(text))])


def shared_blocks(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


@given(recent=st.lists(chains, max_size=40), prompt=chains, share=st.sampled_from([0.1, 0.5, 0.9]))
def test_the_depth_is_what_a_share_of_the_latest_prompts_have(
    recent: list[list[int]], prompt: list[int], share: float
) -> None:
    common = CommonPrefix(size=32)
    for hashes in recent:
        common.add(hashes)
    latest = recent[-32:]
    depths = sorted((shared_blocks(prompt, other) for other in latest), reverse=True)
    expected = 0 if len(latest) < 4 else depths[max(2, int(share * len(latest))) - 1]
    assert common.depth(prompt, share) == expected
