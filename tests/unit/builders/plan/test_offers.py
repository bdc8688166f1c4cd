"""GPUs by name, with prices; and those of this machine."""

import pytest

from builders.plan.offers import gpu_of_driver, parse_offers
from serve.engines.simulated.hardware import GPUS
from serve.errors import ConfigError

MIB = 2**20


def test_gpus_have_names_and_prices() -> None:
    offers = parse_offers("h100=2.5, L40S,RTX-PRO-6000", 1.0, None)
    assert [(offer.key, offer.dollars_per_hour) for offer in offers] == [
        ("h100", 2.5),
        ("l40s", 1.0),
        ("rtx-pro-6000", 1.0),
    ]
    assert parse_offers("gb200", None, None)[0].node_gpus == 4
    assert parse_offers("gb200", None, 8)[0].node_gpus == 8
    assert parse_offers("a100", None, None)[0].key == "a100-80gb"
    assert parse_offers("cpu", None, None)[0].unit == "CPU core"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("h1000", "'h1000' is not known; there are a100-80gb"),
        ("h100=cheap", "'cheap' in 'h100=cheap' is no price .*h100=2.50"),
        ("h100=0", "'0' in 'h100=0' is no price"),
        (",", "names no GPU"),
        ("cpu,h100", "plan them one by one"),
    ],
)
def test_mistakes_are_named(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_offers(text, None, None)


@pytest.mark.parametrize(
    ("name", "mib", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA A10", 23028, "a10"),
        ("NVIDIA L4", 23034, "l4"),
        ("NVIDIA L40S", 46068, "l40s"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
        ("NVIDIA H100 NVL", 95830, "h100-nvl"),
        ("NVIDIA H200", 143771, "h200"),
        ("NVIDIA B200", 183359, "b200"),
        ("NVIDIA GB200", 189471, "gb200"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", 32607, "rtx-5090"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "rtx-pro-6000"),
        ("Tesla T4", 15360, None),
        ("NVIDIA RTX A6000", 49140, None),
    ],
)
def test_the_gpus_of_a_machine_are_recognised(name: str, mib: int, key: str | None) -> None:
    assert gpu_of_driver(name, mib * MIB) == key


def test_datasheets_are_plausible() -> None:
    for key, gpu in GPUS.items():
        assert gpu.bf16_tflops <= gpu.fp8_tflops <= gpu.fp4_tflops, key
        assert gpu.memory_bytes == pytest.approx(gpu.memory_gb * 1e9, rel=0.1), key
        assert gpu.nvlink_gpus == 1 or gpu.link_gb_per_s >= 300, key
        has_fp8 = float(gpu.compute_capability) >= 8.9
        assert has_fp8 == (gpu.fp8_tflops > gpu.bf16_tflops), key
        assert (float(gpu.compute_capability) >= 10) == (gpu.fp4_tflops > gpu.fp8_tflops), key
