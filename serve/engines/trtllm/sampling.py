"""PURE: our sampling parameters -> keywords of TensorRT-LLM's `SamplingParams`, and what a line and backend cannot do.

What would be ignored silently is refused by name. Sources: the samplers' source and TensorRT-LLM#9442 (penalties of
the TorchSampler, until PR 16485), PR 16590 (its min_p), PR 17172 (its seed).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.core.request import GenerateRequest, SamplingParams
from serve.engines.trtllm.arguments import EnginePlan
from serve.engines.trtllm.line import Backend, Line
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import RequestError

MAX_LOGITS_BYTES = 2 << 30  # of one prompt's logits, which cross a process border as one message
_SEED_MASK = (1 << 64) - 1
_TORCH_SAMPLER = "TensorRT-LLM 1.2.x ignores it with its default sampler; have the operator set engine.sampler: trtllm"


@dataclass(frozen=True)
class SamplingSupport:
    """What the installed line and backend can do.

    Attributes:
        missing: Field of ours to the reason why it cannot be asked for, and the remedy.
        prompt_ignore: Whether penalties can be told to leave the prompt alone; theirs count it, ours do not.
    """

    missing: Mapping[str, str] = field(default_factory=dict)
    prompt_ignore: bool = True


def sampling_support(plan: EnginePlan, settings: TrtllmSettings, known_fields: frozenset[str]) -> SamplingSupport:
    """Decide what requests can ask for.

    Args:
        plan: Line, backend and constructor call.
        settings: Of the engine.
        known_fields: Of the installed `SamplingParams`.
    """
    missing: dict[str, str] = {}
    prompt_ignore = "prompt_ignore_length" in known_fields
    if not prompt_ignore:
        for name in ("presence_penalty", "frequency_penalty"):
            missing[name] = "this TensorRT-LLM would apply it to the prompt too; use repetition_penalty"
    if plan.line is Line.V1_2 and plan.backend is Backend.PYTORCH and settings.sampler != "trtllm":
        ignored = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_p", "seed")
        missing |= dict.fromkeys(ignored, _TORCH_SAMPLER)
    if plan.backend is Backend.TENSORRT:
        if not plan.call.keywords.get("gather_generation_logits"):
            missing["logprobs"] = "the engine keeps no logits of its output; build it with build.logprobs: true"
        if not _keeps_prompt_logits(plan, settings):
            missing["prompt_logprobs"] = (
                "the engine keeps no logits of prompts; build it with build.prompt_logprobs: true"
            )
    return SamplingSupport(missing, prompt_ignore)


def _keeps_prompt_logits(plan: EnginePlan, settings: TrtllmSettings) -> bool:
    if plan.model.built is None:
        return settings.build.prompt_logprobs
    return plan.model.built.gather_context_logits


def check_sampling(params: SamplingParams, support: SamplingSupport, prompt_tokens: int, vocab_size: int) -> None:
    """Refuse what cannot be done.

    Raises:
        RequestError: Names the field, and what to do instead.
    """
    for name, reason in support.missing.items():
        if getattr(params, name) != _DEFAULTS[name]:
            value = getattr(params, name)
            raise RequestError(f"{name}: {value!r} cannot be done here: {reason}", name, "unsupported_parameter")
    if params.min_tokens and len(params.stop_token_ids) > 1:
        raise RequestError(
            f"min_tokens: {params.min_tokens} cannot be done here with {len(params.stop_token_ids)} stop tokens: "
            "TensorRT-LLM holds back only one; remove min_tokens, or have one stop token",
            "min_tokens",
            "unsupported_parameter",
        )
    logits_bytes = 4 * prompt_tokens * vocab_size
    if params.prompt_logprobs is not None and logits_bytes > MAX_LOGITS_BYTES:
        most = MAX_LOGITS_BYTES // (4 * vocab_size)
        raise RequestError(
            f"prompt_logprobs: can be had for prompts of at most {most} tokens here, and this one has "
            f"{prompt_tokens}; shorten the prompt",
            "prompt_logprobs",
            "unsupported_parameter",
        )


def sampling_keywords(request: GenerateRequest, support: SamplingSupport, fresh_seed: int) -> dict[str, Any]:
    """Return the keywords of a `SamplingParams` for one request; `embedding_bias` still by token id.

    Args:
        request: It has passed `check_sampling`.
        support: Of the line and backend.
        fresh_seed: For a request without a seed: the runtime would use 0, the same for all.
    """
    params = request.sampling
    stops = params.stop_token_ids
    end_id = stops[0] if stops else 0  # one has to be given when there is no tokenizer
    keywords: dict[str, Any] = {
        "max_tokens": max(1, params.max_tokens),  # 0 crashes the model; the token is dropped (`stream.py`)
        "end_id": end_id,
        "pad_id": end_id,
        "detokenize": False,
        **_distribution(params, fresh_seed),
        **_penalties(params, support, request.prompt_tokens),
    }
    if not stops:
        keywords["ignore_eos"] = True
    if len(stops) > 1:
        keywords["stop_token_ids"] = list(stops[1:])
    if params.min_tokens and stops:  # without an end id, the sampler would hold back the vocabulary's last token
        keywords["min_tokens"] = params.min_tokens
    if params.logit_bias:
        keywords["embedding_bias"] = dict(params.logit_bias)
    if params.logprobs is not None:
        keywords["logprobs"] = max(1, params.logprobs)  # 0 gives nothing with some samplers
    if params.prompt_logprobs is not None:
        keywords["return_context_logits"] = True
    return keywords


def _distribution(params: SamplingParams, fresh_seed: int) -> dict[str, Any]:
    """Say how to draw: greedy is top_k=1 in every sampler."""
    if params.temperature == 0 or params.top_k == 1:
        return {"top_k": 1}
    seed = fresh_seed if params.seed is None else params.seed
    keywords: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,  # always: the C++ sampler takes neither top_k nor top_p for greedy
        "seed": seed & _SEED_MASK,
    }
    if params.top_k:
        keywords["top_k"] = params.top_k
    if params.min_p:
        keywords["min_p"] = params.min_p
    return keywords


def _penalties(params: SamplingParams, support: SamplingSupport, prompt_tokens: int) -> dict[str, Any]:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    keywords = {name: getattr(params, name) for name in names if getattr(params, name) != _DEFAULTS[name]}
    if support.prompt_ignore and keywords.keys() & {"presence_penalty", "frequency_penalty"}:
        keywords["prompt_ignore_length"] = prompt_tokens
    return keywords


_DEFAULTS: dict[str, Any] = {name: getattr(SamplingParams(), name) for name in SamplingParams.__struct_fields__}
