"""RoutingSettings: which policy a model is routed by, with its parameters; and the policy made from them.

In a configuration file a policy is its name, or a section with `policy` and what differs from the defaults:

    routing: llm_d
    routing: {policy: dynamo, prefill_load_scale: 2.0}

The docstrings of the policies give formulas, sources and departures from them.
"""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter

from serve.core.routing.fairness import FairnessSettings
from serve.core.routing.policies.affinity import LoraAffinityPolicy, SessionAffinityPolicy
from serve.core.routing.policies.aibrix import AibrixPolicy
from serve.core.routing.policies.dynamo import DynamoPolicy
from serve.core.routing.policies.least_load import (
    LeastRequestsPolicy,
    LeastTokensPolicy,
    PowerOfTwoPolicy,
    RandomPolicy,
    RoundRobinPolicy,
)
from serve.core.routing.policies.llm_d import LlmdPolicy
from serve.core.routing.policies.lmetric import LmetricPolicy
from serve.core.routing.policies.longest_prefix import LongestPrefixPolicy
from serve.core.routing.policies.predictive import PredictivePolicy
from serve.core.routing.policies.ray_llm_prefix import RayLlmPrefixPolicy
from serve.core.routing.policies.sglang import SglangPolicy
from serve.core.routing.policies.trtllm_serve import TrtllmServePolicy
from serve.core.routing.policy import Policy
from serve.core.strict_model import StrictModel

HEADER = r"^[a-z0-9-]{1,64}$"  # as ASGI has them

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class RoutingSettings(StrictModel):
    """What the section of every policy may have. Its fields are not the policy's parameters."""

    max_index_blocks: PositiveInt = Field(
        default=4_000_000,
        description="KV blocks of all replicas that a gateway remembers at most, at up to 200 bytes each.",
    )
    session_header: str = Field(
        default="x-session-id",
        pattern=HEADER,
        description="Request header that names a session, whose requests would like one replica; without it, the "
        "field `prompt_cache_key` does.",
    )
    tenant_header: str = Field(
        default="x-tenant-id",
        pattern=HEADER,
        description="Request header that names the tenant, for counters and shares.",
    )
    priority_header: str = Field(
        default="x-raytrt-priority",
        pattern=HEADER,
        description="Request header that holds a priority, an integer of which lower ones are served first; without "
        "it, the field `priority` does.",
    )
    fairness: FairnessSettings = FairnessSettings()


class PredictiveSettings(RoutingSettings):
    """Ours: the least time for this request and for those that it disturbs."""

    policy: Literal["predictive", "auto"] = "auto"
    slowdown_weight: NonNegativeFloat = Field(
        default=0.05,
        description="What a second that one other stream stands still is worth, in seconds of this request's TTFT.",
    )
    backlog_weight: NonNegativeFloat = Field(
        default=0.1, description="By how much that grows for each second of the fleet's mean queue."
    )
    balance_weight: NonNegativeFloat = Field(
        default=0.5,
        description="Price of a replica that lately got twice its share, in prefill times of a prompt like this one.",
    )
    max_share: float = Field(
        default=1.25,
        gt=1.0,
        description="A replica that for long got more than this multiple of its share gets nothing, while others can.",
    )
    tolerance: Share = Field(
        default=0.02, description="Costs that differ by less than this share, or by 2 ms, count as equal."
    )
    patience: PositiveFloat = Field(
        default=4.0,
        description="An idle replica gets a request, whatever it holds, after this many times as many decisions as "
        "there are replicas; later, the more that costs.",
    )
    host_cost: Share = Field(default=0.15, description="Time to fetch a KV block from host memory, over computing it.")
    disk_cost: Share = Field(default=0.5, description="Time to fetch a KV block from disk, over computing it.")
    chunk_tokens: PositiveInt = Field(default=8192, description="Prompt tokens of one engine step, about.")


class PlainSettings(RoutingSettings):
    """Policies that have no parameters."""

    policy: Literal[
        "round_robin", "random", "power_of_two", "least_requests", "least_tokens", "longest_prefix", "lmetric"
    ]


class AffinitySettings(RoutingSettings):
    """When a home is too full for those that belong there."""

    overload_factor: float = Field(
        default=1.5, ge=1.0, description="A home with more than this times the mean number of requests is left (SGLang)"
    )
    overload_requests: NonNegativeInt = Field(
        default=4, description="... if it also has more than this many requests above the mean."
    )


class SessionAffinitySettings(AffinitySettings):
    """A session has one home: rendezvous hashing with bounded loads."""

    policy: Literal["session_affinity"]


class LoraAffinitySettings(AffinitySettings):
    """A LoRA adapter has a few homes."""

    policy: Literal["lora_affinity"]
    homes: PositiveInt = Field(default=2, description="Replicas that serve an adapter while none is overloaded.")


class DynamoSettings(RoutingSettings):
    """NVIDIA Dynamo's KV router; defaults of lib/kv-router, 2026."""

    policy: Literal["dynamo"]
    overlap_credit: Share = Field(default=1.0, description="What a hit in GPU memory is worth, in prefill blocks.")
    overlap_credit_decay: NonNegativeFloat = Field(
        default=0.0, description="How fast hits lose worth as the replica's queue grows above the shortest."
    )
    prefill_load_scale: NonNegativeFloat = Field(
        default=1.0, description="Decode blocks that a prefill block is worth; more favours TTFT, less TPOT."
    )
    host_hit_weight: Share = Field(default=0.75, description="What a hit in host memory is worth.")
    disk_hit_weight: Share = Field(default=0.25, description="What a hit on disk is worth.")
    active_request_weight: NonNegativeFloat = Field(default=0.0, description="Blocks that a request in hand costs.")
    temperature: NonNegativeFloat = Field(
        default=0.0, description="0: the lowest cost; above: drawn by softmax of -cost / (its range * temperature)."
    )


class LlmdSettings(RoutingSettings):
    """llm-d's endpoint picker; defaults of llm-d-router's chart and prefix-cache-affinity-filter, August 2026."""

    policy: Literal["llm_d"]
    prefix_weight: NonNegativeFloat = Field(default=3.0, description="Of the share of the prompt that is held.")
    queue_weight: NonNegativeFloat = Field(default=2.0, description="Of a short queue.")
    kv_weight: NonNegativeFloat = Field(default=2.0, description="Of free KV blocks.")
    affinity_threshold: Share = Field(
        default=0.8, description="Replicas that hold this share of the prompt are considered alone; 0: never."
    )
    max_ttft_penalty_s: NonNegativeFloat = Field(
        default=18.0, description="... unless they would be later with the first token by more; 0: always."
    )
    prefill_tokens_per_s: NonNegativeFloat = Field(
        default=15_928.0, description="Prefill rate by which that is estimated; 0: each replica's measured rate."
    )


class SglangSettings(RoutingSettings):
    """SGLang's gateway (smg), policy cache_aware; defaults of its command line, August 2026."""

    policy: Literal["sglang"]
    cache_threshold: Share = Field(default=0.3, description="Share of the prompt above which a match is followed.")
    balance_rel_threshold: NonNegativeFloat = Field(
        default=1.5, description="A match is not followed to a replica with more than this times the mean requests"
    )
    balance_abs_threshold: NonNegativeInt = Field(
        default=64, description="... and more than this many requests above the mean."
    )


class TrtllmServeSettings(RoutingSettings):
    """trtllm-serve's KvCacheAwareRouter; its default."""

    policy: Literal["trtllm_serve"]
    max_batch_size: PositiveInt = Field(default=64, description="Requests that weigh as much as a whole prompt held.")


class AibrixSettings(RoutingSettings):
    """AIBrix's prefix-cache router; defaults of August 2026."""

    policy: Literal["aibrix"]
    imbalance_requests: NonNegativeInt = Field(
        default=8, description="If the busiest has more requests above the idlest, only the idlest are considered."
    )
    deviation_factor: NonNegativeFloat = Field(
        default=1.0, description="Standard deviations above the mean number of requests up to which a match counts."
    )


class RayLlmPrefixSettings(RoutingSettings):
    """Ray Serve LLM's prefix-aware router; defaults of Ray 2.60."""

    policy: Literal["ray_llm_prefix"]
    match_rate_threshold: Share = Field(default=0.1, description="Share of the prompt from which a match is followed.")
    imbalanced_threshold: NonNegativeFloat = Field(
        default=float("inf"), description="Requests between the longest and the shortest queue that forbid it."
    )


class ServeRouterSettings(RoutingSettings):
    """No policy of ours: Ray Serve's own router, power of two choices by requests in hand. For comparison."""

    policy: Literal["serve"]


_AnySettings = (
    PredictiveSettings
    | PlainSettings
    | SessionAffinitySettings
    | LoraAffinitySettings
    | DynamoSettings
    | LlmdSettings
    | SglangSettings
    | TrtllmServeSettings
    | AibrixSettings
    | RayLlmPrefixSettings
)


def _section(value: Any) -> Any:
    if isinstance(value, str):
        value = {"policy": value}
    if not isinstance(value, dict):
        if isinstance(value, RoutingSettings):
            return value
        raise ValueError("give the name of a policy, or a section with `policy` and its parameters")
    section = {"policy": "auto", **value}
    name, known = section["policy"], (*POLICY_NAMES, "auto", "serve")
    if name not in known:
        close = get_close_matches(str(name), known, 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(f"there is no policy {name!r}{hint} There are {', '.join(known)}")
    return section


PolicySettings = Annotated[_AnySettings, Field(discriminator="policy"), BeforeValidator(_section)]

ModelRouting = Annotated[_AnySettings | ServeRouterSettings, Field(discriminator="policy"), BeforeValidator(_section)]

_ADAPTER: TypeAdapter[RoutingSettings] = TypeAdapter(PolicySettings)
_MAKERS: dict[str, Callable[..., Policy]] = {
    "predictive": PredictivePolicy,
    "round_robin": RoundRobinPolicy,
    "random": RandomPolicy,
    "power_of_two": PowerOfTwoPolicy,
    "least_requests": LeastRequestsPolicy,
    "least_tokens": LeastTokensPolicy,
    "longest_prefix": LongestPrefixPolicy,
    "session_affinity": SessionAffinityPolicy,
    "lora_affinity": LoraAffinityPolicy,
    "dynamo": DynamoPolicy,
    "llm_d": LlmdPolicy,
    "sglang": SglangPolicy,
    "trtllm_serve": TrtllmServePolicy,
    "aibrix": AibrixPolicy,
    "lmetric": LmetricPolicy,
    "ray_llm_prefix": RayLlmPrefixPolicy,
}

POLICY_NAMES: tuple[str, ...] = tuple(_MAKERS)


def parse_policy(section: Any) -> RoutingSettings:
    """Check a policy's name or section.

    Raises:
        pydantic.ValidationError: There is no such policy or parameter, or a value is out of range.
    """
    return _ADAPTER.validate_python(section)


def make_policy(settings: RoutingSettings) -> Policy:
    """Return the policy that settings describe; any of `PolicySettings`, as `parse_policy` returns it."""
    parameters = settings.model_dump(exclude=set(RoutingSettings.model_fields))
    name = parameters.pop("policy")
    return _MAKERS["predictive" if name == "auto" else name](**parameters)
