"""record_reference: the step `reference`. What the unquantized model makes of the texts and questions.

It is computed by the engine that will serve the bundle, from the unquantized checkpoint (for TensorRT engines: by the
PyTorch backend of the same library), so that the comparison shows what quantization did, and not how two libraries
round. Where that engine does not start, the transformers engine computes it, and the result says so.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from builders.context import StepContext, StepName
from builders.errors import BuildFailed
from builders.evaluate.engines import EnginePlace, running
from builders.evaluate.outputs import BROKEN, ModelOutputs, save_outputs
from builders.evaluate.questions import Question, read_questions
from builders.evaluate.recording import Recording, record
from builders.resources import engine_plan, engine_settings
from builders.texts.encoder import PromptEncoder
from builders.texts.reader import TextSample, read_texts
from serve.engines.factory import AnyEngineSettings
from serve.engines.protocol import Engine
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.settings_execution import EngineBuildSettings
from serve.errors import BundleMismatch, ConfigError, EngineDead

_STEP = StepName.REFERENCE
logger = logging.getLogger(__name__)


def record_reference(context: StepContext) -> dict[str, Any]:
    """Record the reference; see `builders.steps.reference`."""
    verify = context.spec.verify
    encoder = PromptEncoder(context.checkpoint)
    texts = read_texts(verify.texts, context.user_files, encoder, "evaluation")
    questions = [question for task in verify.tasks for question in read_questions(task, context.user_files, encoder)]
    outputs = asyncio.run(_record(context, encoder, texts, questions))
    save_outputs(outputs, context.output)
    return {
        "model": outputs.model,
        "texts": len(outputs.texts),
        "questions": len(outputs.questions),
        "notes": list(outputs.notes),
    }


async def _record(
    context: StepContext, encoder: PromptEncoder, texts: Sequence[TextSample], questions: Sequence[Question]
) -> ModelOutputs:
    output_tokens = context.spec.verify.output_tokens
    async with AsyncExitStack() as stack:
        engine, notes = await _start(stack, _place(context), context)
        fitting = [_fit(text, room(engine) - output_tokens) for text in texts]
        recording = Recording(fitting, questions, output_tokens, encoder)
        outputs = await record(engine, _describe(engine, context), recording, context.progress)
    if any(BROKEN in text.continuation for text in outputs.texts):
        raise BuildFailed(_STEP.value, "the unquantized model computes no finite numbers; set engine.dtype: float32")
    return replace(outputs, notes=(*outputs.notes, *notes))


async def _start(stack: AsyncExitStack, place: EnginePlace, context: StepContext) -> tuple[Engine, tuple[str, ...]]:
    """Start the engine, or the one that stands in for it; returns what there is to say about that, too."""
    try:
        return await stack.enter_async_context(running(place)), ()
    except (ConfigError, BundleMismatch, EngineDead) as exc:
        if isinstance(place.settings, TransformersSettings) or place.plan.launcher != "in_process":
            raise
        logger.warning("The reference is computed by transformers, as %s does not start: %s", place.settings.kind, exc)
        reason = f"computed by the transformers engine, as {place.settings.kind} did not start: {exc}"
    settings = TransformersSettings(device=context.spec.verify.reference_device)
    return await stack.enter_async_context(running(replace(place, settings=settings))), (reason,)


def room(engine: Engine) -> int:
    """Return how many tokens of prompt and output one sequence can have."""
    info = engine.info
    return min(info.context_tokens, info.total_blocks * info.tokens_per_block)


def _fit(text: TextSample, tokens: int) -> TextSample:
    if tokens < 2:
        raise ConfigError("verify.output_tokens leaves no room for a prompt in the model's context; lower it")
    return replace(text, tokens=text.tokens[:tokens], prompt_tokens=min(text.prompt_tokens, tokens))


def _describe(engine: Engine, context: StepContext) -> str:
    return f"{context.spec.source.location}, unquantized, by {engine.info.engine} on {engine.info.device}"


def _place(context: StepContext) -> EnginePlace:
    return EnginePlace(
        _unquantized(engine_settings(context.spec, _STEP), context),
        context.checkpoint,
        engine_plan(context.spec, _STEP),
    )


def _unquantized(settings: AnyEngineSettings, context: StepContext) -> AnyEngineSettings:
    """Return the settings without what quantizes, speculates, or belongs to compiled engines."""
    device = context.spec.verify.reference_device
    if isinstance(settings, TransformersSettings) and device != "auto":
        return settings.model_copy(update={"device": device})
    if isinstance(settings, TrtllmSettings):
        plain = {"quantization": None, "speculation": None, "dynamic_quantization": False}
        cache = settings.kv_cache.model_copy(update={"dtype": "auto"})
        return settings.model_copy(update={**plain, "build": EngineBuildSettings(), "kv_cache": cache})
    return settings
