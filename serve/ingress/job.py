"""Job: what one HTTP request asks the backend for, and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from serve.core.request import GenerateRequest, PrefillInfo, SamplingParams
from serve.ingress.models import ServedModel
from serve.ingress.openai import GenerationFields
from serve.ingress.openai_answers import PromptTokensDetails, Usage
from serve.ingress.prompts import Prompt
from serve.ingress.sampling import seed_of_choice, stop_strings
from serve.ingress.sequence import SequenceText
from serve.router.hints import NO_HINTS, RouteHints

_CONTEXT_TOKENS = 8  # of the prompt, for the detokenizer


@dataclass(slots=True)
class Choice:
    """One sequence of a request.

    Attributes:
        index: As the answer names it: number of the prompt times n, plus the number of the choice.
        prompt: What it continues.
        request: What the backend gets.
        text: Its visible side.
        prefill: What the engine said about its prompt; None before the first delta.
    """

    index: int
    prompt: Prompt
    request: GenerateRequest
    text: SequenceText
    prefill: PrefillInfo | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """All sequences of one request.

    Attributes:
        model: Who answers.
        choices: By index.
        per_prompt: How many of them each prompt has: n.
        echo: Whether the prompt comes before the text.
        with_logprobs: Whether tokens and their log probabilities are part of the answer.
        hints: What routing may know.
    """

    model: ServedModel
    choices: Sequence[Choice]
    per_prompt: int
    echo: bool = False
    with_logprobs: bool = False
    hints: RouteHints = NO_HINTS

    def usage(self) -> Usage:
        """Return the usage so far. A prompt counts once; as cached, what all its sequences found cached."""
        prompt_tokens = completion_tokens = cached_tokens = 0
        for start in range(0, len(self.choices), self.per_prompt):
            group = self.choices[start : start + self.per_prompt]
            prompt_tokens += group[0].request.prompt_tokens
            cached_tokens += min(0 if choice.prefill is None else choice.prefill.cached_tokens for choice in group)
            completion_tokens += sum(choice.text.completion_tokens for choice in group)
        details = PromptTokensDetails(cached_tokens)
        return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)


def make_job(
    fields: GenerationFields,
    model: ServedModel,
    prompts: Sequence[tuple[Prompt, SamplingParams]],
    trace_id: str,
    *,
    echo: bool = False,
    hints: RouteHints = NO_HINTS,
) -> Job:
    """Return the sequences of a request.

    Args:
        fields: The request.
        model: Who answers.
        prompts: Each with how to sample what follows.
        trace_id: Unique; the ids of the sequences begin with it.
        echo: Whether the prompt comes before the text.
        hints: What routing may know.
    """
    n, stops = fields.n or 1, stop_strings(fields)
    include_stop, skip_special = fields.include_stop_str_in_output is True, fields.skip_special_tokens is not False
    choices: list[Choice] = []
    for prompt, sampling in prompts:
        for number in range(n):
            of_choice = sampling
            if number and sampling.seed is not None:
                of_choice = msgspec.structs.replace(sampling, seed=seed_of_choice(sampling.seed, number))
            index = len(choices)
            request = GenerateRequest(
                request_id=f"{trace_id}-{index}",
                model=model.id,
                prompt=prompt.packed,
                sampling=of_choice,
                cache_salt=fields.cache_salt or "",
            )
            tail = memoryview(prompt.packed)[-4 * _CONTEXT_TOKENS :].cast("I").tolist()
            text = SequenceText(
                model.text.detokenizer(skip_special_tokens=skip_special, prompt=tail),
                stops,
                include_stop=include_stop,
                min_tokens=sampling.min_tokens,
                with_logprobs=sampling.logprobs is not None,
            )
            choices.append(Choice(index, prompt, request, text))
    return Job(model, choices, n, echo, prompts[0][1].logprobs is not None, hints)
