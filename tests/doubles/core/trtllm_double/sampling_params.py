"""SamplingParams and its relatives: dataclasses, so that unknown keywords are TypeErrors (reference 3)."""

import os
from pathlib import Path
from typing import Any

from trtllm_double import signatures
from trtllm_double.engine_request import EngineRequest
from trtllm_double.switches import NotModelled, misuse


class _GuidedBase:
    def _validate(self) -> None:
        given = [n for n in signatures.runtime["GuidedDecodingParams"] if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(f"Only one guide can be used for a request, but got {len(given)}.")


GuidedDecodingParams: Any = signatures.make_dataclass(
    "GuidedDecodingParams", signatures.runtime["GuidedDecodingParams"], bases=(_GuidedBase,), kw_only=True
)


class _LoraBase:
    """Reference 3.3: the path is looked for on the machine where the object is made."""

    lora_name: str
    lora_int_id: int
    lora_path: str | None
    lora_ckpt_source: str

    def __post_init__(self) -> None:
        if self.lora_path is not None and not Path(self.lora_path).exists():
            raise ValueError(f"lora_path ({self.lora_path}) does not exist.")
        if self.lora_ckpt_source not in ("hf", "nemo"):
            raise ValueError(f"lora_ckpt_source must be one of 'hf' or 'nemo', got {self.lora_ckpt_source}")

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def path(self) -> str | None:
        return self.lora_path

    @property
    def ckpt_source(self) -> str:
        return self.lora_ckpt_source


LoRARequest: Any = signatures.make_dataclass("LoRARequest", signatures.runtime["LoRARequest"], bases=(_LoraBase,))


class _DisaggregatedBase:
    request_type: str | None

    def __post_init__(self) -> None:
        if self.request_type is not None:
            self.request_type = self.request_type.lower()
            if self.request_type not in ("context_only", "generation_only", "context_and_generation"):
                raise ValueError(
                    f"Unknown request type: {self.request_type}. Must be context_only, generation_only or "
                    "context_and_generation"
                )


DisaggregatedParams: Any = signatures.make_dataclass(
    "DisaggregatedParams", signatures.runtime["DisaggregatedParams"], bases=(_DisaggregatedBase,), kw_only=True
)


class _SamplingBase:
    """What SamplingParams does beside holding fields."""

    def __post_init__(self: Any) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        self.best_of = self.best_of or self.n
        self._stop_word_ids: list[list[int]] | None = None
        self._bad_word_ids: list[list[int]] | None = None
        self._used = False
        self._validate()

    def _validate(self: Any) -> None:
        if self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        greedy = self.top_k in (None, 1) and self.top_p in (None, 0.0) and not self.use_beam_search
        if self.best_of > 1 and greedy and not os.environ.get("TLLM_ALLOW_N_GREEDY_DECODING"):
            raise ValueError(f"Greedy decoding in the LLM API does not allow multiple returns, got {self.best_of}")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
            raise ValueError(f"truncate_prompt_tokens must be >= 1, got {self.truncate_prompt_tokens}")
        if self.guided_decoding is not None:
            self.guided_decoding._validate()
        self.logprobs = self.logprobs and int(self.logprobs)
        self.prompt_logprobs = self.prompt_logprobs and int(self.prompt_logprobs)

    def _setup(self: Any, tokenizer: Any, add_special_tokens: bool = False) -> Any:
        """Fill in the tokenizer's ids: the object is changed (reference 2.1)."""
        if self.end_id is None:
            self.end_id = tokenizer.eos_token_id
            self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        for name in ("bad", "stop"):
            words = getattr(self, name)
            if words is not None:
                words = [words] if isinstance(words, str) else words
                ids = [tokenizer.encode(word, add_special_tokens=add_special_tokens) for word in words]
                setattr(self, f"_{name}_word_ids", ids)
        return self

    def _mark_used(self: Any) -> None:
        """Reference 7.2: do not share a SamplingParams between requests."""
        if self._used:
            misuse("a SamplingParams object was used for a second request: it is mutated by the first")
        self._used = True

    def _words(self: Any, name: str) -> list[list[int]]:
        ids = [[i] for i in getattr(self, f"{name}_token_ids") or []]
        if getattr(self, name) is None:
            return ids
        words = getattr(self, f"_{name}_word_ids")
        if words is None:
            raise RuntimeError(f"SamplingParams.{name} is not processed by tokenizer, please call the setup method.")
        every: list[list[int]] = ids + words
        return every

    def _get_stop_reasons_and_words(self: Any) -> list[tuple[Any, list[int]]]:
        reasons = list(self.stop_token_ids or [])
        if self.stop is not None:
            reasons.extend([self.stop] if isinstance(self.stop, str) else self.stop)
        return list(zip(reasons, self._words("stop"), strict=True))


SamplingParams: Any = signatures.make_dataclass(
    "SamplingParams", signatures.runtime["SamplingParams"], bases=(_SamplingBase,), kw_only=True, eq=False
)

_UNMODELLED = (
    "use_beam_search", "beam_search_diversity_rate", "early_stopping", "length_penalty", "beam_width_array",
    "no_repeat_ngram_size", "logits_processor", "apply_batched_logits_processor", "additional_model_outputs",
    "return_encoder_output", "lookahead_config", "top_p_min", "top_p_decay", "top_p_reset_ids",
    "return_routed_experts", "thinking_token_budget", "logprobs_simple_format", "prompt_logprobs_simple_format",
)  # fmt: skip


def to_engine(params: Any, request_id: int, prompt: list[int], vocab_size: int, **more: Any) -> EngineRequest:
    """Return what the engine is asked for.

    Raises:
        NotModelled: The double does not imitate a field that is set.
    """
    for name in _UNMODELLED:
        if getattr(params, name, None):
            raise NotModelled(f"SamplingParams.{name}: the double does not imitate it")
    if params.n != 1 or params.best_of != 1:
        raise NotModelled("SamplingParams.n > 1: the double does not imitate it")
    names = (
        "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs", "return_context_logits",
        "return_generation_logits",
    )  # fmt: skip
    return EngineRequest(
        id=request_id,
        prompt=prompt,
        end_id=-1 if params.ignore_eos else params.end_id,
        stop_words=params._words("stop"),
        bad_words=params._words("bad"),
        embedding_bias=_bias(params.embedding_bias, vocab_size),
        **{name: getattr(params, name) for name in names},
        **more,
    )


def _bias(value: Any, vocab_size: int) -> Any:
    """Check `embedding_bias`: a float32 tensor, (vocab_size,) (reference 3.1)."""
    if value is None:
        return None
    try:
        import torch
    except ImportError:
        array = value
    else:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"embedding_bias must be a torch.Tensor, got {type(value)}")
        if value.dtype is not torch.float32:
            raise ValueError(f"embedding_bias must be float32, got {value.dtype}")
        array = value.numpy()
    if array.shape != (vocab_size,):
        raise ValueError(f"embedding_bias must have the shape ({vocab_size},), got {array.shape}")
    return array.copy()
