"""The picture of a search."""

from pathlib import Path

import pytest

from builders.tune.plot import write_plot
from builders.tune.search import FailureKind
from builders.tune.tuning_record import TrialRecord, TuningRecord
from serve.artifacts.certificates import LoadPoint

pytest.importorskip("matplotlib")


def test_every_search_can_be_drawn(tmp_path: Path) -> None:
    points = tuple(
        LoadPoint(
            concurrency=concurrency,
            requests=8,
            seconds=1.0,
            output_tokens_per_s=90.0 * concurrency,
            goodput_tokens_per_s=80.0 * concurrency,
            ttft_p50_s=0.1,
            ttft_p95_s=0.02 * concurrency,
            tpot_p50_s=0.01,
            tpot_p95_s=0.011,
        )
        for concurrency in (1, 4, 16)
    )
    ran = TrialRecord(
        number=1,
        settings={"max_batch_size": 16},
        meets=True,
        goodput_tokens_per_s=1280.0,
        concurrency=16,
        points=points,
    )
    failed = TrialRecord(number=2, settings={"max_batch_size": 32}, failure=FailureKind.OUT_OF_MEMORY, reason="no room")
    for trials in ([ran.model_copy(update={"verdict": "chosen"}), failed], [failed], [ran]):
        record = TuningRecord(
            search="quick",
            prompt_tokens=512,
            output_tokens=128,
            ttft_limit_s=0.2,
            tpot_limit_s=0.05,
            percentile=95.0,
            knobs={"max_batch_size": [16, 32]},
            trials=tuple(trials),
            chosen={"max_batch_size": 16},
            why="no step helps any more",
            seconds=12.0,
        )
        path = tmp_path / "tuning.png"
        assert write_plot(path, record, "a title")
        assert path.read_bytes().startswith(b"\x89PNG")
