"""choose: the candidates of a request in order, the best first; or a refusal. PURE."""

from collections.abc import Callable
from dataclasses import dataclass

from builders.plan.candidates import candidates
from builders.plan.evaluate import Evaluation, evaluate
from builders.plan.goal import Objective
from builders.plan.load import SteadyState
from builders.plan.request import PlanRequest

# Of figures that are no whole numbers: closer than this is as good, and the less lossy quantization is preferred.
_AS_GOOD = 1.02


@dataclass(frozen=True)
class Choice:
    """Candidates that can do what the goal asks.

    Attributes:
        request: What was asked.
        ranked: The best of each GPU, quantization and layout, the chosen one first; not empty.
        refused: Those that cannot.
    """

    request: PlanRequest
    ranked: tuple[Evaluation, ...]
    refused: tuple[Evaluation, ...]

    def shown(self, top: int) -> list[Evaluation]:
        """Return the best layout of each GPU and quantization, `top` at most, in order."""
        best: dict[tuple[str, str, str], Evaluation] = {}
        for evaluation in self.ranked:
            candidate = evaluation.candidate
            best.setdefault((candidate.offer.key, candidate.recipe, candidate.kv_cache), evaluation)
        return list(best.values())[:top]

    @property
    def best(self) -> Evaluation:
        """The chosen one."""
        return self.ranked[0]


def choose(request: PlanRequest) -> Choice | None:
    """Judge all candidates; None: not one can do it."""
    judged = [evaluate(request, candidate) for candidate in candidates(request)]
    good = [evaluation for evaluation in judged if evaluation.obstacle is None]
    refused = tuple(evaluation for evaluation in judged if evaluation.obstacle is not None)
    return Choice(request, tuple(rank(good, request)), refused) if good else None


def rank(good: list[Evaluation], request: PlanRequest) -> list[Evaluation]:
    """Put candidates in order.

    The objective decides. Of those that are as good as the best of the rest, the one comes first that has the least
    lossy quantization, then the fewest GPUs, the simplest layout.
    """
    value = _VALUES[request.objective]
    left = sorted(good, key=lambda evaluation: value(evaluation))
    ranked = []
    while left:
        best = value(left[0])
        as_good = [evaluation for evaluation in left if value(evaluation) <= best * (_AS_GOOD if best > 0 else 1.0)]
        if best < 0:
            as_good = [evaluation for evaluation in left if value(evaluation) <= best / _AS_GOOD]
        chosen = min(as_good, key=_preference)
        left.remove(chosen)
        ranked.append(chosen)
    return ranked


def output_tokens_per_s(evaluation: Evaluation, request: PlanRequest) -> float:
    """Return the output of all replicas under the goal's load; of one request after the other, if there is none."""
    state, tokens = _state(evaluation), request.goal.output_tokens
    if not state.rate_per_s:
        return tokens / (state.ttft_mean_s + (tokens - 1) * state.tpot_mean_s)
    return state.rate_per_s * evaluation.replicas * tokens


def tokens_per_gpu_hour(evaluation: Evaluation) -> float:
    """Return what each GPU puts out at the highest load within the limits."""
    most = evaluation.most or _state(evaluation)
    per_request = evaluation.load.output_tokens
    return 3600.0 * most.rate_per_s * per_request / evaluation.candidate.split.world_size


def request_s(evaluation: Evaluation) -> float:
    """Return how long a request of mean length takes at the goal's percentile."""
    state = _state(evaluation)
    return state.ttft_s + (evaluation.load.output_tokens - 1) * state.tpot_s


def _state(evaluation: Evaluation) -> SteadyState:
    assert evaluation.state is not None  # whoever can do it has one
    return evaluation.state


def _tokens_value(evaluation: Evaluation) -> float:
    price = evaluation.candidate.offer.dollars_per_hour
    return -tokens_per_gpu_hour(evaluation) / (price or 1.0)


def _cost_value(evaluation: Evaluation) -> float:
    cost = evaluation.dollars_per_hour
    return float(evaluation.gpus) if cost is None else cost


_VALUES: dict[Objective, Callable[[Evaluation], float]] = {
    Objective.FEWEST_GPUS: lambda evaluation: float(evaluation.gpus),
    Objective.LOWEST_COST: _cost_value,
    Objective.LOWEST_LATENCY: request_s,
    Objective.MAX_TOKENS_PER_GPU_HOUR: _tokens_value,
}


def _preference(evaluation: Evaluation) -> tuple[float, ...]:
    split = evaluation.candidate.split
    complexity = split.pipeline + (split.experts_apart > 1) + split.attention_dp
    return (evaluation.candidate.lossiness, evaluation.gpus, complexity, request_s(evaluation))
