"""How close plans come to published facts: weights, keys and values, throughput; and to the simulator's percentiles.

    python -m benchmarks.plan_facts      # about a minute

Weights, keys and values have to be exact. Throughput is what the planner expects of an engine whose places are all
taken, by its own count of the memory and its closed formulas, not by simulation. The constants of the latency model
were fitted to some of these tables (see `serve.engines.simulated.roofline`); it has one set for each GPU generation.
"""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.latency_figures import BLACKWELL, HOPPER, LATENCY
from benchmarks.plan_figures import KV_BYTES, PARAMETERS, ROWS, STATIC, WEIGHT_BYTES, Fact, Row, Static
from benchmarks.report import Report
from builders.plan.candidates import Candidate
from builders.plan.choose import choose
from builders.plan.evaluate import Evaluation, evaluate, latency_of
from builders.plan.goal import Goal
from builders.plan.request import Offer, PlannedModel, PlanRequest
from builders.plan.simulate import simulate_plan
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.checkpoint import checkpoint_from_config
from serve.engines.simulated.hardware import GPUS, Precision
from serve.engines.simulated.known_models import CONFIGS, MODELS
from serve.engines.simulated.latency import StepShape
from serve.engines.simulated.split import Precisions, Split


@dataclass(frozen=True)
class Compared:
    """A published number beside ours."""

    group: str
    name: str
    published: float
    ours: float
    unit: str
    source: str

    @property
    def error(self) -> float:
        """Ours over the published one, minus one."""
        return self.ours / self.published - 1.0


def main() -> None:
    """Print the comparison."""
    report = Report("plan_facts", "python -m benchmarks.plan_facts")
    facts = [*_counted(), *_cache(), *_throughput(), *_static(), *_latency()]
    for group in dict.fromkeys(fact.group for fact in facts):
        errors = [fact.error for fact in facts if fact.group == group]
        exact = group in ("weights", "keys and values")
        report.add(f"{group}: figures", len(errors), "")
        report.add(f"{group}: median error", 100 * statistics.median(errors), "%")
        root = 100 * math.sqrt(statistics.mean(error**2 for error in errors))
        report.add(f"{group}: root mean square error", root, "%", "<= 1" if exact else "")
    report.add("published facts", len(facts), "", ">= 15")
    report.note("Published facts\n" + _table(facts))
    report.note(_simulated(report))
    report.note("Errors are ours over published, minus one. " + __doc__.strip().rpartition("\n\n")[2])
    report.note("\n".join(json.dumps(_as_json(fact)) for fact in facts))
    report.finish()


def _table(facts: list[Compared]) -> str:
    return "\n".join(
        f"{fact.group:<26} {fact.name:<66} {fact.published:>16,.6g} {fact.ours:>16,.6g} {fact.unit:<9} "
        f"{100 * fact.error:+7.1f}%  {fact.source}"
        for fact in facts
    )


def _as_json(fact: Compared) -> dict[str, str | float]:
    return {
        "name": f"{fact.group}: {fact.name}",
        "published": fact.published,
        "value": float(f"{fact.ours:.6g}"),
        "unit": fact.unit,
        "error_percent": round(100 * fact.error, 2),
        "source": fact.source,
    }


# Weights, keys and values


def _counted() -> Iterator[Compared]:
    for fact in PARAMETERS:
        shape = MODELS[fact.model]
        ours = shape.active_parameters if "visits" in fact.what else shape.parameters
        yield _compared("weights", fact, ours, "")
    for fact in WEIGHT_BYTES:
        checkpoint = checkpoint_from_config(CONFIGS[fact.model])
        yield _compared("weights", fact, Split().weight_bytes(checkpoint.shape, checkpoint.precisions).total, "bytes")
    for fact in KV_BYTES:
        yield _compared("keys and values", fact, MODELS[fact.model].kv_bytes_per_token("bf16"), "bytes")


def _compared(group: str, fact: Fact, ours: float, unit: str) -> Compared:
    return Compared(group, f"{fact.model}: {fact.what}", fact.published, ours, unit, fact.source)


def _cache() -> Iterator[Compared]:
    """Compare with a log of TensorRT-LLM: Qwen3-Reranker-0.6B, which has the shape of Qwen3-0.6B, on one H100."""
    found = _evaluate("qwen3-0.6b", "h100", Split(), Precisions(), Goal(), "")
    source = "log of TensorRT-LLM 1.x in a public deployment guide: 68.69 GiB, 643,136 tokens"
    yield Compared("KV cache", "qwen3-0.6b on H100: tokens", 643_136, found.sizes.memory.kv_tokens, "tokens", source)


# Throughput


def _throughput() -> Iterator[Compared]:
    for figure in [*HOPPER, *BLACKWELL]:
        split, precisions = Split(tensor=figure.tensor_parallel), Precisions(weights=figure.weights, kv_cache="fp8")
        ours = _output(figure.model, figure.gpu, split, precisions, figure.input_tokens, figure.output_tokens)
        layout = f"TP{figure.tensor_parallel}"
        name = f"{figure.model} {figure.gpu} {layout} {figure.weights} {figure.input_tokens}/{figure.output_tokens}"
        kind = "Hopper" if figure in HOPPER else "B200"
        if ours:
            yield Compared(
                f"1.0, {kind}, dense", name, figure.output_tokens_per_s, ours, "tokens/s", "TensorRT-LLM 1.0, overview"
            )
    for row in ROWS:
        yield from _of_row(row)


def _of_row(row: Row) -> Iterator[Compared]:
    split = Split(
        tensor=row.tensor,
        pipeline=row.pipeline,
        expert=row.tensor if row.data_parallel else None,
        attention_dp=row.data_parallel,
    )
    precisions = Precisions(weights=row.weights, attention=row.attention, kv_cache=row.kv_cache)
    for (input_tokens, output_tokens), published in zip(row.pairs, row.cells, strict=True):
        if published is None:
            continue
        ours = _output(row.model, row.gpu, split, precisions, input_tokens, output_tokens)
        ours /= split.world_size if row.per_gpu else 1
        layout = f"{'DEP' if row.data_parallel else 'TP'}{row.tensor}" + (
            f" PP{row.pipeline}" if row.pipeline > 1 else ""
        )
        name = f"{row.model} {row.gpu} {layout} {row.weights} {input_tokens}/{output_tokens}"
        release = "1.2" if row.per_gpu else "1.0"
        if ours:
            yield Compared(row.group, name, published, ours, "tokens/s", f"TensorRT-LLM {release}, overview")


def _output(model: str, gpu: str, split: Split, precisions: Precisions, input_tokens: int, output_tokens: int) -> float:
    goal = Goal(input_tokens=input_tokens, output_tokens=output_tokens, length_deviation=0.0)
    evaluation = _evaluate(model, gpu, split, precisions, goal, "")
    return 0.0 if evaluation.most is None else evaluation.most.rate_per_s * output_tokens


def _evaluate(model: str, gpu: str, split: Split, precisions: Precisions, goal: Goal, location: str) -> Evaluation:
    offer = Offer(gpu, GPUS[gpu], None, max(8, GPUS[gpu].node_gpus))
    request = PlanRequest(PlannedModel(model, location, MODELS[model], precisions, True), goal, (offer,))
    candidate = Candidate(offer, BundleKind.TRTLLM_CHECKPOINT, "none", "auto", precisions, split)
    return evaluate(request, candidate)


def _static() -> Iterator[Compared]:
    for line in STATIC:
        kv_cache: Precision = "fp8" if line.weights == "fp8" else "bf16"
        ours = _static_output(line, Precisions(weights=line.weights, kv_cache=kv_cache)) / line.tensor
        lengths = f"{line.input_tokens}/{line.output_tokens}"
        name = f"{line.model} {line.gpu} TP{line.tensor} {line.weights} batch {line.batch} {lengths}"
        group = f"0.6.1, {line.gpu}, static"
        yield Compared(group, name, line.tokens_per_s, ours, "tokens/s", "TensorRT-LLM 0.6.1, performance.md")


def _static_output(line: Static, precisions: Precisions) -> float:
    """Return the output of a batch whose prompts are computed at once, and whose outputs end at once."""
    offer = Offer(line.gpu, GPUS[line.gpu])
    request = PlanRequest(PlannedModel(line.model, None, MODELS[line.model], precisions, True), Goal(), (offer,))
    split = Split(tensor=line.tensor)
    latency = latency_of(request, Candidate(offer, BundleKind.TRTLLM_CHECKPOINT, "none", "auto", precisions, split))
    batch, prompt, output = line.batch, line.input_tokens, line.output_tokens
    prompts_s = latency.step_s(StepShape(batch * prompt, batch * prompt * (prompt + 1) / 2, batch))
    steps = [latency.step_s(StepShape(0, 0.0, 0, batch, batch * (prompt + n))) for n in (1, output)]
    return batch * output / (prompts_s + output * statistics.mean(steps))


def _latency() -> Iterator[Compared]:
    source = "NIM for LLMs benchmarking guide, Llama-3.3-70b-instruct 1.8.0"
    for figure in LATENCY:
        goal = Goal(input_tokens=figure.input_tokens, output_tokens=figure.output_tokens, length_deviation=0.0)
        precisions = Precisions(weights="fp8", kv_cache="fp8")
        load = _evaluate(figure.model, figure.gpu, Split(tensor=figure.tensor_parallel), precisions, goal, "").load
        # So many clients that each wait for their answer: one of them is in its prompt now and then.
        state = load.idle if figure.concurrency == 1 else load.state(float(figure.concurrency))
        name = f"{figure.model} {figure.gpu} TP{figure.tensor_parallel} {figure.input_tokens}/{figure.output_tokens}"
        name += f", {figure.concurrency} clients"
        yield Compared("latency: TPOT", name, figure.itl_s * 1e3, state.tpot_mean_s * 1e3, "ms", source)
        if figure.concurrency == 1:
            yield Compared("latency: TTFT", name, figure.ttft_s * 1e3, state.ttft_mean_s * 1e3, "ms", source)


# Percentiles


def _simulated(report: Report) -> str:
    """Hold plans of one replica against the simulator, which knows none of their formulas."""
    lines = []
    errors: dict[str, list[float]] = {"TTFT p95": [], "TPOT p95": [], "TTFT mean": [], "TPOT mean": []}
    for model, gpu, rate, goal in _CASES:
        offer = Offer(gpu, GPUS[gpu], None, GPUS[gpu].node_gpus)
        request = PlanRequest(PlannedModel(model, None, MODELS[model]), goal.changed(rate_per_s=rate), (offer,))
        choice = choose(request)
        if choice is None:
            continue
        # The simulator has the prompts' passage through pipeline stages overlap with that of others.
        best = next(e for e in choice.ranked if e.replicas == 1 and e.candidate.split.pipeline == 1)
        found, state = simulate_plan(request, best, requests=3000), best.state
        assert state is not None
        pairs = {
            "TTFT p95": (state.ttft_s, found.ttft_s),
            "TPOT p95": (state.tpot_s, found.tpot_s),
            "TTFT mean": (state.ttft_mean_s, found.ttft_mean_s),
            "TPOT mean": (state.tpot_mean_s, found.tpot_mean_s),
        }
        for name, (ours, simulated) in pairs.items():
            errors[name].append(ours / simulated - 1.0)
        times = "  ".join(f"{name} {1e3 * ours:7.1f} / {1e3 * seen:7.1f} ms" for name, (ours, seen) in pairs.items())
        load = f"{rate:g}/s, {goal.input_tokens}/{goal.output_tokens}"
        lines.append(f"{model:<16} {gpu:<13} {best.candidate.layout:<12} {load:<18} {times}")
    for name, values in errors.items():
        report.add(f"planned over simulated {name}: median", 100 * statistics.median(values), "%")
        report.add(f"planned over simulated {name}: largest", 100 * max(values, key=abs), "%")
    return (
        "Planned / simulated, one replica, random arrivals, lengths with a deviation of half their mean\n"
        + "\n".join(lines)
    )


_CHAT = Goal(ttft_ms=500, tpot_ms=50, input_tokens=1000, output_tokens=200)
_CASES = (
    ("llama-3.1-8b", "h100", 5.0, _CHAT),
    ("llama-3.1-8b", "h100", 20.0, _CHAT),
    ("llama-3.1-8b", "h100", 30.0, _CHAT),
    ("llama-3.1-8b", "h100", 30.0, _CHAT.changed(cached_share=0.5)),
    ("llama-3.1-8b", "l40s", 8.0, _CHAT),
    ("llama-3.3-70b", "h100", 5.0, _CHAT),
    ("llama-3.3-70b", "h200", 3.0, _CHAT.changed(input_tokens=4000, ttft_ms=2000.0)),
    ("llama-3.3-70b", "rtx-pro-6000", 1.0, _CHAT.changed(input_tokens=2000, output_tokens=500, ttft_ms=2000.0)),
    ("qwen3-30b-a3b", "h100", 15.0, _CHAT.changed(output_tokens=500)),
    ("mixtral-8x7b", "b200", 20.0, _CHAT),
)


if __name__ == "__main__":
    main()
