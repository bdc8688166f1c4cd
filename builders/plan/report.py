"""What `raytrt plan` prints: a table of candidates, the arithmetic of the chosen one, refusals; or one JSON object."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from builders.plan.choose import Choice, output_tokens_per_s, tokens_per_gpu_hour
from builders.plan.evaluate import Evaluation
from builders.plan.explain import explain
from builders.plan.goal import Goal
from builders.plan.refusal import Refusal
from builders.plan.request import PlanRequest
from builders.plan.simulate import Simulated


def print_choice(
    console: Console, choice: Choice, *, top: int, explained: bool, simulated: dict[int, Simulated]
) -> None:
    """Print what was asked, the best candidates, and the chosen one."""
    request, best = choice.request, choice.best
    console.print(
        f"[bold]{escape(request.model.name)}[/], {_weights(request.model.shape.parameters)} weights; "
        f"{escape(describe_goal(request))}"
    )
    console.print(_table(choice, top, simulated))
    console.print(
        f"[dim]The best layout of each GPU and quantization, of {len(choice.ranked)} that can do it and "
        f"{len(choice.refused)} that cannot. Times at the {request.goal.percentile:g}th percentile.[/]"
    )
    console.print()
    console.print(f"[bold green]chosen:[/] {escape(describe(best, request))}")
    if explained:
        for section in explain(request, best):
            console.print()
            console.print(_section_table(section.title, section.lines))


def print_refusal(console: Console, refusal: Refusal) -> None:
    """Print why there is no plan, and what would make one possible."""
    console.print(
        f"[bold red]There is no plan[/] for {escape(refusal.request.model.name)}; "
        f"{escape(describe_goal(refusal.request))}"
    )
    for reason in refusal.reasons:
        console.print(f"  - {escape(reason)}")
    if refusal.remedies:
        console.print("Each of these makes it possible:")
    for remedy in refusal.remedies:
        console.print(f"  + {escape(remedy.text)}")


def describe_goal(request: PlanRequest) -> str:
    """Return the goal in a line."""
    goal = request.goal
    parts = [f"{goal.input_tokens} + {goal.output_tokens} tokens"]
    parts += [f"{goal.cached_share:.0%} of prompts cached"] if goal.cached_share else []
    parts += [f"{goal.rate_per_s:g} requests/s"] if goal.rate_per_s is not None else []
    parts += [f"TTFT p{goal.percentile:g} <= {goal.ttft_ms:g} ms"] if goal.ttft_ms is not None else []
    parts += [f"TPOT p{goal.percentile:g} <= {goal.tpot_ms:g} ms"] if goal.tpot_ms is not None else []
    parts += [f"at most {goal.max_gpus} GPUs"] if goal.max_gpus is not None else []
    return f"{', '.join(parts)}; objective: {request.objective.value}"


def describe(evaluation: Evaluation, request: PlanRequest) -> str:
    """Return a candidate in a sentence."""
    candidate, state, sizes = evaluation.candidate, evaluation.state, evaluation.sizes
    assert state is not None
    quantized = _quantization(evaluation)
    cost = evaluation.dollars_per_hour
    price = "" if cost is None else f", ${cost:,.2f}/h"
    return (
        f"{evaluation.replicas} x {candidate.layout} on {candidate.offer.gpu.name}, weights {quantized}: "
        f"{_count(evaluation.gpus, candidate.offer.unit)}{price}; max_batch_size {sizes.max_batch_size}, "
        f"max_num_tokens {sizes.max_num_tokens}, KV cache of {sizes.memory.kv_tokens:,} tokens; "
        f"TTFT {state.ttft_s * 1e3:.0f} ms, TPOT {state.tpot_s * 1e3:.1f} ms, "
        f"{output_tokens_per_s(evaluation, request):,.0f} output tokens/s"
    )


def _weights(count: int) -> str:
    return f"{count / 1e9:.2f}e9" if count >= 1e9 else f"{count / 1e6:.1f}e6"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _quantization(evaluation: Evaluation) -> str:
    candidate = evaluation.candidate
    if candidate.recipe == "none":
        return f"as they are ({candidate.precisions.weights})"
    return candidate.recipe + ("" if candidate.kv_cache == "auto" else f", KV cache {candidate.kv_cache}")


def _table(choice: Choice, top: int, simulated: dict[int, Simulated]) -> Table:
    shown = choice.shown(top)
    priced = any(evaluation.dollars_per_hour is not None for evaluation in shown)
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for name in ("GPU", "layout", "weights", "KV"):
        table.add_column(name, no_wrap=True)
    numbers = ["replicas", "GPUs", "batch", "TTFT ms", "TPOT ms", "tokens/s", "most/GPU"]
    numbers += ["$/h", "$/1M tokens"] if priced else []
    numbers += ["sim. TTFT", "sim. TPOT"] if simulated else []
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for number, evaluation in enumerate(shown):
        table.add_row(*_row(choice.request, evaluation, priced, simulated, number), style="bold" if number == 0 else "")
    return table


def _row(
    request: PlanRequest, evaluation: Evaluation, priced: bool, simulated: dict[int, Simulated], number: int
) -> list[str]:
    candidate, state = evaluation.candidate, evaluation.state
    assert state is not None
    tokens = output_tokens_per_s(evaluation, request)
    row = [
        candidate.offer.key,
        candidate.layout,
        candidate.precisions.weights if candidate.recipe == "none" else candidate.recipe,
        candidate.precisions.kv_cache,
        str(evaluation.replicas),
        str(evaluation.gpus),
        f"{state.batch:.0f} of {evaluation.sizes.limits.sequences}",
        f"{state.ttft_s * 1e3:.0f}",
        f"{state.tpot_s * 1e3:.1f}",
        f"{tokens:,.0f}",
        f"{tokens_per_gpu_hour(evaluation) / 3600:,.0f}",
    ]
    cost = evaluation.dollars_per_hour
    if priced:
        row += ["", ""] if cost is None else [f"{cost:,.2f}", f"{cost / tokens / 3600 * 1e6:.3f}"]
    if simulated:
        found = simulated.get(number)
        row += ["", ""] if found is None else [f"{found.ttft_s * 1e3:.0f}", f"{found.tpot_s * 1e3:.1f}"]
    return row


def _section_table(title: str, lines: tuple[tuple[str, str, str], ...]) -> Table:
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False
    )
    table.add_column(no_wrap=True, min_width=32)
    table.add_column(style="dim", overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(escape(part) for part in line))
    return table


# For machines


def choice_to_json(choice: Choice, top: int, simulated: dict[int, Simulated]) -> dict[str, Any]:
    """Return a plan as JSON."""
    request = choice.request
    candidates = [evaluation_to_json(evaluation, request) for evaluation in choice.shown(top)]
    for number, found in simulated.items():
        candidates[number]["simulated"] = {
            "requests": found.requests,
            "ttft_ms": found.ttft_s * 1e3,
            "tpot_ms": found.tpot_s * 1e3,
            "met": found.met,
        }
    return {
        "feasible": True,
        **_head(request),
        "candidates": candidates,
        "explained": {
            section.title: [{"what": what, "how": how, "result": result} for what, how, result in section.lines]
            for section in explain(request, choice.best)
        },
    }


def refusal_to_json(refusal: Refusal) -> dict[str, Any]:
    """Return a refusal as JSON."""
    return {
        "feasible": False,
        **_head(refusal.request),
        "reasons": list(refusal.reasons),
        "remedies": [
            {
                "text": remedy.text,
                "goal": goal_to_json(remedy.request.goal),
                "gpus": [o.key for o in remedy.request.offers],
            }
            for remedy in refusal.remedies
        ],
    }


def goal_to_json(goal: Goal) -> dict[str, Any]:
    """Return a goal as JSON, as a goal's file has it."""
    return goal.model_dump(mode="json")


def evaluation_to_json(evaluation: Evaluation, request: PlanRequest) -> dict[str, Any]:
    """Return a candidate as JSON."""
    candidate, state, sizes = evaluation.candidate, evaluation.state, evaluation.sizes
    assert state is not None
    tokens = output_tokens_per_s(evaluation, request)
    cost = evaluation.dollars_per_hour
    return {
        "gpu": candidate.offer.key,
        "quantize": {"recipe": candidate.recipe, "kv_cache": candidate.kv_cache},
        "parallel": candidate.split.model_dump(exclude_none=True),
        "replicas": evaluation.replicas,
        "gpus": evaluation.gpus,
        "max_batch_size": sizes.max_batch_size,
        "max_num_tokens": sizes.max_num_tokens,
        "kv_tokens": sizes.memory.kv_tokens,
        "sequences": sizes.memory.sequences,
        "weights_gb_per_gpu": sizes.memory.weights.total / 1e9,
        "kv_cache_gb_per_gpu": sizes.memory.kv_cache / 1e9,
        "batch": state.batch,
        "ttft_ms": state.ttft_s * 1e3,
        "tpot_ms": state.tpot_s * 1e3,
        "requests_per_s": state.rate_per_s * evaluation.replicas,
        "output_tokens_per_s": tokens,
        "max_tokens_per_gpu_hour": tokens_per_gpu_hour(evaluation),
        "dollars_per_hour": cost,
        "dollars_per_1m_output_tokens": None if cost is None else cost / tokens / 3600 * 1e6,
    }


def _head(request: PlanRequest) -> dict[str, Any]:
    return {
        "model": request.model.name,
        "parameters": request.model.shape.parameters,
        "objective": request.objective.value,
        "goal": goal_to_json(request.goal),
    }
