"""Which device a rank takes, and what its program is."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.workers.rank_program import SimulatedProgram, TransformersProgram, device_index, make_program


@given(gpu=st.integers(0, 15), hidden=st.lists(st.integers(16, 31), unique=True, max_size=4))
def test_a_gpu_is_counted_among_those_that_are_visible(gpu: int, hidden: list[int]) -> None:
    visible = ",".join(map(str, [*hidden, gpu]))
    assert device_index([str(gpu)], visible) == len(hidden)
    assert device_index([str(gpu)], None) == gpu
    assert device_index([str(gpu)], "") == gpu


def test_gpus_may_have_names() -> None:
    assert device_index(["GPU-b"], "GPU-a, GPU-b") == 1


def test_a_rank_without_a_gpu_has_no_device() -> None:
    assert device_index([], "0,1") is None


def test_a_hidden_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=0,1 hides it"):
        device_index(["3"], "0,1")


@pytest.mark.parametrize(
    ("settings", "program"),
    [(SimulatedSettings(), SimulatedProgram), (TransformersSettings(), TransformersProgram)],
)
def test_a_program_is_pickled_to_its_rank(settings: SimulatedSettings | TransformersSettings, program: type) -> None:
    made = make_program(settings, Path("/models/m"))
    assert isinstance(made, program)
    assert pickle.loads(pickle.dumps(made)) == made
