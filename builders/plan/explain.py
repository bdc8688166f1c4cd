"""explain: the arithmetic of a candidate, line by line: formula, numbers, result. PURE."""

from dataclasses import dataclass

from builders.plan.candidates import Candidate
from builders.plan.choose import output_tokens_per_s
from builders.plan.evaluate import Evaluation, latency_of
from builders.plan.goal import Goal
from builders.plan.load import GATEWAY_S, SteadyState
from builders.plan.memory import KV_FRACTION, TOKENS_PER_BLOCK, MemoryPlan
from builders.plan.request import PlanRequest
from builders.plan.sizes import STUTTER, groups
from serve.engines.simulated.hardware import BYTES_PER_WEIGHT
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.roofline import EFFICIENCIES

_GB = 1e9


@dataclass(frozen=True)
class Section:
    """Lines of one subject: (what, how, result)."""

    title: str
    lines: tuple[tuple[str, str, str], ...]


def explain(request: PlanRequest, evaluation: Evaluation) -> list[Section]:
    """Return the arithmetic of a candidate that can do it."""
    shape, candidate = request.model.shape, evaluation.candidate
    state, memory = evaluation.state, evaluation.sizes.memory
    assert state is not None
    return [
        Section("Model", tuple(_model(shape, candidate))),
        Section(_memory_title(candidate, memory), tuple(_memory(shape, candidate, memory))),
        Section("Keys and values", tuple(_cache(shape, evaluation, request.goal))),
        Section("Steps", tuple(_steps(request, evaluation, state))),
        Section("Load", tuple(_load(request.goal, evaluation, state))),
        *([Section("Replicas", tuple(_replicas(request, evaluation)))]),
    ]


def _model(shape: ModelShape, candidate: Candidate) -> list[tuple[str, str, str]]:
    attention = _attention_formula(shape)
    lines = [("attention, a layer", attention, _millions(shape.attention_weights))]
    matrices = 3 if shape.gated else 2
    dense = shape.layers - shape.moe_layers
    if dense:
        width = shape.dense_intermediate or shape.intermediate
        lines.append(("network, a layer", f"{matrices} x {shape.hidden} x {width}", _millions(shape.dense_weights)))
    if shape.moe_layers:
        formula = f"{shape.experts} x {matrices} x {shape.hidden} x {shape.intermediate}"
        lines.append(("experts, a layer", formula, _millions(shape.experts * shape.expert_weights)))
    if shape.shared_weights:
        formula = f"{matrices} x {shape.hidden} x {shape.shared_intermediate}"
        lines.append(("shared expert, a layer", formula, _millions(shape.shared_weights)))
    copies = "1, shared" if shape.tied_embeddings else "2"
    lines += [
        ("embeddings and head", f"{copies} x {shape.vocab} x {shape.hidden}", _millions(shape.embedding_weights)),
        ("all weights", f"{shape.layers} layers, with norms and biases", f"{shape.parameters:,}"),
    ]
    if shape.moe_layers:
        visits = f"{shape.experts_per_token} of {shape.experts} experts"
        lines.append(("weights that a token visits", visits, f"{shape.active_parameters:,}"))
    weight = BYTES_PER_WEIGHT[candidate.precisions.weights]
    return [*lines, ("bytes of a quantized weight", f"{candidate.precisions.weights}, with its scale", f"{weight:g}")]


def _attention_formula(shape: ModelShape) -> str:
    if shape.latent is None:
        return f"{shape.hidden} x {shape.head_dim} x (2 x {shape.heads} + 2 x {shape.kv_heads})"
    latent = shape.latent
    plain = shape.head_dim - latent.rope_dim
    queries = (
        f"{shape.hidden} x {shape.heads} x {shape.head_dim}"
        if latent.query_rank is None
        else f"({shape.hidden} + {shape.heads} x {shape.head_dim}) x {latent.query_rank}"
    )
    keys = f"{shape.hidden} x ({latent.kv_rank} + {latent.rope_dim})"
    values = f"{latent.kv_rank} x {shape.heads} x ({plain} + {shape.values})"
    return f"{queries} + {keys} + {values} + {shape.heads} x {shape.values} x {shape.hidden}"


def _memory_title(candidate: Candidate, memory: MemoryPlan) -> str:
    stage = f", stage {memory.stage + 1} of {candidate.split.pipeline}" if candidate.split.pipeline > 1 else ""
    return f"Memory of each {candidate.offer.gpu.name}{stage}, {candidate.layout}"


def _memory(shape: ModelShape, candidate: Candidate, memory: MemoryPlan) -> list[tuple[str, str, str]]:
    weights, split = memory.weights, candidate.split
    parts = {
        "attention": weights.attention,
        "dense networks": weights.dense,
        "experts": weights.experts,
        "shared experts": weights.shared,
        "routers": weights.router,
        "embeddings": weights.embedding,
        "head": weights.head,
        "norms and biases": weights.vectors,
    }
    detail = " + ".join(f"{name} {size / _GB:.2f}" for name, size in parts.items() if size)
    first, end = split.layers_of(shape, memory.stage)
    layers = f"{end - first} layers, / {split.tensor}" if split.tensor > 1 else f"{end - first} layers"
    return [
        ("memory", "as the driver reports it", _size(memory.total)),
        (f"- weights ({layers})", detail, _size(memory.weights.total)),
        ("- activations", "of the largest step", _size(memory.activations)),
        ("- logits", f"of the largest batch, x {shape.vocab} x 6 bytes", _size(memory.logits)),
        ("- CUDA, libraries, graphs, NCCL", "estimated", _size(memory.runtime)),
        ("= free once loaded", "", _size(memory.free)),
        ("KV cache", f"{KV_FRACTION:.0%} of it", _size(memory.kv_cache)),
    ]


def _cache(shape: ModelShape, evaluation: Evaluation, goal: Goal) -> list[tuple[str, str, str]]:
    candidate, memory, sizes = evaluation.candidate, evaluation.sizes.memory, evaluation.sizes
    precision = candidate.precisions.kv_cache
    width = BYTES_PER_WEIGHT[precision]
    first, end = candidate.split.layers_of(shape, memory.stage)
    if shape.latent is not None:
        numbers = f"({shape.latent.kv_rank} + {shape.latent.rope_dim})"
    else:
        numbers = f"{shape.kv_heads} x ({shape.head_dim} + {shape.values})"
    copies = candidate.split.kv_copies(shape)
    share = (
        ""
        if candidate.split.attention_dp or candidate.split.tensor == 1
        else f" x {copies:g} / {candidate.split.tensor}"
    )
    blocks = -(-goal.sequence_tokens // TOKENS_PER_BLOCK)
    lines = [
        (
            "bytes of a token",
            f"{end - first} layers x {numbers} x {width:g} ({precision}){share}",
            f"{memory.kv_bytes_per_token:,.0f}",
        ),
        ("tokens that fit", _per_group(candidate, "cache / bytes of a token"), f"{memory.kv_tokens:,}"),
        (
            "bytes of a sequence",
            f"{goal.input_tokens} + {goal.output_tokens} tokens in {blocks} blocks of {TOKENS_PER_BLOCK}",
            f"{memory.kv_bytes_per_sequence:,.0f}",
        ),
        ("sequences that fit", _per_group(candidate, "cache / bytes of a sequence"), f"{memory.sequences:,}"),
        ("longest sequence", "alone, up to the model's context", f"{evaluation.longest:,} tokens"),
    ]
    if (pattern := shape.window_pattern(shape.context_tokens)) is not None:
        windows = f"{shape.windowed_layers} of {shape.layers} layers keep the last {shape.window_tokens} tokens"
        lines.insert(1, ("windows", windows, f"every {len(pattern)} layers"))
    together = groups(candidate)
    lines += [
        (
            "max_batch_size",
            f"for {sizes.limits.sequences} sequences, / {together}" if together > 1 else "sequences of a step",
            str(sizes.max_batch_size),
        ),
        ("max_num_tokens", _step_reason(goal), str(sizes.max_num_tokens)),
    ]
    return lines


def _step_reason(goal: Goal) -> str:
    return (
        "the usual"
        if goal.tpot_ms is None
        else f"no step delays a stream by more than {STUTTER:g} x {goal.tpot_ms:g} ms"
    )


def _per_group(candidate: Candidate, formula: str) -> str:
    return f"{formula}, x {candidate.split.tensor} ranks" if candidate.split.attention_dp else formula


def _steps(request: PlanRequest, evaluation: Evaluation, state: SteadyState) -> list[tuple[str, str, str]]:
    candidate, goal, shape = evaluation.candidate, request.goal, request.model.shape
    gpu, split = candidate.offer.gpu, candidate.split
    share = EFFICIENCIES[gpu.generation]
    latency = latency_of(request, candidate)
    batch, context = max(state.batch, 1.0), evaluation.load.context
    parts = latency.parts(batch, context)
    layers = shape.active_parameters - shape.embedding_weights
    bandwidth = f"{gpu.memory_gb_per_s:g} GB/s x {share.memory:g} x {split.tensor}"
    return [
        ("reading weights", f"active bytes / ({bandwidth})", _time(parts.weights_s)),
        (
            "reading keys and values",
            f"{batch:.1f} sequences x {context:.0f} tokens / ({bandwidth})",
            _time(parts.keys_s),
        ),
        ("products of these tokens", f"if that is more: / ({_rate(candidate)})", _time(parts.products_s)),
        ("fixed and communication", _fixed(shape, candidate), _time(parts.fixed_s)),
        ("T0: a step without prompts", f"of {batch:.1f} sequences", _time(state.decode_s)),
        (
            "S: what a prompt adds",
            f"{goal.computed_tokens} tokens x 2 x {layers / 1e9:.2f}e9 / ({_rate(candidate)}), mostly",
            _time(state.prompt_s),
        ),
    ]


def _rate(candidate: Candidate) -> str:
    gpu = candidate.offer.gpu
    share = EFFICIENCIES[gpu.generation].compute
    ranks = candidate.split.world_size
    return f"{gpu.tflops(candidate.precisions.weights):g} TFLOPS x {share:g} x {ranks}"


def _fixed(shape: ModelShape, candidate: Candidate) -> str:
    share, split = EFFICIENCIES[candidate.offer.gpu.generation], candidate.split
    text = f"{share.step_overhead_s * 1e3:g} ms"
    text += f" x {split.pipeline} stages" if split.pipeline > 1 else ""
    if split.tensor > 1:
        reduces = shape.layers if split.attention_dp else 2 * shape.layers
        text += f" + {reduces} all-reduces x {share.all_reduce_s * 1e6:g} us, and their bytes"
    return text


def _load(goal: Goal, evaluation: Evaluation, state: SteadyState) -> list[tuple[str, str, str]]:
    steps, most = goal.output_tokens - 1, evaluation.most
    assert most is not None
    percent = f"p{goal.percentile:g}"
    return [
        (
            "B: sequences in the batch",
            f"rate x {steps} steps x T = {state.rate_per_s:.2f} x {steps} x {state.step_s * 1e3:.2f} ms",
            f"{state.batch:.1f}",
        ),
        (
            "T: a step with its prompts",
            f"T0 / (1 - rate x S) = {state.decode_s * 1e3:.2f} ms / (1 - {state.prefill_share:.3f})",
            _time(state.step_s),
        ),
        ("mean TPOT", "T", _time(state.tpot_mean_s)),
        (f"TPOT {percent}", "mean + deviation of prompts and batch", _bounded(state.tpot_s, goal.tpot_ms)),
        (
            "mean TTFT",
            f"rest of a step, other prompts, own step, S; {GATEWAY_S * 1e3:g} ms of the gateway",
            _time(state.ttft_mean_s),
        ),
        (f"TTFT {percent}", "gated queue, gamma distribution", _bounded(state.ttft_s, goal.ttft_ms)),
        ("most that a replica can carry", f"within the limits, {most.batch:.0f} sequences", f"{most.rate_per_s:.2f}/s"),
    ]


def _replicas(request: PlanRequest, evaluation: Evaluation) -> list[tuple[str, str, str]]:
    goal, most, state = request.goal, evaluation.most, evaluation.state
    assert most is not None
    assert state is not None
    world = evaluation.candidate.split.world_size
    lines = []
    if goal.rate_per_s is not None:
        formula = f"{goal.rate_per_s:g}/s / ({1.0 - goal.headroom:g} x {most.rate_per_s:.2f}/s), rounded up"
        lines.append(("replicas", formula, str(evaluation.replicas)))
    lines.append(("GPUs", f"{evaluation.replicas} x {world} of each replica", str(evaluation.gpus)))
    output = output_tokens_per_s(evaluation, request)
    lines.append(
        (
            "output",
            f"{evaluation.replicas} x {state.rate_per_s:.2f}/s x {goal.output_tokens}"
            if state.rate_per_s
            else "one request after the other",
            f"{output:,.0f} tokens/s",
        )
    )
    if (dollars := evaluation.dollars_per_hour) is not None:
        lines.append(
            ("cost", f"{evaluation.gpus} GPUs x ${evaluation.candidate.offer.dollars_per_hour:g}", f"${dollars:,.2f}/h")
        )
        lines.append(
            (
                "of a million output tokens",
                f"${dollars:,.2f} / {output * 3600:,.0f} x 1e6",
                f"${dollars / output / 3600 * 1e6:.3f}",
            )
        )
    return lines


def _bounded(value_s: float, limit_ms: float | None) -> str:
    return _time(value_s) if limit_ms is None else f"{_time(value_s)} <= {limit_ms:g} ms"


def _time(value_s: float) -> str:
    return f"{value_s * 1e3:.2f} ms"


def _size(size: float) -> str:
    return f"{size / _GB:.2f} GB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
