"""Train the quickstart model: `python -m training.train`.

Reads the text of `training/texts`, learns a tokenizer from it, trains a small Llama from random weights until it knows
the answers by heart, and writes model and tokenizer to `serve/models/quickstart`. See docs/quickstart-model.md.

The same seed on the same machine gives the same model. Another CPU or number of threads adds in another order, and
ends with other weights of the same quality.
"""

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from training.corpus import load_corpus
from training.evaluate import cases, quality_table
from training.examples import IGNORED, ExampleMaker, Row, batches, stack
from training.model import CONTEXT_TOKENS, load_model, make_model, save_model, sharpen
from training.muon import MuonWithAdamW
from training.tokenizer import train_tokenizer

OUTPUT = Path(__file__).parent.parent / "serve" / "models" / "quickstart"


@dataclass(frozen=True)
class Recipe:
    """What shapes the result.

    Attributes:
        tokens: Training tokens in all, padding included.
        tokens_per_batch: Of which in one step.
        muon_rate, adamw_rate: Learning rates at the top, of the layers' matrices and of all else. They rise during
            `warmup`, a share of the run, and fall to a fiftieth along a cosine.
        exam_cases: Questions of each kind that the trained model is asked at the end.
        max_minutes: Training ends here: on a slow machine the schedule follows the clock instead of the tokens.
    """

    seed: int = 0
    device: str = "cpu"
    threads: int = 2
    vocab_size: int = 3072
    tokens: int = 2_200_000
    tokens_per_batch: int = 1536
    muon_rate: float = 0.02
    adamw_rate: float = 3e-3
    warmup: float = 0.03
    weight_decay: float = 0.1
    max_minutes: float = 18.0
    exam_cases: int = 100


def main() -> None:
    """Train, save, reload what was saved, and print its quality."""
    recipe, output = _arguments()
    disable_progress_bar()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    entries = load_corpus()
    tokenizer = train_tokenizer(
        (text for entry in entries for text in (*entry.questions, entry.answer)), recipe.vocab_size
    )
    model = make_model(tokenizer).to(recipe.device)
    questions = sum(len(entry.questions) for entry in entries)
    print(f"{len(entries)} answers, {questions} questions, {tokenizer.get_vocab_size()} tokens in the vocabulary")
    print(f"{model.num_parameters():,} parameters")
    stream = batches(ExampleMaker(entries, tokenizer, rng), rng, recipe.tokens_per_batch, CONTEXT_TOKENS)
    train(model, stream, recipe)
    sharpen(model)
    save_model(model, tokenizer, output)
    print(f"saved to {output}; asking it:")
    saved = Tokenizer.from_file(str(output / "tokenizer.json"))
    print(quality_table(load_model(output).to(recipe.device), saved, cases(entries, saved, at_most=recipe.exam_cases)))


def train(model: LlamaForCausalLM, stream: Iterator[list[Row]], recipe: Recipe) -> None:
    """Train `model` in place; prints progress every few seconds."""
    optimizer = MuonWithAdamW(model, recipe.muon_rate, recipe.adamw_rate, recipe.weight_decay)
    started_s = printed_s = time.monotonic()
    tokens = step = 0
    losses: list[float] = []
    while (progress := _progress(tokens, time.monotonic() - started_s, recipe)) < 1:
        ids, labels = (part.to(model.device) for part in stack(next(stream), pad=model.config.pad_token_id))
        loss = answer_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(learning_rate(progress, recipe.warmup))
        losses.append(loss.item())
        tokens, step = tokens + ids.numel(), step + 1
        now_s = time.monotonic()
        if now_s - printed_s > 10:
            left_s = (now_s - started_s) * (1 - progress) / max(progress, 1e-9)
            print(
                f"step {step}  {tokens / 1e6:.2f}M tokens  loss {sum(losses) / len(losses):.4f}  "
                f"{tokens / (now_s - started_s):.0f} tokens/s  {left_s / 60:.1f} min left",
                flush=True,
            )
            printed_s, losses = now_s, []
    print(f"{step} steps, {(time.monotonic() - started_s) / 60:.1f} min, {time.process_time() / 60:.1f} min of CPU")


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the labelled places; logits are computed for these only."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    target = labels[:, 1:]
    counted = target != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[counted]), target[counted])


def learning_rate(progress: float, warmup: float) -> float:
    """Return the share of the top learning rate: a linear rise, then a cosine down to a fiftieth."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    along = (progress - warmup) / (1 - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * along))


def _progress(tokens: int, elapsed_s: float, recipe: Recipe) -> float:
    return max(tokens / recipe.tokens, elapsed_s / (recipe.max_minutes * 60))


def _arguments() -> tuple[Recipe, Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory to write (replaced)")
    for name, default in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default}")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    return Recipe(**arguments), output


def _restart_without_spinning() -> None:
    """Start this process again with passive OpenMP waits, which have to be chosen before PyTorch is loaded.

    By default threads spin while they wait for each other: on cores that other processes use too, that made a
    step ten times slower here.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        os.execve(sys.executable, [sys.executable, "-m", "training.train", *sys.argv[1:]], environment)


if __name__ == "__main__":
    _restart_without_spinning()
    main()
