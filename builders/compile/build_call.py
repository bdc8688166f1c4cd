"""The constructor call that builds a TensorRT engine: the engine adapter's own call, with every size decided. PURE."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from builders.compile.decisions import Decision, Subject, build_decisions, plugin_decisions
from serve.engines.trtllm.arguments import EnginePlan, plan_engine
from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Backend, Line
from serve.engines.trtllm.model_directory import ModelDirectory
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.settings_execution import EngineBuildSettings
from serve.engines.trtllm.signature_data import check_names
from serve.errors import ConfigError

_BUILD_CONFIG = "tensorrt_llm.llmapi:BuildConfig"
_PLUGIN_CONFIG = "tensorrt_llm.plugin:PluginConfig"


@dataclass(frozen=True)
class EngineBuild:
    """A build.

    Attributes:
        plan: How the library's object is made.
        config: Decisions about BuildConfig.
        plugins: Decisions about PluginConfig.
    """

    plan: EnginePlan
    config: tuple[Decision, ...]
    plugins: tuple[Decision, ...]


def plan_build(
    subject: Subject, model: ModelDirectory, orchestration: Orchestration, line: Line, version: str | None
) -> EngineBuild:
    """Decide everything about a build.

    Args:
        subject: What is built.
        model: The checkpoint.
        orchestration: Who starts the ranks.
        line: Of TensorRT-LLM that builds it.
        version: Of it.

    Raises:
        ConfigError: The line builds no engines, or something is asked for that an engine cannot have.
    """
    if line is not Line.V1_2:
        raise ConfigError(
            f"kind: TensorRT-LLM {version or line} builds no engines any more; use kind: trtllm-checkpoint, or an "
            "environment with TensorRT-LLM 1.2.1 (target.engine_env)"
        )
    _check_settings(subject.settings)
    config, plugins = build_decisions(subject), plugin_decisions(subject)
    plan = plan_engine(_settings(subject.settings), subject.layout, orchestration, model, line, version)
    keywords = {**plan.call.keywords, "build_config": build_config_call(config, plugins)}
    call = ConstructorCall(plan.call.target, keywords)
    check_names(call, line)
    return EngineBuild(replace(plan, call=call), config, plugins)


def _check_settings(settings: TrtllmSettings) -> None:
    remedies = {
        "quantization": "use the build's quantize section, whose result is measured before it is built",
        "speculation": "use kind: trtllm-checkpoint",
        "lora": "remove it; requests cannot name an adapter in this release",
    }
    for name, remedy in remedies.items():
        if getattr(settings, name) is not None:
            raise ConfigError(f"engine.{name}: an engine is built without it; {remedy}")
    if settings.build.cache_directory is not None:
        raise ConfigError(
            "engine.build.cache_directory: the library's cache does not tell GPU models apart, and the store keeps "
            "every build already; remove it"
        )


def _settings(settings: TrtllmSettings) -> TrtllmSettings:
    """Return the settings as they are while the engine is built: sizes are in the build_config."""
    sizes: dict[str, Any] = {"max_batch_size": None, "max_num_tokens": None, "context_tokens": None}
    build = settings.build.model_copy(update={"gemm_plugin": None, "max_input_tokens": None})
    return settings.model_copy(update={**sizes, "backend": "tensorrt", "build": build})


def build_config_call(config: Iterable[Decision], plugins: Iterable[Decision]) -> ConstructorCall:
    """Return the BuildConfig that decisions make."""
    passed = {decision.name: decision.value for decision in config if not decision.is_left}
    chosen = {decision.name: decision.value for decision in plugins if not decision.is_left}
    return ConstructorCall(_BUILD_CONFIG, {**passed, "plugin_config": ConstructorCall(_PLUGIN_CONFIG, chosen)})


def runtime_section(subject: Subject) -> dict[str, Any]:
    """Return the engine's section of runtime.json: what fits the built engine, and nothing that was decided by it."""
    sizes = subject.sizes
    return {
        "kind": "trtllm",
        "backend": Backend.TENSORRT.value,
        "max_batch_size": sizes.max_batch_size,
        "max_num_tokens": sizes.max_num_tokens,
        "context_tokens": sizes.context_tokens,
        "kv_cache": {"tokens_per_block": subject.settings.kv_cache.tokens_per_block},
        # Over what the build's own section says: an engine that is built already is not asked to be so.
        "dtype": "auto",
        "build": EngineBuildSettings().model_dump(mode="json"),
    }
