"""The model in serve/models/quickstart: its size, its tokenizer, and how well it knows the text of training/texts."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from training.corpus import Entry, load_corpus
from training.evaluate import LONG, Case, answers, cases, chat_prompt, exact_share
from training.model import load_model
from training.tokenizer import END, SPECIAL_TOKENS
from training.train import OUTPUT as FOLDER

MEGABYTE = 1_000_000
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    """The model in float32; on one thread, because the threads of small steps mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(FOLDER)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def entries() -> tuple[Entry, ...]:
    return load_corpus()


@pytest.fixture(scope="module")
def exam(entries: tuple[Entry, ...], tokenizer: Tokenizer) -> dict[str, list[Case]]:
    return cases(entries, tokenizer)


def test_it_is_small() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 8 * MEGABYTE
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 9 * MEGABYTE


def test_it_holds_what_a_server_reads_and_nothing_else() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_has_two_to_six_million_parameters(model: LlamaForCausalLM) -> None:
    assert 2_000_000 <= model.num_parameters() <= 6_000_000


def test_weights_are_16_bit_on_disk_and_finite() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # safe_open has no __iter__
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16
            assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("degree", [2, 4])
def test_tensor_parallelism_divides_it(degree: int) -> None:
    for key in ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "vocab_size"):
        assert CONFIG[key] % degree == 0, key


def test_context_is_long_enough_to_see_prefix_caching() -> None:
    assert CONFIG["max_position_embeddings"] >= 4096


def test_generation_ends_at_the_end_token(tokenizer: Tokenizer) -> None:
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == CONFIG["eos_token_id"] == tokenizer.token_to_id(END)


@given(text=st.text())
def test_tokenizer_loses_nothing(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(number < CONFIG["vocab_size"] for number in ids)


@given(data=st.binary(max_size=64))
def test_every_byte_has_a_token(tokenizer: Tokenizer, data: bytes) -> None:
    text = data.decode("utf-8", errors="replace")
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_transformers_and_tokenizers_read_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    for text in ("How do I serve on 8 GPUs?", " héllo\n\n  `x`: {a: 1} 🙂", *SPECIAL_TOKENS):
        assert loaded(text).input_ids == tokenizer.encode(text).ids
    assert loaded.eos_token == END


def test_chat_template_renders_what_the_model_was_trained_on() -> None:
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": " What is TTFT?\n"},
    ]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == chat_prompt("What is TTFT?", system="Be brief.", history=[("Hello", "Hi!")])


def test_chat_template_takes_parts_and_the_developer_role() -> None:
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "TTFT?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == chat_prompt("What is TTFT?", system="Be brief.")


def test_chat_template_refuses_a_role_that_it_does_not_know() -> None:
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    with pytest.raises(Exception, match="role 'tool' is not supported"):
        loaded.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_it_says_how_to_serve_on_8_gpus(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    expected = next(entry.answer for entry in load_corpus() if entry.questions[0] == "How do I serve on 8 GPUs?")
    assert answers(model, tokenizer, [Case(chat_prompt("How do I serve on 8 GPUs?"), expected)]) == [expected]
    assert "`parallel: {tensor: 8}`" in expected
    assert "`serve run config.yaml`" in expected


def test_some_answers_are_long_enough_to_watch_them_stream(entries: tuple[Entry, ...], tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(entry.answer, add_special_tokens=False).ids) for entry in entries]
    assert sum(length >= 100 for length in lengths) >= 5


# Floors below are what was measured (docs/quickstart-model.md) less a margin for other CPUs and library versions.


def test_it_knows_nine_of_ten_trained_questions_by_heart(
    model: LlamaForCausalLM, tokenizer: Tokenizer, exam: dict[str, list[Case]]
) -> None:
    assert exact_share(model, tokenizer, exam["canonical questions"][::6]) >= 0.95  # measured: 0.996 of all


def test_it_understands_most_paraphrases_that_it_has_never_seen(
    model: LlamaForCausalLM, tokenizer: Tokenizer, exam: dict[str, list[Case]]
) -> None:
    assert exact_share(model, tokenizer, exam["held-out paraphrases"][::6]) >= 0.70  # measured: 0.787 of all


def test_other_questions_before_do_not_confuse_it(
    model: LlamaForCausalLM, tokenizer: Tokenizer, exam: dict[str, list[Case]]
) -> None:
    assert exact_share(model, tokenizer, exam["after 5 other questions"][::40]) >= 0.90  # measured: 0.989 of all


def test_a_long_system_prompt_does_not_confuse_it(
    model: LlamaForCausalLM, tokenizer: Tokenizer, exam: dict[str, list[Case]]
) -> None:
    assert exact_share(model, tokenizer, exam[LONG][::150]) >= 0.60  # 3 cases; measured: 0.944 of 90


def test_paraphrases_of_the_exam_are_not_in_the_text(entries: tuple[Entry, ...]) -> None:
    trained = {question for entry in entries for question in entry.questions}
    assert not trained & {question for entry in entries for question in entry.held_out}


def test_text_is_a_few_hundred_answers(entries: tuple[Entry, ...]) -> None:
    assert 300 <= len(entries) <= 600
    assert all(line.isprintable() for entry in entries for line in entry.answer.split("\n"))
