"""DecodeBatch keeps nothing of sequences that left."""

import gc
import weakref

from serve.engines.simulated.decode_batch import DecodeBatch
from serve.engines.simulated.sequence import ScheduledSequence


class Traced(ScheduledSequence):
    __slots__ = ("__weakref__",)


def test_cancelled_sequences_are_forgotten_long_before_they_would_have_ended() -> None:
    batch: DecodeBatch[Traced] = DecodeBatch(4)
    traced = []
    for number in range(1000):
        sequence = Traced(str(number), 10, [1, 2], root=0, max_tokens=10**6)
        sequence.serial = number
        batch.enter(sequence)
        batch.leave(sequence)
        traced.append(weakref.ref(sequence))
    del sequence
    gc.collect()
    assert sum(reference() is not None for reference in traced) < 100
    assert batch.context_tokens == len(batch) == 0


def test_the_next_end_is_that_of_a_sequence_that_is_still_there() -> None:
    batch: DecodeBatch[Traced] = DecodeBatch(4)
    short, long = (Traced(name, 10, [1, 2], root=0, max_tokens=tokens) for name, tokens in (("s", 5), ("l", 9)))
    batch.enter(short)
    batch.enter(long)
    assert batch.steps_to_end() == 4
    batch.step()
    batch.leave(short)
    assert short.produced_tokens == 2
    assert batch.steps_to_end() == 7
    for _ in batch.steps(7):
        pass
    assert list(batch.ended()) == [long]
    assert batch.generated_tokens(long) == 9
    assert batch.kv_tokens(long) == 18
