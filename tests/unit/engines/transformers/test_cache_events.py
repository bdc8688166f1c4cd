"""Events add up to what the ledger holds, whatever the order of its changes."""

from hypothesis import given
from hypothesis import strategies as st

from serve.core.kv_events import KvLedger, KvRemoved, KvStored
from serve.engines.transformers.cache_events import CacheEvents

# Few keys, of which some share a hash: collisions that never happen by chance.
KEYS = [bytes([i]) for i in range(12)]
PUBLISHED = {key: (i // 2 + 100, i // 2 + 99) for i, key in enumerate(KEYS)}


@given(st.lists(st.lists(st.sampled_from(KEYS), max_size=12), max_size=12))
def test_events_of_each_step_lead_to_the_content_of_the_table(steps: list[list[bytes]]) -> None:
    events, ledger = CacheEvents(), KvLedger()
    table: set[bytes] = set()
    for step in steps:
        changes: list[tuple[bytes, bool]] = []
        for key in step:  # each mention registers a key, or evicts it
            if key not in table:
                events.publish(key, *PUBLISHED[key])
            changes.append((key, key not in table))
            table ^= {key}
        batch = events.drain(changes)
        assert not changes
        _check_each_change_is_one(ledger.content(), batch)
        ledger.record(batch)
        assert ledger.content() == {PUBLISHED[key][0] for key in table} == events.hashes(table)


def _check_each_change_is_one(content: frozenset[int], batch: list[KvStored | KvRemoved]) -> None:
    held = set(content)
    for event in batch:
        for block_hash in event.block_hashes:
            assert (block_hash in held) == isinstance(event, KvRemoved)
            held ^= {block_hash}


def test_a_chain_is_one_event_and_so_are_its_removals() -> None:
    events = CacheEvents()
    chain = [(b"a", 10, 9), (b"b", 11, 10), (b"c", 12, 11), (b"x", 50, 9)]
    for key, block_hash, parent in chain:
        events.publish(key, block_hash, parent)
    assert events.drain([(key, True) for key, *_ in chain]) == [KvStored((10, 11, 12), 9), KvStored((50,), 9)]
    assert events.drain([(b"c", False), (b"x", False)]) == [KvRemoved((12, 50))]
