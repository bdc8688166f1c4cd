"""Questions: how files are read, what counts as right, and what is said about a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from builders.evaluate.questions import Answer, Question, is_right, normalised, read_questions
from builders.settings.verify import TaskSettings
from builders.texts.encoder import PromptEncoder
from serve.errors import ConfigError

QUICKSTART = Path(__file__).resolve().parents[4] / "serve" / "models" / "quickstart"


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(QUICKSTART)


def read(encoder: PromptEncoder, directory: Path, metric: str, *lines: object) -> tuple[Question, ...]:
    path = directory / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TaskSettings.model_validate({"name": "quiz", "file": "task.jsonl", "metric": metric, "max_tokens": 8})
    return read_questions(task, {"task.jsonl": path}, encoder)


def exact(*answers: str) -> Question:
    return Question("quiz", "exact_match", (1,), 8, answers=answers)


@pytest.mark.parametrize(
    ("accepted", "given", "right"),
    [
        (("Paris",), " paris.\n", True),
        (("Paris",), "It is Paris.", False),
        (("Paris",), "Paris\nQuestion: what is the capital of Spain?", True),
        (("Paris",), "\n\n  **Paris**", True),
        (("forty two", "42"), "42", True),
        (("one\ntwo",), "one two", True),
        (("ﬁne",), "fine", True),  # NFKC takes the ligature apart
        (("Straße",), "STRASSE", True),
        (("a",), "", False),
    ],
)
def test_exact_match_compares_normalised_texts(accepted: tuple[str, ...], given: str, right: bool) -> None:
    assert is_right(exact(*accepted), Answer(text=given)) is right


def test_normalising_twice_changes_nothing() -> None:
    for text in ("  «Ça va?»  ", "A  B\tC!", "42"):
        assert normalised(normalised(text)) == normalised(text)


def test_regex_looks_anywhere_in_the_answer() -> None:
    question = Question("quiz", "regex", (1,), 8, pattern=r"(?i)\bkv\s+cache\b")
    assert is_right(question, Answer(text="the\nKV  cache is full"))
    assert not is_right(question, Answer(text="the cache"))


def test_highest_score_is_the_choice() -> None:
    question = Question("quiz", "multiple_choice", (1,), 8, right=1)
    assert is_right(question, Answer(scores=(-0.5, -0.1, -0.4)))
    assert not is_right(question, Answer(scores=(-0.1, -0.5)))


@pytest.mark.parametrize(("answer", "right"), [("TTFT", 0), (1, 1), ("B", 1), ("b", 1)])
def test_right_choice_is_a_text_an_index_or_a_letter(
    encoder: PromptEncoder, tmp_path: Path, answer: Any, right: int
) -> None:
    line = {"prompt": "It is called", "choices": ["TTFT", "TPOT"], "answer": answer}
    (question,) = read(encoder, tmp_path, "multiple_choice", line)
    assert question.right == right


def test_choices_follow_the_prompt_with_a_space_between(encoder: PromptEncoder, tmp_path: Path) -> None:
    line: dict[str, Any] = {"prompt": "The time to first token is", "choices": ["short", "long"], "answer": 0}
    (question,) = read(encoder, tmp_path, "multiple_choice", line)
    for choice, text in zip(question.choices, line["choices"], strict=True):
        assert choice.tokens == encoder.encode(f"The time to first token is {text}").tokens
        assert choice.tokens[: choice.begins_at] == question.prompt[: choice.begins_at]
        assert choice.size_bytes == len(text)
        assert encoder.decode(choice.tokens[choice.begins_at :]).strip() == text


def test_choices_of_a_chat_follow_where_the_answer_begins(encoder: PromptEncoder, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is TTFT?"}]
    line = {"messages": messages, "choices": ["A time.", "A fruit."], "answer": "A"}
    (question,) = read(encoder, tmp_path, "multiple_choice", line)
    for choice, text in zip(question.choices, ("A time.", "A fruit."), strict=True):
        assert choice.tokens[: len(question.prompt)] == question.prompt
        assert encoder.decode(choice.tokens[len(question.prompt) :]) == text


@pytest.mark.parametrize(
    ("metric", "line", "said"),
    [
        ("exact_match", {"prompt": "x"}, "exact_match needs answer"),
        ("exact_match", {"answer": "x"}, "exactly one of prompt and messages"),
        ("exact_match", {"prompt": "x", "answer": 7}, "answer: 7 is neither a text nor a list of texts"),
        ("exact_match", {"prompt": "x", "answer": "..."}, "nothing is left of '...'"),
        ("exact_match", {"prompt": "", "answer": "x"}, "prompt: '' is no text"),
        (
            "exact_match",
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "answer": "x"},
            "the last one is an answer already",
        ),
        ("regex", {"prompt": "x", "pattern": "("}, "is no regular expression of Python"),
        ("multiple_choice", {"prompt": "x", "choices": ["a"], "answer": 0}, "no list of two texts or more"),
        ("multiple_choice", {"prompt": "x", "choices": ["a", "a"], "answer": 0}, "one stands there twice"),
        ("multiple_choice", {"prompt": "x", "choices": ["a", "b"], "answer": 2}, "its index from 0 to 1"),
        ("multiple_choice", {"prompt": "x", "choices": ["a", "b"], "answer": True}, "answer: True is none"),
    ],
)
def test_mistakes_name_file_and_line(
    encoder: PromptEncoder, tmp_path: Path, metric: str, line: dict[str, Any], said: str
) -> None:
    good = {"prompt": "x y", "answer": "a", "pattern": "a", "choices": ["a", "b"]}
    with pytest.raises(ConfigError) as caught:
        read(encoder, tmp_path, metric, good, line)
    assert str(caught.value).startswith("task.jsonl, line 2: ")
    assert said in str(caught.value)


def test_missing_file_names_the_task(encoder: PromptEncoder) -> None:
    task = TaskSettings(name="quiz", file="nowhere.jsonl", metric="regex")
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: there is no such file \(verify\.tasks, 'quiz'\)"):
        read_questions(task, {}, encoder)
