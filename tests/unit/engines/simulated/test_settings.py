"""Settings: what is wrong is said with its value and its remedy."""

from typing import Any

import pytest
from pydantic import ValidationError

from serve.engines.simulated.faults import Fault, FaultScript
from serve.engines.simulated.hardware import GPUS
from serve.engines.simulated.latency import StepShape
from serve.engines.simulated.settings import FixedLatencySettings, RooflineSettings, SimulatedSettings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latencies": {}}, "Extra inputs are not permitted"),
        ({"latency": {"kind": "magic"}}, "'fixed', 'roofline'"),
        ({"latency": {"kind": "roofline", "model": "llama-9"}}, "model='llama-9' is unknown: use one of llama-3.2-1b"),
        ({"latency": {"kind": "roofline", "gpu": "h1000"}}, "gpu='h1000' is unknown: use one of a100-80gb"),
        ({"latency": {"kind": "roofline", "model": "llama-3.3-70b", "gpu": "l40s"}}, "raise tensor_parallel"),
        ({"token_range": (90, 95), "vocab_size": 100}, "token_range=(90, 95) must hold 20 ids or more"),
        ({"token_range": (90, 120), "vocab_size": 100}, "all below vocab_size=100"),
        ({"max_num_tokens": 100}, "max_num_tokens=100 cannot hold max_batch_size=256"),
        ({"max_logprobs": 21}, "less than or equal to 20"),
        ({"faults": [{"kind": "explode"}]}, "'die', 'exit', 'hang'"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        SimulatedSettings.model_validate(given)
    assert message in str(raised.value)


def test_defaults_are_an_8b_model_on_one_h100() -> None:
    limits = SimulatedSettings().make_limits()
    assert limits.tokens_per_block == 32
    assert 28_000 < limits.total_blocks < 29_500  # 90 % of 67 GB, at 64 KiB a token
    assert SimulatedSettings(latency=FixedLatencySettings()).make_limits().total_blocks == 32768
    assert SimulatedSettings(total_blocks=9, max_batch_size=1).make_limits().total_blocks == 9


def test_settings_survive_yaml_and_json() -> None:
    settings = SimulatedSettings(
        latency=RooflineSettings(model="qwen3-32b", gpu="h200", tensor_parallel=2),
        faults=(Fault(kind="die", after_tokens=5),),
    )
    assert SimulatedSettings.model_validate_json(settings.model_dump_json()) == settings


def step_s(shape: StepShape, **settings: Any) -> float:
    return RooflineSettings(**settings).make_model().step_s(shape)


DECODE = StepShape(decode_sequences=64, decode_context_tokens=64 * 2000)
PREFILL = StepShape(prefill_tokens=8192, prefill_pairs=8192 * 8193 / 2, prefill_ends=1)


@pytest.mark.parametrize("shape", [DECODE, PREFILL])
def test_better_hardware_and_smaller_models_are_faster(shape: StepShape) -> None:
    ladder = [
        step_s(shape, model="llama-3.3-70b", gpu="h200", weights="fp8"),
        step_s(shape, model="llama-3.3-70b", gpu="h200", weights="fp8", tensor_parallel=2),
        step_s(shape, model="llama-3.3-70b", gpu="h200", weights="fp8", tensor_parallel=4),
        step_s(shape, model="llama-3.1-8b", gpu="h200", weights="bf16"),
        step_s(shape, model="llama-3.1-8b", gpu="h200", weights="fp8"),
    ]
    assert ladder == sorted(ladder, reverse=True)
    same = {"model": "llama-3.1-8b", "weights": "bf16"}
    assert (
        step_s(shape, gpu="h200", **same) <= step_s(shape, gpu="h100", **same) < step_s(shape, gpu="a100-80gb", **same)
    )
    assert step_s(shape, gpu="a100-80gb", **same) < step_s(shape, gpu="l40s", **same) * 2


def test_more_work_never_takes_less_time() -> None:
    for gpu in GPUS:
        model = RooflineSettings(model="llama-3.2-1b", gpu=gpu).make_model()
        for wider in (
            StepShape(prefill_tokens=101, decode_sequences=10, decode_context_tokens=1000),
            StepShape(prefill_tokens=100, decode_sequences=11, decode_context_tokens=1000),
            StepShape(prefill_tokens=100, decode_sequences=10, decode_context_tokens=1001),
            StepShape(prefill_tokens=100, prefill_pairs=1, decode_sequences=10, decode_context_tokens=1000),
        ):
            assert model.step_s(wider) >= model.step_s(StepShape(100, 0.0, 0, 10, 1000))


def test_experts_are_read_as_tokens_visit_them() -> None:
    few = step_s(StepShape(decode_sequences=1), model="qwen3-30b-a3b")
    many = step_s(StepShape(decode_sequences=512), model="qwen3-30b-a3b")
    dense = step_s(StepShape(decode_sequences=1), model="qwen3-32b")
    assert few < dense / 3
    assert many > few * 4


def test_faults_wait_for_all_that_they_name_and_happen_as_often_as_they_say() -> None:
    kinds = frozenset({"die", "slow"})
    script = FaultScript((Fault(kind="slow", after_tokens=10, after_requests=2, times=2), Fault(kind="die", at_s=9)))
    assert script.due(kinds, tokens=10, requests=1) is None
    assert script.due(frozenset({"hang"}), tokens=99, requests=9, running_s=99) is None
    for _ in range(2):
        fault = script.due(kinds, tokens=10, requests=2)
        assert fault is not None
        assert fault.kind == "slow"
    assert script.due(kinds, tokens=10, requests=2) is None
    fault = script.due(kinds, tokens=10, requests=2, running_s=9.0)
    assert fault is not None
    assert fault.kind == "die"


def test_replicas_share_a_ledger(tmp_path: Any) -> None:
    fault = Fault(kind="die", times=2, ledger=tmp_path)
    happened = [FaultScript((fault,)).due(frozenset({"die"})) is not None for _ in range(4)]
    assert happened == [True, True, False, False]
