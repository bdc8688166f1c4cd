"""What a build measures of a model, through the adapter of TensorRT-LLM, on doubles of both lines."""

from pathlib import Path
from typing import Any

import pytest

from builders.evaluate.comparison import compare
from builders.evaluate.outputs import ModelOutputs
from builders.evaluate.questions import read_questions
from builders.evaluate.recording import Recording, record
from builders.settings.quantize import TextsSettings
from builders.settings.verify import TaskSettings
from builders.texts.encoder import PromptEncoder
from builders.texts.reader import read_texts
from tests.contract.trtllm_host import QUICKSTART, HostedTrtllm
from tests.doubles.install import LineName

FAST = {"max_batch_size": 16, "context_tokens": 512, "kv_cache": {"event_interval_s": 0.02}}


async def outputs_of(line: LineName, settings: dict[str, Any], directory: Path) -> ModelOutputs:
    encoder = PromptEncoder(QUICKSTART)
    task = directory / "task.jsonl"
    task.write_text('{"prompt": "It is called", "choices": ["TTFT", "TPOT"], "answer": "A"}\n')
    settings_of_task = TaskSettings(name="letters", file="task.jsonl", metric="multiple_choice")
    questions = read_questions(settings_of_task, {"task.jsonl": task}, encoder)
    texts = read_texts(TextsSettings(samples=4, max_tokens=32), {}, encoder, "evaluation")
    engine = HostedTrtllm(line, {**FAST, **settings})
    await engine.start()
    try:
        return await record(engine, "double", Recording(texts, questions, 8, encoder))
    finally:
        await engine.stop()


async def test_every_figure_is_measured(tmp_path: Path) -> None:
    outputs = await outputs_of("newest", {}, tmp_path)
    found = compare(outputs, outputs)
    assert (found.notes, found.unmeasured_tasks) == ((), ())
    assert found.tokens == sum(len(text.tokens) - 1 for text in outputs.texts)
    for figure in (found.kl_divergence, found.perplexity_ratio, found.greedy_agreement):
        assert figure is not None
        assert figure.value == pytest.approx(1.0 if figure is not found.kl_divergence else 0.0)
    assert [task.name for task in found.tasks] == ["next token", "letters"]


async def test_an_engine_without_logits_of_prompts_is_probed(tmp_path: Path) -> None:
    outputs = await outputs_of("1.2.x", {"backend": "tensorrt"}, tmp_path)
    found = compare(outputs, outputs)
    assert "build it with build.prompt_logprobs: true" in found.notes[0]
    assert found.kl_divergence is found.perplexity_ratio is None
    assert found.unmeasured_tasks == ("letters",)
    (next_token,) = found.tasks
    assert next_token.reference.samples == 4 * 16
