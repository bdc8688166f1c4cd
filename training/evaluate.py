"""How well the quickstart model knows its text: greedy answers, compared word for word."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from training.corpus import Entry
from training.noise import filler
from training.tokenizer import ASSISTANT, BEGIN, END, SYSTEM, USER

LONG = "after a system prompt of 2,000 tokens"


@dataclass(frozen=True)
class Case:
    """A prompt, as the text that the chat template renders, and the answer that is expected."""

    prompt: str
    answer: str


def chat_prompt(question: str, *, system: str = "", history: Iterable[tuple[str, str]] = ()) -> str:
    """Render a conversation that waits for its answer, exactly as the chat template does."""
    parts = [BEGIN, f"{SYSTEM}{system}{END}" if system else ""]
    parts += [f"{USER}{asked}{END}{ASSISTANT}{answer}{END}" for asked, answer in history]
    return "".join([*parts, USER, question, END, ASSISTANT])


def _case(entry: Entry, question: str, earlier: Sequence[Entry] = (), system: str = "") -> Case:
    history = [(turn.questions[0], turn.answer) for turn in (*earlier, *entry.history())]
    return Case(chat_prompt(question, system=system, history=history), entry.answer)


def cases(entries: Sequence[Entry], tokenizer: Tokenizer, seed: int = 0, at_most: int = 10**9) -> dict[str, list[Case]]:
    """Return what is measured, by name; at most `at_most` of each (a fifth of it of LONG), drawn from `seed`."""
    rng = random.Random(seed)
    sentences = [entry.answer for entry in entries]
    found = {
        "canonical questions": [_case(entry, entry.questions[0]) for entry in entries],
        "trained paraphrases": [
            _case(entry, question)
            for entry in entries
            for question in rng.sample(entry.questions[1:], min(8, len(entry.questions) - 1))
        ],
        "held-out paraphrases": [_case(entry, question) for entry in entries for question in entry.held_out],
        "after 5 other questions": [_case(e, e.questions[0], earlier=rng.sample(entries, 5)) for e in entries],
        LONG: [_case(entry, entry.questions[0], system=filler(2000, tokenizer, sentences, rng)) for entry in entries],
    }
    return {
        name: rng.sample(group, min(at_most // 5 if name == LONG else at_most, len(group)))
        for name, group in found.items()
    }


def exact_share(model: LlamaForCausalLM, tokenizer: Tokenizer, group: Sequence[Case]) -> float:
    """Return the share of `group` that greedy decoding answers word for word."""
    right = [given == case.answer for case, given in zip(group, answers(model, tokenizer, group), strict=True)]
    return sum(right) / len(group)


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer, group: Sequence[Case], tokens_per_batch: int = 8192
) -> list[str | None]:
    """Answer each case by greedy decoding; None for an answer that grows longer than the expected one.

    Args:
        model: On any device; its type of numbers is used.
        tokenizer: The model's own.
        group: Cases of about the same length share a batch, padded on the left.
        tokens_per_batch: Rows of a batch times the longest prompt and answer, at most (one row may be longer).
    """
    prompts = [tokenizer.encode(case.prompt, add_special_tokens=False).ids for case in group]
    limits = [len(tokenizer.encode(case.answer, add_special_tokens=False).ids) + 1 for case in group]
    order = sorted(range(len(group)), key=lambda index: (len(prompts[index]) // 128, limits[index]))
    found: list[str | None] = [None] * len(group)
    while order:
        count = max(1, tokens_per_batch // (len(prompts[order[-1]]) + 128 + limits[order[-1]]))
        batch, order = order[-count:], order[:-count]
        limit = max(limits[index] for index in batch)
        for index, ids in zip(batch, _generate(model, [prompts[index] for index in batch], limit), strict=True):
            if model.config.eos_token_id in ids:
                found[index] = tokenizer.decode(ids[: ids.index(model.config.eos_token_id)])
    return found


def _generate(model: LlamaForCausalLM, prompts: list[list[int]], limit: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    pad: Any = model.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    output: Tensor = model.generate(
        input_ids=ids, attention_mask=(ids != pad).long(), do_sample=False, max_new_tokens=limit
    )
    generated: list[list[int]] = output[:, longest:].tolist()
    return generated


def quality_table(model: LlamaForCausalLM, tokenizer: Tokenizer, groups: dict[str, list[Case]]) -> str:
    """Return a Markdown table: what was asked, how many of it, and the share that was answered word for word."""
    lines = ["| questions | cases | answered word for word |", "|---|---:|---:|"]
    for name, group in groups.items():
        lines.append(f"| {name} | {len(group)} | {exact_share(model, tokenizer, group):.1%} |")
    return "\n".join(lines)
