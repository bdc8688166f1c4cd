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


def remembered(prompts: list[list[int]]) -> list[list[int]]:
    kept: list[list[int]] = []
    for prompt in prompts:
        earlier = [one for one in kept if one and len(one) < len(prompt) and prompt[: len(one)] == one]
        if earlier:
            kept.reverse()
            kept.remove(earlier[-1])
            kept.reverse()
        kept = [*kept, prompt][-32:]
    return kept


@given(recent=st.lists(chains, max_size=40), prompt=chains, share=st.sampled_from([0.1, 0.5, 0.9]))
def test_the_depth_is_what_a_share_of_the_latest_prompts_have(
    recent: list[list[int]], prompt: list[int], share: float
) -> None:
    common = CommonPrefix(size=32)
    for hashes in recent:
        common.add(hashes)
    latest = remembered(recent)
    depths = sorted((shared_blocks(prompt, other) for other in latest), reverse=True)
    expected = 0 if len(latest) < 4 else depths[max(2, int(share * len(latest))) - 1]
    assert common.depth(prompt, share) == expected


def test_a_lone_conversation_is_no_system_prompt() -> None:
    common, turns = CommonPrefix(), list(range(100, 200))
    for other in range(3):
        common.add([other])
    for length in range(1, 60):
        assert common.depth(turns[:length]) == 0
        common.add(turns[:length])


def test_many_conversations_over_one_system_prompt_share_it_and_nothing_else() -> None:
    common = CommonPrefix()
    for number in range(20):
        for turn in range(1, 6):
            common.add([1, 2, 3, *(1000 * number + block for block in range(turn))])
    assert common.depth([1, 2, 3, 77, 78]) == 3
    assert common.depth([1, 2, 3, *(19_000 + block for block in range(6))]) == 3
