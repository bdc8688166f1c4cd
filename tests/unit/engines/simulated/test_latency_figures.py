"""The calibrated model still reproduces published figures. `benchmarks/latency_model.py` prints all of them."""

import pytest

from benchmarks.latency_figures import BLACKWELL, HOPPER, LATENCY, Latency, Throughput
from benchmarks.latency_model import latency, throughput

# One of each model, GPU and regime: cheap ones, for the tests' sake.
LENGTHS = [(2048, 128), (5000, 500), (2048, 2048), (128, 4096)]
FIGURES = [
    figure
    for figure in (*HOPPER, *BLACKWELL)
    if (figure.input_tokens, figure.output_tokens) in LENGTHS and figure.model != "llama-3.1-405b"
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.model}-{f.gpu}-{f.input_tokens}-{f.output_tokens}")
def test_throughput_is_within_15_percent(figure: Throughput) -> None:
    simulated, _ = throughput(figure)
    assert simulated == pytest.approx(figure.output_tokens_per_s, rel=0.15)


@pytest.mark.parametrize("figure", [f for f in LATENCY if f.concurrency in (1, 5)], ids=str)
def test_latency_that_took_no_part_in_the_calibration_is_within_15_percent(figure: Latency) -> None:
    ttft_s, itl_s = latency(figure, together=False)
    assert itl_s == pytest.approx(figure.itl_s, rel=0.15)
    if figure.concurrency == 1:
        assert ttft_s == pytest.approx(figure.ttft_s, rel=0.15)
