"""How the quickstart model is made: text, noise, examples, optimizer, files."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from training.corpus import Entry, load_corpus, normalised
from training.evaluate import chat_prompt
from training.examples import IGNORED, ExampleMaker, Row, batches, stack
from training.model import CONTEXT_TOKENS, SHARPENING, load_model, make_model, save_model, sharpen
from training.muon import MuonWithAdamW, orthogonalised
from training.noise import filler, noised
from training.paraphrase import paraphrased
from training.tokenizer import SPECIAL_TOKENS, train_tokenizer
from training.train import Recipe, learning_rate, train

ENTRIES = load_corpus()
TOKENIZER = train_tokenizer((entry.answer for entry in ENTRIES), vocab_size=600)
seeds = st.integers(0, 2**32)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The threads of small steps mostly wait for each other, spinning: far slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(folder: Path, text: str) -> Path:
    (folder / "some.txt").write_text(text, encoding="utf-8")
    return folder


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return make_model(TOKENIZER)


def maker(seed: int, entries: tuple[Entry, ...] = ENTRIES, tokenizer: Tokenizer = TOKENIZER) -> ExampleMaker:
    return ExampleMaker(entries, tokenizer, random.Random(seed))


# --- corpus


def test_an_entry_has_questions_an_exam_and_an_answer(tmp_path: Path) -> None:
    text = "# comment\nQ: One?\nQ: Uno?\nH: Eins?\nA: First\n   line,\n   | code\n   |   more\n   end.\n"
    (entry,) = load_corpus(write(tmp_path, text))
    assert entry == Entry(("One?", "Uno?"), ("Eins?",), "First line,\ncode\n  more\nend.")


def test_a_term_is_asked_for_in_all_ways_but_one_that_is_kept_for_the_exam(tmp_path: Path) -> None:
    (entry,) = load_corpus(write(tmp_path, "T: TTFT | time to first token\nA: A time.\n"))
    assert entry.questions[0] == "What is TTFT?"
    assert len(entry.held_out) == 2
    assert len(entry.questions) + len(entry.held_out) == 20


def test_words_go_into_each_place(tmp_path: Path) -> None:
    (entry,) = load_corpus(write(tmp_path, "W: cats | dogs\nQ: Where?\nQ: What are {}?\nA: Animals.\n"))
    assert entry.questions == ("Where?", "What are cats?", "What are dogs?")


def test_a_follow_up_knows_what_was_asked_before(tmp_path: Path) -> None:
    first, second = load_corpus(write(tmp_path, "Q: One?\nA: 1\n\nAfter: One?\nQ: And then?\nA: 2\n"))
    assert second.history() == (first,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q: One?\nA: 1\n\nQ: one\nA: 2\n", "two answers"),
        ("Q: One?\nH: one\nA: 1\n", "held out and trained on"),
        ("Q: One?\n", "an entry needs"),
        ("After: Zero?\nQ: One?\nA: 1\n", "no canonical question"),
        ("what\n", "without one of the marks"),
    ],
)
def test_a_text_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(write(tmp_path, text))


# --- noise


@given(seed=seeds)
def test_noise_repeats_with_its_seed(seed: int) -> None:
    question = "How do I serve on 8 GPUs?"
    assert noised(question, random.Random(seed)) == noised(question, random.Random(seed))


@given(seed=seeds, entry=st.sampled_from(ENTRIES))
def test_noise_leaves_numbers_alone(seed: int, entry: Entry) -> None:
    digits = [char for char in noised(entry.questions[0], random.Random(seed)) if char.isdigit()]
    assert digits == [char for char in entry.questions[0] if char.isdigit()]


def test_paraphrases_differ_and_keep_the_subject() -> None:
    rng = random.Random(0)
    found = {paraphrased("How do I serve a model?", rng) for _ in range(200)}
    assert len(found) > 10
    assert all("serve a model" in text for text in found)


@settings(max_examples=20)
@given(seed=seeds, num_tokens=st.integers(1, 300))
def test_filler_is_about_as_long_as_asked(seed: int, num_tokens: int) -> None:
    text = filler(num_tokens, TOKENIZER, ["A sentence."], random.Random(seed))
    # Cut inside a character and encoded again, its last bytes may take a few tokens more.
    assert len(TOKENIZER.encode(text, add_special_tokens=False).ids) <= num_tokens + 8


# --- examples


@settings(max_examples=30)
@given(seed=seeds)
def test_exactly_the_answers_are_learned(seed: int) -> None:
    row = maker(seed).single()
    learned = [number for number in row.labels if number != IGNORED]
    text = TOKENIZER.decode(learned, skip_special_tokens=False)
    said = text.split("<|end|>")
    assert said.pop() == ""
    assert set(said) <= {entry.answer for entry in ENTRIES}
    assert all(label in (number, IGNORED) for number, label in zip(row.ids, row.labels, strict=True))


def test_a_row_reads_like_the_chat_template() -> None:
    entry = Entry(("Zebra?",), (), "Striped.")
    made = maker(0, (entry,))
    rows = {TOKENIZER.decode(made.single().ids, skip_special_tokens=False) for _ in range(500)}
    assert chat_prompt("Zebra?") + "Striped.<|end|>" in rows
    assert chat_prompt("Zebra?", system="You are a helpful assistant.") + "Striped.<|end|>" in rows


def test_questions_of_the_exam_never_come_up() -> None:
    entry = Entry(("How do I serve a model?",), ("How can I serve a model?",), "So.")
    made = maker(0, (entry,))
    texts = [TOKENIZER.decode(made.single().ids, skip_special_tokens=False) for _ in range(500)]
    asked = {normalised(text.split("<|user|>")[1].split("<|end|>")[0]) for text in texts}
    assert "how could i serve a model" in asked
    assert "how can i serve a model" not in asked


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_batches_keep_to_their_size(seed: int) -> None:
    rng = random.Random(seed)
    stream = batches(maker(seed), rng, tokens_per_batch=1000, max_tokens=CONTEXT_TOKENS)
    for rows in (next(stream) for _ in range(20)):
        longest = max(len(row.ids) for row in rows)
        assert longest <= CONTEXT_TOKENS
        assert len(rows) == 1 or len(rows) * longest <= 1000


def test_rows_are_padded_on_the_right_and_padding_is_not_learned() -> None:
    ids, labels = stack([Row([5, 6, 7], [IGNORED, 6, 7]), Row([8], [8])], pad=0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


# --- optimizer and training


@settings(max_examples=20)
@given(seed=seeds, rows=st.integers(2, 40), columns=st.integers(2, 40))
def test_orthogonalised_has_singular_values_near_one(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Well-conditioned, as five steps of the iteration need it for every direction to arrive.
    base = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator)).Q
    scales = 0.3 + 0.7 * torch.rand(min(rows, columns), generator=generator)
    matrix = base * scales
    found = torch.linalg.svdvals(orthogonalised(matrix if rows >= columns else matrix.T))
    assert found.min() > 0.6
    assert found.max() < 1.3


def test_a_step_without_gradients_says_what_is_missing() -> None:
    optimizer = MuonWithAdamW(small_model(), muon_rate=0.02, adamw_rate=1e-3, weight_decay=0.0)
    with pytest.raises(RuntimeError, match="call backward"):
        optimizer.step(1.0)


@given(progress=st.floats(0, 1), warmup=st.floats(0.01, 0.5))
def test_learning_rate_stays_between_zero_and_its_top(progress: float, warmup: float) -> None:
    assert 0 < learning_rate(progress, warmup) <= 1


def test_training_teaches_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    model, made = small_model(), maker(0, (Entry(("Hello",), (), "Good day to you."),))
    stream = ([made.single() for _ in range(8)] for _ in itertools.count())
    train(model, stream, replace(Recipe(), tokens=8_000))
    ids = torch.tensor([TOKENIZER.encode(chat_prompt("Hello") + "Good day to you.", add_special_tokens=False).ids])
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[0, -6:-1].softmax(-1).gather(1, ids[0, -5:, None])
    assert probabilities.min() > 0.5
    assert "min of CPU" in capsys.readouterr().out


# --- files


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model = small_model()
    save_model(model, TOKENIZER, tmp_path / "model")
    save_model(model, TOKENIZER, tmp_path / "model")  # replaces what is there
    loaded = load_model(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_sharpening_stretches_logits_and_keeps_their_order() -> None:
    model = small_model().eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        sharpen(model)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before * SHARPENING)


def test_special_tokens_come_first() -> None:
    assert [TOKENIZER.id_to_token(number) for number in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
