"""The user's own tasks: questions from JSON lines, and whether an answer is right. PURE, but for reading the file.

- `exact_match`: the answer is one of `answer` (a text, or a list of texts), once both are normalised: Unicode NFKC,
  case folded, white space made one space, quotes and punctuation around it removed. Where no accepted answer has a line
  break, only the first line of what was generated counts, so that a model which goes on talking is not wrong for it.
- `regex`: Python's `re.search(pattern, generated text)` finds something.
- `multiple_choice`: the model does not generate. Each of `choices` is scored by the log probability of its tokens after
  the prompt, divided by its length in bytes of UTF-8 (else the shortest would win); the highest score is the choice.
  `answer` is the right one's text, its index from 0, or a letter (A is the first). A space is put between prompt and
  choice if neither has white space there and the prompt is no chat.

Source of the length normalisation: EleutherAI's lm-evaluation-harness, metric `acc_norm`.
"""

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from builders.settings.verify import TaskSettings
from builders.texts.encoder import Encoded, PromptEncoder, common_prefix, read_messages
from builders.texts.json_lines import Line, read_file
from serve.errors import ConfigError, RequestError

Metric = Literal["exact_match", "multiple_choice", "regex"]
_AROUND = string.punctuation + "“”„‘’«»…。，！？" + string.whitespace
_KEYS: Mapping[str, frozenset[str]] = {
    "exact_match": frozenset({"answer"}),
    "regex": frozenset({"pattern"}),
    "multiple_choice": frozenset({"choices", "answer"}),
}


class Choice(msgspec.Struct, frozen=True):
    """One choice: prompt and choice as token ids, where the choice begins, and its length in bytes."""

    tokens: tuple[int, ...]
    begins_at: int
    size_bytes: int


class Question(msgspec.Struct, frozen=True):
    """One question of a task.

    Attributes:
        task: Name of the task.
        metric: How answers are judged.
        prompt: Token ids.
        max_tokens: Of the answer.
        answers: Accepted ones, normalised (exact_match).
        pattern: Regular expression (regex).
        choices: To choose from (multiple_choice).
        right: Index of the right one.
    """

    task: str
    metric: Metric
    prompt: tuple[int, ...]
    max_tokens: int
    answers: tuple[str, ...] = ()
    pattern: str = ""
    choices: tuple[Choice, ...] = ()
    right: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What a model answered: a text, or the mean log probability a byte of each choice."""

    text: str = ""
    scores: tuple[float, ...] = ()


def is_right(question: Question, answer: Answer) -> bool:
    """Judge an answer."""
    match question.metric:
        case "multiple_choice":
            return max(range(len(answer.scores)), key=answer.scores.__getitem__) == question.right
        case "regex":
            return re.search(question.pattern, answer.text) is not None
        case "exact_match":
            text = answer.text
            if not any("\n" in accepted for accepted in question.answers):
                text = next((line for line in text.splitlines() if line.strip()), "")
            return normalised(text) in {normalised(accepted) for accepted in question.answers}


def normalised(text: str) -> str:
    """Return a text as exact matches compare it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_AROUND)


def read_questions(task: TaskSettings, user_files: Mapping[str, Path], encoder: PromptEncoder) -> tuple[Question, ...]:
    """Read a task.

    Args:
        task: Its settings.
        user_files: Of the step: where the file is on this node.
        encoder: Of the model.

    Raises:
        ConfigError: The file cannot be read, or a line is no question of this metric; names file and line.
    """
    path = user_files.get(task.file, Path(task.file))
    if not path.is_file():
        raise ConfigError(f"{task.file}: there is no such file (verify.tasks, {task.name!r}); give its path")
    return tuple(_question(line, task, encoder) for line in read_file(path, task.file))


def _question(line: Line, task: TaskSettings, encoder: PromptEncoder) -> Question:
    _check_keys(line, task.metric)
    prompt = _prompt(line, encoder)
    question = Question(task.name, task.metric, prompt.tokens, task.max_tokens)
    match task.metric:
        case "exact_match":
            return msgspec.structs.replace(question, answers=_answers(line))
        case "regex":
            return msgspec.structs.replace(question, pattern=_pattern(line))
        case "multiple_choice":
            choices, right = _choices(line)
            is_chat = "messages" in line.fields
            encoded = tuple(_choice(line, encoder, prompt, choice, is_chat=is_chat) for choice in choices)
            return msgspec.structs.replace(question, choices=encoded, right=right)


def _check_keys(line: Line, metric: str) -> None:
    wanted = _KEYS[metric]
    given = set(line.fields)
    if len(given & {"prompt", "messages"}) != 1:
        raise line.mistake("give exactly one of prompt and messages")
    if missing := sorted(wanted - given):
        raise line.mistake(f"{metric} needs {' and '.join(missing)}")


def _prompt(line: Line, encoder: PromptEncoder) -> Encoded:
    try:
        if "messages" not in line.fields:
            return encoder.encode(_text(line, "prompt"))
        encoded = encoder.encode_messages(read_messages(line.fields["messages"]))
    except (ValueError, RequestError) as exc:
        raise line.mistake(str(exc)) from None
    if encoded.prompt_tokens < len(encoded.tokens):
        raise line.mistake("messages: the last one is an answer already; leave it out, and give `answer`")
    return encoded


def _text(line: Line, key: str) -> str:
    value = line.fields[key]
    if not isinstance(value, str) or not value:
        raise line.mistake(f"{key}: {value!r} is no text; write a string that is not empty")
    return value


def _answers(line: Line) -> tuple[str, ...]:
    value = line.fields["answer"]
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise line.mistake(f"answer: {value!r} is neither a text nor a list of texts")
    if empty := [answer for answer in answers if not normalised(answer)]:
        raise line.mistake(f"answer: nothing is left of {empty[0]!r} once punctuation is removed; use regex for it")
    return tuple(answers)


def _pattern(line: Line) -> str:
    pattern = _text(line, "pattern")
    try:
        re.compile(pattern)
    except re.error as exc:
        raise line.mistake(f"pattern: {pattern!r} is no regular expression of Python: {exc}") from None
    return pattern


def _choices(line: Line) -> tuple[Sequence[str], int]:
    choices: Any = line.fields["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise line.mistake(f"choices: {choices!r} is no list of two texts or more")
    if len(set(choices)) < len(choices):
        raise line.mistake("choices: one stands there twice")
    answer: Any = line.fields["answer"]
    if isinstance(answer, str) and answer in choices:
        return choices, choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in string.ascii_uppercase[: len(choices)]:
        return choices, string.ascii_uppercase.index(answer.upper())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices, answer
    raise line.mistake(
        f"answer: {answer!r} is none of the choices; give its text, its index from 0 to {len(choices) - 1}, or a letter"
    )


def _choice(line: Line, encoder: PromptEncoder, prompt: Encoded, choice: str, *, is_chat: bool) -> Choice:
    if is_chat:
        # The prompt ends with the template's own tokens: text behind them cannot change how these are cut.
        tokens = (*prompt.tokens, *encoder.encode_plain(choice))
    else:
        apart = "" if prompt.text[-1].isspace() or choice[0].isspace() else " "
        tokens = encoder.encode(prompt.text + apart + choice).tokens
    # The tokenizer may join the end of the prompt with the beginning of the choice: what differs, is scored.
    begins_at = min(common_prefix(prompt.tokens, tokens), len(tokens) - 1)
    if begins_at < 1:
        raise line.mistake(f"choices: {choice!r} leaves no token of the prompt before it; write a longer prompt")
    return Choice(tokens, begins_at, len(choice.encode()))
