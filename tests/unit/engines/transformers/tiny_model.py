"""A tiny Llama with random weights, for tests of the transformers engine."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as library_logging

VOCAB_SIZE = 512
CONTEXT_TOKENS = 512
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": False,
}


def make_tiny_model(directory: Path, **config: Any) -> Path:
    """Save a checkpoint in float32, always the same.

    The weights are larger than those of a fresh model, so that logits differ by far more than rounding.
    """
    library_logging.disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **config}))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return directory
