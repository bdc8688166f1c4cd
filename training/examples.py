"""Training examples: conversations as token ids with the places that the loss counts, gathered into batches."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import Entry, normalised
from training.noise import SYSTEM_PROMPTS, filler, noised
from training.tokenizer import ASSISTANT, BEGIN, END, SYSTEM, USER, special_ids

IGNORED = -100  # torch's label of a place that the loss leaves out


@dataclass
class Row:
    """One row of a batch while it is written: token ids, and the label of each: the id itself, or IGNORED."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, learn: bool = False) -> None:
        """Append `ids`; the model has to predict them if `learn`."""
        self.ids.extend(ids)
        self.labels.extend(ids if learn else [IGNORED] * len(ids))


class ExampleMaker:
    """Writes rows from the corpus.

    Entries take turns in an order drawn from `rng`; those with many questions come up more often.
    """

    def __init__(self, entries: Sequence[Entry], tokenizer: Tokenizer, rng: random.Random) -> None:
        self._entries = entries
        self._tokenizer = tokenizer
        self._rng = rng
        self._deck: list[Entry] = []
        self._held_out = {normalised(question) for entry in entries for question in entry.held_out}
        self._sentences = [s for entry in entries for s in re.split(r"(?<=[.!?]) ", entry.answer)]
        ids = special_ids(tokenizer)
        self._begin, self._end, self._system = ids[BEGIN], ids[END], ids[SYSTEM]
        self._user, self._assistant = ids[USER], ids[ASSISTANT]

    def single(self) -> Row:
        """Write one question and its answer, after the questions that it follows up, if it does."""
        row = self._opened()
        self._ask(row, self._draw())
        return row

    def conversation(self, num_tokens: int) -> Row:
        """Write a conversation about one thing after another: each answer must follow the latest question."""
        row = self._opened()
        while len(row.ids) < num_tokens:
            self._ask(row, self._draw())
        return row

    def behind_filler(self, num_tokens: int) -> Row:
        """Write a conversation that starts after a text of no concern, in the system prompt or before the question."""
        row = Row()
        row.add([self._begin])
        text = filler(int(num_tokens * self._rng.uniform(0.3, 0.9)), self._tokenizer, self._sentences, self._rng)
        if self._rng.random() < 0.5:
            self._say(row, self._system, text)
            self._ask(row, self._draw())
        else:
            self._ask(row, self._draw(), preface=text + self._rng.choice(("\n\n", "\n", " ")))
        while len(row.ids) < num_tokens:
            self._ask(row, self._draw())
        return row

    def plain(self, num_tokens: int) -> Row:
        """Write answers one after another as running text, for clients that complete a text instead of chatting."""
        row = Row()
        row.add([self._begin])
        while len(row.ids) < num_tokens:
            row.add(self._tokenizer.encode(self._draw().answer, add_special_tokens=False).ids, learn=True)
            row.add([self._end], learn=True)
            row.add([self._begin])
        return row

    def _opened(self) -> Row:
        row = Row()
        row.add([self._begin])
        if self._rng.random() < 0.25:
            self._say(row, self._system, self._rng.choice(SYSTEM_PROMPTS))
        return row

    def _draw(self) -> Entry:
        if not self._deck:
            self._deck = [entry for entry in self._entries for _ in range(_turns(entry))]
            self._rng.shuffle(self._deck)
        return self._deck.pop()

    def _ask(self, row: Row, entry: Entry, preface: str = "") -> None:
        for turn in (*entry.history(), entry):
            # The canonical form first: it is what documentation shows and what people copy.
            asked = turn.questions[0] if self._rng.random() < 0.3 else self._rng.choice(turn.questions)
            typed = noised(asked, self._rng)
            if normalised(typed) in self._held_out:  # a rule has found a paraphrase that is kept for the exam
                typed = asked
            self._say(row, self._user, preface + typed)
            self._say(row, self._assistant, turn.answer, learn=True)
            preface = ""

    def _say(self, row: Row, role: int, text: str, *, learn: bool = False) -> None:
        row.add([role])
        row.add([*self._tokenizer.encode(text, add_special_tokens=False).ids, self._end], learn=learn)


def _turns(entry: Entry) -> int:
    return 1 + min(9, len(entry.questions) // 12)


def batches(maker: ExampleMaker, rng: random.Random, tokens_per_batch: int, max_tokens: int) -> Iterator[list[Row]]:
    """Yield batches without end; all rows of one have about the same length, so that little of it is padding.

    Args:
        maker: Writes the rows.
        rng: Decides on kind and length of each row.
        tokens_per_batch: Rows times the longest of them, at most (one row may be longer).
        max_tokens: Longest row.
    """
    while True:
        rows = [_row(maker, rng, max_tokens) for _ in range(256)]
        rows.sort(key=lambda row: len(row.ids))
        cut: list[list[Row]] = [[]]
        for row in rows:
            if cut[-1] and (len(cut[-1]) + 1) * len(row.ids) > tokens_per_batch:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        yield from cut


def _row(maker: ExampleMaker, rng: random.Random, max_tokens: int) -> Row:
    """Draw one row: single questions are most rows and about half of all tokens; long contexts the other way round."""
    draw = rng.random()
    if draw < 0.86:
        row = maker.single()
    elif draw < 0.88:
        row = maker.plain(rng.randint(60, 200))
    elif draw < 0.95:
        row = maker.conversation(rng.randint(150, 500))
    elif draw < 0.99:
        row = maker.behind_filler(rng.randint(100, 800))
    else:
        make = maker.conversation if rng.random() < 0.4 else maker.behind_filler
        row = make(rng.randint(1000, max_tokens - 100))
    return Row(row.ids[:max_tokens], row.labels[:max_tokens])  # what a row ends with is learned elsewhere too


def stack(rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, (rows, longest), padded on the right, where a causal model never looks."""
    longest = max(len(row.ids) for row in rows)
    ids = [row.ids + [pad] * (longest - len(row.ids)) for row in rows]
    labels = [row.labels + [IGNORED] * (longest - len(row.ids)) for row in rows]
    return torch.tensor(ids), torch.tensor(labels)
