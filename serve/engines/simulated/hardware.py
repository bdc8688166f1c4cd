"""GPUs as their datasheets describe them, and the precisions that they compute in."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from serve.core.strict_model import StrictModel

# int8: weights and activations (SmoothQuant). int4: weights only (AWQ). fp4: NVFP4. mxfp4: as gpt-oss has its experts.
Precision = Literal["bf16", "fp8", "int8", "int4", "fp4", "mxfp4"]
Generation = Literal["ampere", "ada", "hopper", "blackwell", "rtx_blackwell", "cpu"]

BYTES_PER_WEIGHT: dict[Precision, float] = {
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.515625,  # 4 bits, and a 16-bit scale for each 128 of them
    "fp4": 0.5625,  # NVFP4: 4 bits, and an FP8 scale for each 16 of them
    "mxfp4": 0.53125,  # 4 bits, and an 8-bit exponent for each 32 of them
}


class GpuDatasheet(StrictModel):
    """One GPU. Dense rates: datasheets often print twice as much, with sparsity."""

    name: str = Field(description="What to call it in messages.")
    generation: Generation = Field(description="Decides what of the datasheet is reached, unless that is configured.")
    bf16_tflops: PositiveFloat = Field(description="Dense FP16/BF16 tensor rate, 1e12 operations a second.")
    fp8_tflops: PositiveFloat = Field(description="Dense FP8 tensor rate; the FP16 rate where there is no FP8.")
    fp4_tflops: PositiveFloat = Field(description="Dense FP4 tensor rate; the FP8 rate where there is no FP4.")
    int8_tops: PositiveFloat | None = Field(default=None, description="Dense INT8 tensor rate; None: the FP8 rate.")
    memory_gb: PositiveFloat = Field(description="Memory, 1e9 bytes.")
    memory_mib: PositiveInt | None = Field(
        default=None, description="Memory that the driver reports, 2**20 bytes; None: `memory_gb`."
    )
    memory_gb_per_s: PositiveFloat = Field(description="Memory bandwidth, 1e9 bytes a second.")
    link_gb_per_s: PositiveFloat = Field(description="Bandwidth to the other GPUs of the node, one way, 1e9 bytes/s.")
    nvlink_gpus: PositiveInt = Field(default=1, description="GPUs that NVLink joins; 1: there is none, PCIe does it.")
    node_gpus: PositiveInt = Field(default=8, description="GPUs that a node usually has.")
    compute_capability: str = Field(default="", pattern=r"^(\d+\.\d+)?$", description="For instance 9.0.")
    accelerator_type: str | None = Field(default=None, description="As Ray names it, if Ray knows it by itself.")

    @property
    def memory_bytes(self) -> float:
        """Memory that the driver reports."""
        return self.memory_gb * 1e9 if self.memory_mib is None else self.memory_mib * float(1 << 20)

    def tflops(self, precision: Precision) -> float:
        """Return the dense rate for a precision of weights."""
        match precision:
            case "bf16" | "int4":  # 4-bit weights are computed with 16-bit activations
                return self.bf16_tflops
            case "int8":
                return self.int8_tops or self.fp8_tflops
            case "fp8":
                return self.fp8_tflops
            case "mxfp4":  # with 8-bit activations where there is FP4, else with 16-bit ones
                return self.fp8_tflops if self.fp4_tflops > self.fp8_tflops else self.bf16_tflops
            case "fp4":
                return self.fp4_tflops


def _gpu(
    name: str,
    generation: Generation,
    rates: tuple[float, float, float],
    memory: tuple[float, int],
    bandwidth: float,
    link: float,
    nvlink_gpus: int,
    compute_capability: str,
    accelerator_type: str,
    node_gpus: int = 8,
    int8: float | None = None,
) -> GpuDatasheet:
    return GpuDatasheet(
        name=name,
        generation=generation,
        bf16_tflops=rates[0],
        fp8_tflops=rates[1],
        fp4_tflops=rates[2],
        int8_tops=int8,
        memory_gb=memory[0],
        memory_mib=memory[1],
        memory_gb_per_s=bandwidth,
        link_gb_per_s=link,
        nvlink_gpus=nvlink_gpus,
        node_gpus=node_gpus,
        compute_capability=compute_capability,
        accelerator_type=accelerator_type,
    )


# Sources: NVIDIA's product pages and datasheets, rates without sparsity, links half of the bidirectional figure.
# A100: "NVIDIA A100 Tensor Core GPU" (SXM). A10, L4, L40S: their datasheets (no NVLink: PCIe 4.0 x16). H100: "NVIDIA
# H100 Tensor Core GPU" (SXM), "NVIDIA H100 PCIe" and "NVIDIA H100 NVL" product briefs (bridges join two cards). H200:
# "NVIDIA H200 Tensor Core GPU" (SXM). B200: "NVIDIA DGX B200" (eight GPUs: 36 / 72 / 144 PFLOPS BF16 / FP8 / FP4 with
# sparsity, 64 TB/s HBM, 14.4 TB/s NVLink both ways). GB200: "NVIDIA GB200 NVL72" (72 GPUs of one NVLink domain, four a
# node). GeForce: "NVIDIA Ada GPU architecture" and "NVIDIA RTX Blackwell GPU architecture" (rates with FP32
# accumulation, which language models need; half of those with FP16). RTX 6000 Ada, RTX PRO 6000 Blackwell (server
# edition, PCIe 5.0 x16): their datasheets. Memory in MiB: what nvidia-smi shows with ECC as it is shipped. Names of
# accelerators: as Ray 2.60 finds them; it tells neither the sizes of an A100 nor the kinds of an H100 apart.
GPUS: dict[str, GpuDatasheet] = {
    "a100-80gb": _gpu("A100 80GB SXM", "ampere", (312, 312, 312), (80, 81920), 2039, 300, 8, "8.0", "A100", int8=624),
    "a100-40gb": _gpu("A100 40GB SXM", "ampere", (312, 312, 312), (40, 40960), 1555, 300, 8, "8.0", "A100", int8=624),
    "a10": _gpu("A10", "ampere", (125, 125, 125), (24, 23028), 600, 32, 1, "8.6", "A10", int8=250),
    "l4": _gpu("L4", "ada", (121, 242, 242), (24, 23034), 300, 32, 1, "8.9", "L4"),
    "l40s": _gpu("L40S", "ada", (362, 733, 733), (48, 46068), 864, 32, 1, "8.9", "L40S"),
    "h100": _gpu("H100 80GB SXM", "hopper", (989.5, 1979, 1979), (80, 81559), 3350, 450, 8, "9.0", "H100"),
    "h100-pcie": _gpu("H100 80GB PCIe", "hopper", (756, 1513, 1513), (80, 81559), 2000, 300, 2, "9.0", "H100"),
    "h100-nvl": _gpu("H100 94GB NVL", "hopper", (835.5, 1671, 1671), (94, 95830), 3938, 300, 2, "9.0", "H100"),
    "h200": _gpu("H200 141GB SXM", "hopper", (989.5, 1979, 1979), (141, 143771), 4800, 450, 8, "9.0", "H200"),
    "b200": _gpu("B200 180GB", "blackwell", (2250, 4500, 9000), (180, 183359), 8000, 900, 8, "10.0", "B200"),
    "gb200": _gpu(
        "GB200 NVL72", "blackwell", (2500, 5000, 10000), (186, 189471), 8000, 900, 72, "10.0", "GB200", node_gpus=4
    ),
    "rtx-4090": _gpu(
        "GeForce RTX 4090",
        "ada",
        (165.2, 330.3, 330.3),
        (24, 24564),
        1008,
        32,
        1,
        "8.9",
        "GeForce-RTX-4090",
        int8=660.6,
    ),
    "rtx-5090": _gpu(
        "GeForce RTX 5090",
        "rtx_blackwell",
        (209.5, 419, 1676),
        (32, 32607),
        1792,
        64,
        1,
        "12.0",
        "GeForce-RTX-5090",
        int8=838,
    ),
    "rtx-6000-ada": _gpu("RTX 6000 Ada", "ada", (364.2, 728.5, 728.5), (48, 46068), 960, 32, 1, "8.9", "RTX-6000"),
    "rtx-pro-6000": _gpu(
        "RTX PRO 6000 Blackwell",
        "rtx_blackwell",
        (503.8, 1007.6, 2015.2),
        (96, 97887),
        1597,
        64,
        1,
        "12.0",
        "RTX-PRO-6000",
    ),
}

# One core of a current x86 server, for what runs on machines without a GPU; rates of 32-bit numbers.
CPU_CORE = GpuDatasheet(
    name="CPU core",
    generation="cpu",
    bf16_tflops=0.08,
    fp8_tflops=0.08,
    fp4_tflops=0.08,
    memory_gb=8,
    memory_gb_per_s=10,
    link_gb_per_s=1,
    node_gpus=1,
)


def gpu_named(name: str) -> str | None:
    """Return the key in `GPUS` of what a person or Ray may call a GPU; None: none of them."""
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    by_ray: dict[str, str] = {}
    for key, gpu in GPUS.items():
        by_ray.setdefault((gpu.accelerator_type or key).lower(), key)
    starting = [key for key in GPUS if wanted and key.startswith(wanted)]
    found = wanted if wanted in GPUS else by_ray.get(wanted)
    return found or (starting[0] if starting else None)
