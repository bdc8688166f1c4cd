"""The command line of trtllm-build that says the same as a build's decisions, for people who know it. PURE.

It starts from a TensorRT-LLM checkpoint, where the build starts from a Hugging Face one if it can.
"""

import shlex
from collections.abc import Iterable

from builders.compile.decisions import Decision

# Flags of 1.2.1 for fields of BuildConfig; switches are there or not.
_VALUES = (
    "max_batch_size", "max_num_tokens", "max_seq_len", "max_input_len", "max_beam_width", "opt_num_tokens",
    "profiling_verbosity", "input_timing_cache", "output_timing_cache",
)  # fmt: skip
_SWITCHES = {
    "gather_context_logits": "--gather_context_logits",
    "gather_generation_logits": "--gather_generation_logits",
    "weight_streaming": "--weight_streaming",
    "weight_sparsity": "--weight_sparsity",
    "use_strip_plan": "--strip_plan",
    "enable_debug_output": "--enable_debug_output",
    "monitor_memory": "--monitor_memory",
    "dry_run": "--dry_run",
}
_PLUGINS = (
    "gpt_attention_plugin", "gemm_plugin", "moe_plugin", "nccl_plugin", "context_fmha", "remove_input_padding",
    "tokens_per_block", "use_paged_context_fmha", "use_fp8_context_fmha", "multiple_profiles", "streamingllm",
    "reduce_fusion", "user_buffer", "use_fused_mlp", "pp_reduce_scatter",
)  # fmt: skip


def trtllm_build_command(
    config: Iterable[Decision], plugins: Iterable[Decision], checkpoint: str, output: str, ranks: int
) -> str:
    """Return the command, one flag a line."""
    lines = [f"trtllm-build --checkpoint_dir {shlex.quote(checkpoint)}", f"--output_dir {shlex.quote(output)}"]
    lines += [f"--workers {ranks}"] if ranks > 1 else []
    for decision in config:
        if decision.is_left or decision.value is None:
            continue
        if decision.name in _VALUES:
            lines.append(f"--{decision.name} {shlex.quote(str(decision.value))}")
        elif decision.value is True and decision.name in _SWITCHES:
            lines.append(_SWITCHES[decision.name])
    for decision in plugins:
        if not decision.is_left and decision.name in _PLUGINS:
            lines.append(f"--{decision.name} {_plugin_value(decision)}")
    return " \\\n    ".join(lines)


def _plugin_value(decision: Decision) -> str:
    match decision.value:
        case bool() | None:
            return "enable" if decision.value else "disable"
        case value:
            return str(value)
