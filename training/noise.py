"""What surrounds a question in real life: other words, typing errors, politeness, system prompts, long documents.

All functions draw from the `random.Random` that they are given, so a seed repeats them.
"""

import json
import random
import string
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from training.paraphrase import paraphrased

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, respectful and honest assistant.",
    "You are an assistant for people who run language models.",
    "Answer briefly.",
    "Be concise and correct.",
    "You are the support desk of a company that serves language models on GPUs.",
    "You are an expert in distributed inference. Answer the user's question.",
    "Answer in plain English. If you do not know something, say so.",
    "You answer questions about RayTRT.",
)
_OPENINGS = (
    "Please: ", "Hey, ", "Hi! ", "A question: ", "Quick question: ", "Tell me: ", "Ok. ", "Sorry, ", "Hello, ", "And ",
)  # fmt: skip
_CLOSINGS = (" Thanks!", " Please answer.", " Thank you.", " please", " thanks")
_FILL_WORDS = frozenset(
    ("the", "a", "an", "is", "are", "do", "does", "i", "to", "of", "in", "on", "my", "me", "you", "can", "for", "it")
)

_SUBJECTS = (
    "the old lighthouse", "our neighbour", "a quiet river", "the committee", "every second train", "the baker",
    "my sister", "the report", "a small island", "the orchestra", "this chapter", "the museum", "a passing cloud",
    "the gardener", "the board of the company", "a letter from Lisbon", "the third volume", "the harbour",
    "a student", "the weather station",
)  # fmt: skip
_VERBS = (
    "describes", "crosses", "remembers", "replaces", "measures", "ignores", "paints", "explains", "follows",
    "repairs", "carries", "counts", "sells", "mentions", "watches", "delays", "copies", "collects", "visits", "avoids",
)  # fmt: skip
_OBJECTS = (
    "a blue door", "the winter months", "nine boxes of apples", "the price of copper", "an unfinished bridge",
    "the history of the town", "a map without names", "several invoices", "the long way home", "a recipe for soup",
    "the minutes of the meeting", "an empty theatre", "the results of the survey", "two bicycles", "a forgotten song",
    "the rules of the game", "the northern coast", "a box of photographs", "the second paragraph", "some advice",
)  # fmt: skip
_TAILS = (
    "before noon", "in the spring", "without a word", "for the fourth time", "near the station", "with great care",
    "as the law requires", "on page {}", "in {}", "at a cost of {} crowns", "after {} days", "under section {}",
    "", "", "", "",
)  # fmt: skip
_ALPHABETS = (
    string.ascii_lowercase,
    string.printable[:94],
    "äöüßéèñçøåłžşıαβγλπдиялнст日本語中文한국어العربية🙂🚀✓→",
)


def noised(question: str, rng: random.Random) -> str:
    """Return `question` as another, hurried person might type it; in about a third of all cases unchanged."""
    text = paraphrased(question, rng) if rng.random() < 0.4 else question
    if rng.random() < 0.08:
        text = _opened(rng.choice(_OPENINGS), text)
    if rng.random() < 0.06:
        text += rng.choice(_CLOSINGS)
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.12:
        text = _without_a_fill_word(text, rng)
    if rng.random() < 0.10:
        text = _mistyped(text, rng)
    return text


def _opened(opening: str, text: str) -> str:
    goes_on = opening.endswith((", ", "And ")) and text[1:2].islower()
    return opening + (text[0].lower() + text[1:] if goes_on else text)


def _without_a_fill_word(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    fill = [index for index, word in enumerate(words) if word.lower() in _FILL_WORDS]
    if fill and len(words) > 3:
        del words[rng.choice(fill)]
    return " ".join(words)


def _mistyped(text: str, rng: random.Random) -> str:
    """Drop, double or swap one letter inside a longer word: short words and numbers carry the meaning."""
    places = [i for i in range(2, len(text) - 2) if text[i - 2 : i + 2].isalpha() and text[i : i + 2].islower()]
    if not places:
        return text
    i = rng.choice(places)
    changed = rng.choice((text[i + 1], text[i] * 2 + text[i + 1], text[i + 1] + text[i]))
    return text[:i] + changed + text[i + 2 :]


def filler(num_tokens: int, tokenizer: Tokenizer, sentences: Sequence[str], rng: random.Random) -> str:
    """Write about `num_tokens` of text that has nothing to do with the question.

    Args:
        num_tokens: Exact before spaces at both ends are taken away.
        tokenizer: Counts the tokens.
        sentences: Sentences of the corpus; they are mixed in, so that a familiar word alone means nothing.
        rng: Decides on everything.
    """

    def quotation(rng: random.Random) -> str:
        return rng.choice(sentences)

    makers: list[Callable[[random.Random], str]] = [_story, _story, _record, _salad, quotation]
    if rng.random() < 0.3:  # documents of one kind, besides mixed ones
        makers = [rng.choice(makers)]
    joint = rng.choice((" ", "\n", "\n\n"))
    ids: list[int] = []
    while len(ids) < num_tokens:
        ids += tokenizer.encode(rng.choice(makers)(rng) + joint, add_special_tokens=False).ids
    text: str = tokenizer.decode(ids[:num_tokens])
    return text.strip()


def _story(rng: random.Random) -> str:
    tail = rng.choice(_TAILS).format(rng.randrange(2000))
    sentence = " ".join(filter(None, (rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS), tail)))
    return f"{sentence[0].upper()}{sentence[1:]}."


def _record(rng: random.Random) -> str:
    key, value = _word(rng), rng.choice((rng.randrange(10_000), round(rng.random(), 3), _word(rng), rng.random() < 0.5))
    return json.dumps({key: value}) if rng.random() < 0.5 else f"{rng.randrange(100)}. {key}={value}"


def _salad(rng: random.Random) -> str:
    alphabet = rng.choice(_ALPHABETS)
    return " ".join("".join(rng.choices(alphabet, k=rng.randint(2, 9))) for _ in range(rng.randint(3, 10)))


def _word(rng: random.Random) -> str:
    return rng.choice(_SUBJECTS + _OBJECTS).split()[-1]
