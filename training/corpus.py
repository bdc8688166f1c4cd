"""The text the quickstart model learns: questions, their paraphrases, and answers, from `training/texts/*.txt`.

A file is a list of entries with an empty line between them. Each line of an entry begins with a mark; what does not
continues the line before. `|` begins a line that stays a line of its own, as code does. `#` begins a comment line.

    Q: What is RayTRT?                   the canonical question
    Q: Tell me about RayTRT.             any number of paraphrases
    H: What is the RayTRT project?       paraphrases that training never sees: they measure generalisation
    A: RayTRT serves ...                 the answer

    T: TTFT | time to first token        instead of Q, or besides it: the names of a term, asked for by TERM_TEMPLATES
    A: ...

    W: football | Paris | cats           words, each of which goes into each question with a place for it
    Q: What is {}?
    A: ...

    After: How do I serve on 8 GPUs?     a follow-up: asked after this question and its answer
    Q: And on two nodes?
    A: ...
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"

TERM_TEMPLATES = (
    "What is {}?",
    "What does {} mean?",
    "Explain {}.",
    "Can you explain {}?",
    "Tell me about {}.",
    "Define {}.",
    "{}?",
    "What do you mean by {}?",
    "Please explain what {} is.",
    "I do not understand {}.",
)

_MARKS = ("Q", "H", "T", "W", "A", "After")


@dataclass(frozen=True)
class Entry:
    """One answer, and the ways to ask for it.

    Attributes:
        questions: At least one; the first is the canonical form.
        held_out: Paraphrases that training never sees.
        answer: What the model has to say, word for word.
        after: The entry that has to be asked before, if this is a follow-up.
    """

    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    after: "Entry | None" = None

    def history(self) -> tuple["Entry", ...]:
        """Return the entries to ask before this one, first things first."""
        return () if self.after is None else (*self.after.history(), self.after)


def load_corpus(folder: Path = TEXTS) -> tuple[Entry, ...]:
    """Read all files of `folder`, in the order of their names.

    Raises:
        ValueError: A line or an entry cannot be understood, or one question has two answers; names file and text.
    """
    entries: list[Entry] = []
    by_question: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.txt")):
        for block in _blocks(path):
            entry = _entry(block, len(entries), by_question, path)
            entries.append(entry)
            by_question.setdefault(entry.questions[0], entry)
    _refuse_ambiguous(entries)
    return tuple(entries)


def normalised(question: str) -> str:
    """Return `question` without what does not distinguish it: case, spaces, punctuation at its end."""
    return " ".join(question.lower().split()).strip(" ?.!")


def _blocks(path: Path) -> Iterator[list[tuple[str, str]]]:
    """Yield the (mark, text) lines of each entry."""
    block: list[tuple[str, str]] = []
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], start=1):
        text = line.strip()
        mark, colon, rest = text.partition(": ")
        if text.startswith("#"):
            continue
        if not text:
            if block:
                yield [(mark, _flowed(lines)) for mark, lines in block]
            block = []
        elif colon and mark in _MARKS:
            block.append((mark, rest.strip()))
        elif block:
            block[-1] = (block[-1][0], f"{block[-1][1]}\n{text}")
        else:
            raise ValueError(f"{path}:{number}: {text!r} begins an entry without one of the marks {_MARKS}")


def _flowed(lines: str) -> str:
    """Join lines by spaces, except that those which begin with `|` stay lines."""
    text, after_code = "", False
    for line in lines.split("\n"):
        is_code = line.startswith("|")
        joint = "\n" if is_code or after_code else " " if text else ""
        text += joint + (line.removeprefix("|").removeprefix(" ") if is_code else line)
        after_code = is_code
    return text


def _entry(block: list[tuple[str, str]], index: int, known: dict[str, Entry], path: Path) -> Entry:
    def of(wanted: str) -> list[str]:
        return [text for mark, text in block if mark == wanted]

    asked, held_out = _term_questions(_names(of("T")), index)
    words = _names(of("W")) or ["{}"]
    written = [question.replace("{}", word) for question in of("Q") for word in words]
    questions = tuple(dict.fromkeys([*asked, *written]))
    if not questions or len(of("A")) != 1 or len(of("After")) > 1:
        raise ValueError(f"{path}: an entry needs Q or T, one A, and at most one After: {block}")
    after = None
    for question in of("After"):
        if question not in known:
            raise ValueError(f"{path}: 'After: {question}' is no canonical question of an entry before it")
        after = known[question]
    return Entry(questions, (*held_out, *of("H")), of("A")[0], after)


def _names(lines: list[str]) -> list[str]:
    return [name.strip() for line in lines for name in line.split("|") if name.strip()]


def _term_questions(names: list[str], index: int) -> tuple[list[str], list[str]]:
    """Fill the templates with each name; keep one template a name back, another one for each entry."""
    asked: list[str] = []
    held_out: list[str] = []
    for offset, name in enumerate(names):
        kept_back = 1 + (index + 3 * offset) % (len(TERM_TEMPLATES) - 1)  # never the first: it is canonical
        for number, template in enumerate(TERM_TEMPLATES):
            question = template.format(name)
            (held_out if number == kept_back else asked).append(question[0].upper() + question[1:])
    return asked, held_out


def _refuse_ambiguous(entries: list[Entry]) -> None:
    answers: dict[tuple[str, str], str] = {}
    for entry in entries:
        context = entry.after.questions[0] if entry.after else ""
        for question in (*entry.questions, *entry.held_out):
            key = context, normalised(question)
            if answers.setdefault(key, entry.answer) != entry.answer:
                raise ValueError(f"{question!r} has two answers: {answers[key]!r} and {entry.answer!r}")
        if both := {*map(normalised, entry.questions)} & {*map(normalised, entry.held_out)}:
            raise ValueError(f"held out and trained on at once: {sorted(both)}")
