"""ModelOutputs: what one model made of texts and questions, and the files that hold it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from builders.evaluate.questions import Answer, Question

UNKNOWN = -1  # in `best`: not measured at this position
BROKEN = -2  # in `best`: the model computed no number, so that it expects nothing at all
WORST_LOGPROB = -100.0  # stands for whatever is less, and for no number
_TEXTS, _QUESTIONS = "texts.npz", "questions.jsonl"


@dataclass(frozen=True)
class TokenScores:
    """What a model expected at each position of a text of n tokens: entry i is about token i + 1.

    Attributes:
        best: (n - 1,) the likeliest token; UNKNOWN where it was not measured, BROKEN where there is none.
        own: (n - 1,) log probability of the token that stands there; empty if the engine cannot tell.
        ids: (n - 1, k) the likeliest tokens; k is 0 if the engine cannot tell.
        logprobs: (n - 1, k) their log probabilities, none below WORST_LOGPROB.
    """

    best: npt.NDArray[np.int32]
    own: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    @property
    def has_probabilities(self) -> bool:
        """Whether the engine told log probabilities."""
        return bool(self.own.size)


@dataclass(frozen=True)
class TextOutput:
    """What a model made of one text.

    Attributes:
        tokens: The text.
        prompt_tokens: Its beginning, from which the continuation was generated.
        continuation: Greedy tokens; a stop token that ended them is the last.
        scores: Of the text's own tokens.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    continuation: tuple[int, ...]
    scores: TokenScores


@dataclass(frozen=True)
class ModelOutputs:
    """What one model made of all of it.

    Attributes:
        model: Engine, source and precision, for people.
        texts: In the order of the samples.
        questions: Of all tasks.
        answers: To them; None: the engine cannot tell.
        notes: What could not be measured, and why.
    """

    model: str
    texts: tuple[TextOutput, ...]
    questions: tuple[Question, ...] = ()
    answers: tuple[Answer | None, ...] = ()
    notes: tuple[str, ...] = field(default=())


class _QuestionLine(msgspec.Struct, frozen=True):
    question: Question
    answer: Answer | None


def save_outputs(outputs: ModelOutputs, directory: Path) -> None:
    """Write two files; the same outputs make the same bytes."""
    arrays: dict[str, Any] = {
        "model": np.array(outputs.model),
        "notes": np.array(outputs.notes, dtype=np.str_),
        "prompt_tokens": np.array([text.prompt_tokens for text in outputs.texts], dtype=np.int32),
        **_ragged("tokens", [text.tokens for text in outputs.texts]),
        **_ragged("continuation", [text.continuation for text in outputs.texts]),
    }
    for name, dtype in (("best", np.int32), ("own", np.float32), ("ids", np.int32), ("logprobs", np.float32)):
        parts = [getattr(text.scores, name) for text in outputs.texts]
        arrays[f"{name}_lengths"] = np.array([len(part) for part in parts], dtype=np.int64)
        arrays[name] = np.concatenate(parts).astype(dtype)
    with (directory / _TEXTS).open("wb") as file:
        np.savez_compressed(file, **arrays)
    encoder = msgspec.json.Encoder()
    pairs = zip(outputs.questions, outputs.answers, strict=True)
    lines = (encoder.encode(_QuestionLine(question, answer)) + b"\n" for question, answer in pairs)
    (directory / _QUESTIONS).write_bytes(b"".join(lines))


def load_outputs(directory: Path) -> ModelOutputs:
    """Read what `save_outputs` wrote."""
    with np.load(directory / _TEXTS) as file:
        arrays = {name: file[name] for name in file.files}
    tokens, continuations = _unragged(arrays, "tokens"), _unragged(arrays, "continuation")
    names = ("best", "own", "ids", "logprobs")
    columns = {name: np.split(arrays[name], np.cumsum(arrays[f"{name}_lengths"])[:-1]) for name in names}
    texts = tuple(
        TextOutput(
            tuple(tokens[i].tolist()),
            int(arrays["prompt_tokens"][i]),
            tuple(continuations[i].tolist()),
            TokenScores(*(columns[name][i] for name in names)),
        )
        for i in range(len(tokens))
    )
    decoder = msgspec.json.Decoder(_QuestionLine)
    lines = [decoder.decode(line) for line in (directory / _QUESTIONS).read_bytes().splitlines()]
    return ModelOutputs(
        model=str(arrays["model"]),
        texts=texts,
        questions=tuple(line.question for line in lines),
        answers=tuple(line.answer for line in lines),
        notes=tuple(arrays["notes"].tolist()),
    )


def _ragged(name: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    flat = [value for row in rows for value in row]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return {name: np.array(flat, dtype=np.int32), f"{name}_lengths": lengths}


def _unragged(arrays: dict[str, Any], name: str) -> list[npt.NDArray[np.int32]]:
    return np.split(arrays[name], np.cumsum(arrays[f"{name}_lengths"])[:-1])
