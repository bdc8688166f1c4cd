"""Batches of calibration texts, and where a model is put: pure decisions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.errors import BuildFailed
from builders.quantize.calibration import CalibrationPass, check_samples, make_batches, tokens_of_a_batch
from builders.quantize.placement import Placement, choose_placement

GIB = 1 << 30
samples = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=30)


@given(samples=samples, batch_tokens=st.integers(1, 20))
def test_batches_hold_every_token_once_without_padding_and_within_the_memory(
    samples: list[list[int]], batch_tokens: int
) -> None:
    batches = make_batches(samples, batch_tokens)
    rows = [row for batch in batches for row in batch]
    assert [token for row in rows for token in row] == [token for sample in samples for token in sample]
    longest = max(map(len, samples))
    assert {len(row) for row in rows[:-1]} <= {longest}
    assert 0 < len(rows[-1]) <= longest
    for batch in batches:
        assert len({len(row) for row in batch}) == 1
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens


@given(
    free=st.integers(0, 1 << 40),
    more=st.integers(0, 1 << 40),
    hidden=st.integers(1, 20_000),
    vocab=st.integers(1, 300_000),
)
def test_more_memory_never_means_smaller_batches(free: int, more: int, hidden: int, vocab: int) -> None:
    tokens = tokens_of_a_batch(free, hidden, 4 * hidden, vocab)
    assert 1 <= tokens <= tokens_of_a_batch(free + more, hidden, 4 * hidden, vocab)


def test_an_8b_model_on_an_80_gib_gpu_computes_whole_texts_together() -> None:
    assert tokens_of_a_batch(60 * GIB, 4096, 14336, 128256) > 16 * 512


class Recorder:
    """Stands where a model does, and takes note of its batches."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.model = self._compute

    def get_input_embeddings(self) -> "Recorder":
        return self

    @property
    def weight(self) -> "Recorder":
        return self

    device = "cpu"

    def _compute(self, input_ids: object, use_cache: bool) -> None:
        assert not use_cache
        self.shapes.append(tuple(input_ids.shape))  # type: ignore[attr-defined]


def test_a_pass_tells_samples_over_all_passes_and_never_more_than_there_are() -> None:
    told: list[tuple[int, int]] = []
    calibrate = CalibrationPass([[[1, 2], [3, 4]], [[5]]], 2, lambda done, total, _: told.append((done, total)))
    model = Recorder()
    for _ in range(3):  # once more than was foreseen
        calibrate(model)
    assert model.shapes == [(2, 2), (1, 1)] * 3
    assert calibrate.tokens == 5
    assert told == [(2, 6), (3, 6), (5, 6), (6, 6), (6, 6), (6, 6)]


def test_a_tokenizer_of_another_model_is_noticed() -> None:
    check_samples([[0, 7]], 8)
    with pytest.raises(BuildFailed, match="token 8, but the model has 8"):
        check_samples([[0, 1], [8]], 8)


@pytest.mark.parametrize(
    ("asked", "gpus", "device", "spread"),
    [
        ("auto", (), "cpu", False),
        ("auto", (80,), "cuda", False),
        ("auto", (16, 16), "cuda", True),
        ("auto", (8,), "cpu", False),
        ("cpu", (80,), "cpu", False),
        ("cuda", (20,), "cuda", False),
    ],
)
def test_where_a_model_of_15_gib_is_put(asked: str, gpus: tuple[int, ...], device: str, spread: bool) -> None:
    placed = choose_placement(asked, 15 * GIB, [size * GIB for size in gpus], 64 * GIB)  # type: ignore[arg-type]
    assert (placed.device, placed.spread) == (device, spread)
    assert (placed.note is not None) == (asked == "auto" and gpus == (8,))


@pytest.mark.parametrize(
    ("asked", "gpus", "memory", "says"),
    [
        ("cuda", (), 64, "sees no CUDA GPU"),
        ("cuda", (8,), 64, r"20\.0 GiB are needed .* 8\.0 GiB of GPU memory.*device: cpu"),
        ("auto", (8,), 16, r"16\.0 GiB of main memory; use a larger node"),
        ("cpu", (), 16, "use a larger node"),
    ],
)
def test_a_model_that_fits_nowhere(asked: str, gpus: tuple[int, ...], memory: int, says: str) -> None:
    with pytest.raises(BuildFailed, match=says):
        choose_placement(asked, 15 * GIB, [size * GIB for size in gpus], memory * GIB)  # type: ignore[arg-type]


def test_main_memory_is_enough_for_what_fits_it() -> None:
    assert choose_placement("auto", GIB, [], 2 * GIB) == Placement("cpu")
