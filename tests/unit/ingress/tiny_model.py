"""A model directory with a tokenizer that is trained in a second: byte-level BPE, with special tokens."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. How do I serve a model on eight GPUs with TensorRT and Ray?",
    "Streaming tokens: one, two, three, four. Grüße aus Köln; 你好, 世界! Привет, мир. 😀👍🏽",
    "hello there, hello world, hello again; stop here and stop there, STOP.",
] * 20
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' and message.content == 'refuse' %}{{ raise_exception('no such user') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT_TOKENS = 512


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer that puts BOS before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("  "), AddedToken("<think é>")])  # not in byte-level BPE's alphabet
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return tokenizer


def write_model(path: Path) -> Path:
    """Write a model directory, without weights, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save(str(path / "tokenizer.json"))
    write_json(
        path / "tokenizer_config.json",
        {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "chat_template": CHAT_TEMPLATE},
    )
    write_json(path / "config.json", {"max_position_embeddings": CONTEXT_TOKENS, "vocab_size": 512})
    write_json(path / "generation_config.json", {"eos_token_id": [2, 4]})
    return path


def write_json(path: Path, value: object) -> None:
    """Write a file of the directory."""
    path.write_text(json.dumps(value))
