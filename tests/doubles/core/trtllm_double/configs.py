"""The config classes of this line: names and defaults from data, rules from the reference (1.2, 1.3, 1.5, 1.6)."""

import json
from pathlib import Path
from typing import Any

import pydantic

from trtllm_double import line, signatures
from trtllm_double.signatures import LoadFormat, StrictBaseModel, make_dataclass, make_model
from trtllm_double.switches import device_count

_LLM = ("tensorrt_llm:LLM", "tensorrt_llm._tensorrt_engine:LLM")
_DATACLASSES = ("BuildConfig", "LoraConfig", "QuantConfig", "BuildCacheConfig")
_SPECULATIVE = "DecodingConfig"


class _KvCacheRules(StrictBaseModel):
    @pydantic.model_validator(mode="after")
    def _check(self: Any) -> Any:
        fraction = self.free_gpu_memory_fraction
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError("kv_cache_config.free_gpu_memory_fraction must be a float between 0 and 1")
        windows = self.max_attention_window
        if windows is not None and (not windows or min(windows) <= 0):
            raise ValueError("kv_cache_config.max_attention_window must be a non-empty list of positive integers")
        for name in ("max_tokens", "tokens_per_block"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"kv_cache_config.{name} must be positive")
        if self.max_gpu_total_bytes < 0:
            raise ValueError("kv_cache_config.max_gpu_total_bytes must be non-negative")
        return self


class _CudaGraphRules(StrictBaseModel):
    @pydantic.model_validator(mode="after")
    def _check(self: Any) -> Any:
        if self.batch_sizes and self.max_batch_size and self.max_batch_size != max(self.batch_sizes):
            raise ValueError("cuda_graph_config: max_batch_size must be max(batch_sizes) if both are given")
        return self


class _RayPlacementRules(StrictBaseModel):
    @pydantic.model_validator(mode="after")
    def _check(self: Any) -> Any:
        groups, indices = self.placement_groups, self.placement_bundle_indices
        if (groups is None) != (indices is None):
            raise ValueError("placement_groups and placement_bundle_indices must be provided together")
        if groups is not None:
            from ray.util.placement_group import PlacementGroup

            for group in groups:
                if not isinstance(group, PlacementGroup):
                    raise ValueError(f"placement_groups must hold PlacementGroup objects, got {type(group)}")
            if len(groups) != len(indices):
                raise ValueError("placement_groups and placement_bundle_indices must have the same length")
        share = self.per_worker_gpu_share
        if share is not None and not 0 < share <= 1:
            raise ValueError("per_worker_gpu_share must be between 0 and 1.0")
        return self


class _PeftRules(StrictBaseModel):
    @pydantic.model_validator(mode="after")
    def _check(self: Any) -> Any:
        if self.lora_prefetch_dir is not None:
            raise ValueError("lora_prefetch_dir is not supported")
        return self


class _BuildConfigMethods:
    """Reference 5.2."""

    @classmethod
    def from_dict(cls, config: dict[str, Any], **_: Any) -> Any:
        return cls(**config)

    @classmethod
    def from_json_file(cls, file: str | Path, **_: Any) -> Any:
        return cls(**json.loads(Path(file).read_text()))

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def update(self, **changes: Any) -> None:
        for name, value in changes.items():
            if not hasattr(self, name):
                raise AttributeError(f"{type(self).__name__} object has no attribute {name}")
            setattr(self, name, value)


class _Permissive(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", validate_assignment=True, protected_namespaces=())


_BASES: dict[str, type[pydantic.BaseModel]] = {
    "KvCacheConfig": _KvCacheRules,
    "CudaGraphConfig": _CudaGraphRules,
    "DecodeCudaGraphConfig": _CudaGraphRules,
    "RayPlacementConfig": _RayPlacementRules,
    "PeftCacheConfig": _PeftRules,
    "PluginConfig": _Permissive,  # reference 5.3: wrong names are silently dropped
}


def _make_nested() -> dict[str, dict[str, Any]]:
    """Make every nested class, inner ones first; return module -> name -> class."""
    modules: dict[str, dict[str, Any]] = {}
    targets = [target for target in signatures.constructors if target not in _LLM]
    known = {target.partition(":")[2] for target in targets}
    while targets:
        target = targets.pop(0)
        module, _, name = target.partition(":")
        fields = signatures.constructors[target]
        refers = {other for other in known if other != name and any(other in f["type"] for f in fields.values())}
        if not refers <= signatures.names.keys():
            targets.append(target)
            continue
        base = _BASES.get(name, StrictBaseModel)
        if name in _DATACLASSES:
            made = make_dataclass(name, fields, bases=(_BuildConfigMethods,) if name == "BuildConfig" else ())
        else:
            made = make_model(name, fields, base)
        modules.setdefault(module, {})[name] = made
    return modules


nested: dict[str, dict[str, Any]] = _make_nested()
# Upstream defines nearly all of them in llm_args and re-exports them from llmapi.
by_name: dict[str, Any] = {name: made for module in nested.values() for name, made in module.items()}


def _speculative(value: Any) -> Any:
    """Reference 1.2: a dict needs `decoding_type` in the newest line; 1.2.x needs an instance from Python."""
    if value is None or not isinstance(value, dict):
        if value is not None and not type(value).__name__.endswith(_SPECULATIVE):
            raise ValueError(f"speculative_config must be a decoding config, got {type(value).__name__}")
        return value
    if not line.current().is_newest:
        raise ValueError("speculative_config: pass an instance of the class of the kind; a dict is ambiguous")
    kind = value.get("decoding_type")
    if kind is None:
        raise ValueError("speculative_config: a dict needs `decoding_type`")
    target = by_name.get(f"{kind.replace('_', '')}{_SPECULATIVE}")
    if target is None:
        raise ValueError(f"speculative_config: unknown decoding_type {kind!r}")
    return target(**{key: entry for key, entry in value.items() if key != "decoding_type"})


class _ArgsRules(StrictBaseModel):
    """Validators that both backends share. They look at the GPU (reference 1.2)."""

    @pydantic.field_validator("dtype", check_fields=False)
    @classmethod
    def _dtype(cls, value: str) -> str:
        if device_count() == 0:  # torch.cuda.get_device_properties(0)
            raise RuntimeError("No CUDA GPUs are available")
        if value not in ("auto", "float16", "bfloat16", "float32", "fp8"):
            raise ValueError(f"Invalid dtype: {value}")
        return value

    @pydantic.field_validator("speculative_config", mode="before", check_fields=False)
    @classmethod
    def _speculation(cls, value: Any) -> Any:
        return _speculative(value)

    @property
    def world_size(self: Any) -> int:
        size: int = self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size
        return size


class _TorchArgsRules(_ArgsRules):
    @pydantic.field_validator("load_format", mode="before", check_fields=False)
    @classmethod
    def _load_format(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value.upper() not in LoadFormat.__members__:
                raise ValueError(f"Invalid LoadFormat: {value}")
            return LoadFormat[value.upper()]
        return value

    @pydantic.model_validator(mode="after")
    def _check(self: Any) -> Any:
        for name in ("ray_worker_extension_cls", "ray_placement_config"):
            if getattr(self, name) is not None and self.orchestrator_type != "ray":
                raise ValueError(f"{name} is only supported with orchestrator_type='ray'")
        if not 0 <= self.batch_wait_max_tokens_ratio <= 1:
            raise ValueError(
                "batch_wait_max_tokens_ratio must be greater than or equal to 0 and less than or equal to 1"
            )
        if self.stream_interval <= 0:
            raise ValueError(f"stream_interval must be positive, got {self.stream_interval}")
        for name, default in (("max_batch_size", 2048), ("max_beam_width", 1), ("checkpoint_format", "HF")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        return self


TorchLlmArgs: Any = make_model("TorchLlmArgs", signatures.constructors[_LLM[0]], _TorchArgsRules)
TrtLlmArgs: Any = (
    make_model("TrtLlmArgs", signatures.constructors[_LLM[1]], _ArgsRules)
    if _LLM[1] in signatures.constructors
    else None
)
