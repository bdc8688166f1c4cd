"""What a bundle requires of the nodes that load it. PURE."""

from packaging.version import Version

from builders.quantize.recipes import min_compute_capability
from builders.spec import BuildSpec
from serve.artifacts.manifest import BundleKind, Quantization, Requirements
from serve.artifacts.node_facts import NodeFacts

# The oldest GPUs with the arithmetic: FP8 from Ada on, NVFP4 from Blackwell on; TensorRT-LLM itself from Ampere on.
# Source: TensorRT-LLM 1.2, "Quantization", table of hardware support.
_OLDEST = "8.0"
_MIN_COMPUTE_CAPABILITY = {"FP8": "8.9", "W4A8_AWQ": "8.9", "NVFP4": "10.0", "NVFP4_AWQ": "10.0", "W4A16_NVFP4": "10.0"}
# What the transformers engine works with; the versions of the package's own dependencies.
_TRANSFORMERS = {"torch": ">=2.9", "transformers": ">=5.17,<6"}


def requirements(spec: BuildSpec, quantization: Quantization, node: NodeFacts) -> Requirements:
    """Return what nodes have to have.

    Args:
        spec: Of the build.
        quantization: How the bundle's numbers are kept.
        node: Where it was made, in the environment of its engine.
    """
    gpus = 0 if spec.target.accelerator is None else spec.parallel.world_size
    gpu = node.gpus[0] if gpus and node.gpus else None
    memory_bytes = gpu.memory_bytes if gpu is not None else 0
    if spec.kind is BundleKind.TRANSFORMERS_CHECKPOINT:
        return Requirements(gpus=gpus, gpu_memory_bytes=memory_bytes, libraries=_TRANSFORMERS)
    if spec.kind is BundleKind.TRTLLM_CHECKPOINT:
        # A source that was quantized before it came here is known by its algorithms only.
        algorithms = (quantization.algorithm, quantization.kv_cache_algorithm)
        capabilities = [_MIN_COMPUTE_CAPABILITY.get(name or "", _OLDEST) for name in algorithms]
        capabilities.append(min_compute_capability(spec.quantize) or _OLDEST)
        return Requirements(
            gpus=gpus,
            min_compute_capability=max(capabilities, key=_numbers) if gpus else None,
            gpu_memory_bytes=memory_bytes,
            libraries=_same_or_newer("tensorrt_llm", node),
        )
    # An engine runs on the GPU model and with the release that built it. Source: TensorRT, "Engine compatibility".
    return Requirements(
        gpus=gpus,
        gpu_name=gpu.name if gpu is not None else None,
        compute_capability=gpu.compute_capability if gpu is not None else None,
        gpu_memory_bytes=memory_bytes,
        min_driver=node.driver if gpus else None,
        machine=node.machine,
        libraries=_exactly("tensorrt_llm", node) | _exactly("tensorrt", node),
    )


def _exactly(name: str, node: NodeFacts) -> dict[str, str]:
    return {name: f"=={node.libraries[name]}"} if name in node.libraries else {}


def _same_or_newer(name: str, node: NodeFacts) -> dict[str, str]:
    """Of the same minor release or newer: what an older one lacks may be in the tuned settings."""
    if name not in node.libraries:
        return {}
    found = Version(node.libraries[name])
    return {name: f">={found.major}.{found.minor}.0.dev0" if found.is_prerelease else f">={found.major}.{found.minor}"}


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
