"""Rewrites questions by rule: other openings, other words. What a person would type without changing the meaning.

Rules teach a small model that the opening of a question matters less than what it is about, which a few paraphrases by
hand for each answer do not.
"""

import random
import re

_TO_DO = (
    "How can I {}?", "How could I {}?", "How would I {}?", "How does one {}?", "How to {}?", "Tell me how to {}.",
    "I want to {}.", "I would like to {}.", "What is the way to {}?", "Is there a way to {}?", "What must I do to {}?",
    "Could you tell me how to {}?", "Explain how to {}.", "I need to {}.", "What do I do to {}?",
)  # fmt: skip
_THING = (
    "What's {}?", "What exactly is {}?", "Tell me more about {}.", "Could you explain {}?", "Describe {}.",
    "Explain {}", "Please explain {}.", "Give me an explanation of {}.", "I would like to know what {} is.",
    "Do you know what {} is?", "Can you tell me what {} is?", "What is {} about?",
)  # fmt: skip
_RULES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(pattern), forms)
    for pattern, forms in (
        (r"How (?:do|can) I (.+)\?", _TO_DO),
        (r"What does (.+) mean\?", ("What is meant by {}?", "What is the meaning of {}?", "What do you mean by {}?")),
        (
            r"What does (.+) do\?",
            (
                "What is {} for?",
                "What is the purpose of {}?",
                "What is the job of {}?",
                "What can {} do?",
                "Describe {}.",
            ),
        ),
        (r"How does (.+) work\?", ("Explain how {} works.", "How exactly does {} work?", "In which way does {} work?")),
        (r"What (?:is|are) (?!the difference|wrong)(.+)\?", _THING),
        (
            r"What is the difference between (.+)\?",
            ("How do {} differ?", "Compare {}.", "What distinguishes {}?", "What sets {} apart?"),
        ),
        (
            r"What happens (?:when|if) (.+)\?",
            ("What if {}?", "What happens if {}?", "What happens when {}?", "What will happen when {}?", "And if {}?"),
        ),
        (
            r"Can I (.+)\?",
            (
                "Could I {}?",
                "Is it possible to {}?",
                "Am I able to {}?",
                "May I {}?",
                "I want to {}.",
                "Is there a way to {}?",
            ),
        ),
        (r"Which (.+) are there\?", ("What {} are there?", "List all {}.", "Name the {}.", "What kinds of {} exist?")),
        (r"Which (.+)\?", ("What {}?", "Tell me which {}.")),
        (r"Where (?:is|are) (.+)\?", ("Where do I find {}?", "Where can I find {}?", "I am looking for {}.")),
        (
            r"(?:Show|Give) me (.+?)[.?]?",
            ("Could you show me {}?", "Please give me {}.", "I would like to see {}.", "I need {}.", "Do you have {}?"),
        ),
        (r"Explain (.+?)\.?", _THING),
        (r"Why (.+)\?", ("For what reason {}?", "Can you tell me why {}?", "What is the reason why {}?")),
    )
)

_WORDS = {
    "answer": ("response", "reply"), "answers": ("responses", "replies"), "big": ("large",),
    "build": ("create", "make"), "change": ("modify", "adjust"), "check": ("verify", "test"),
    "choose": ("select", "pick"), "client": ("user", "caller"), "configure": ("set up", "set"),
    "control": ("manage",), "delete": ("remove",), "die": ("fail", "crash"), "dies": ("fails", "crashes"),
    "error": ("failure", "problem"), "explain": ("describe",), "fast": ("quick",), "faster": ("quicker",),
    "get": ("have", "obtain"), "happens": ("occurs",), "improve": ("better",), "increase": ("raise", "improve"),
    "large": ("big",), "limit": ("restrict",), "list": ("show", "name"), "lower": ("reduce", "decrease", "cut"),
    "machine": ("computer", "server"), "make": ("create",), "many": ("lots of",), "measure": ("determine",),
    "need": ("require",), "problem": ("issue",), "raise": ("increase",), "reduce": ("lower", "decrease"),
    "request": ("query", "call"), "requests": ("queries", "calls"), "run": ("start", "use"),
    "see": ("find out", "look at"), "send": ("make",), "set": ("configure", "define"),
    "several": ("multiple", "many"), "show": ("display",), "slow": ("sluggish",), "small": ("little",),
    "start": ("launch", "begin"), "stop": ("end", "halt"), "test": ("try", "check"), "try": ("test",),
    "turn": ("switch",), "update": ("upgrade",), "use": ("work with", "apply"), "write": ("create",),
}  # fmt: skip


def paraphrased(question: str, rng: random.Random) -> str:
    """Return `question` in other words, drawn from `rng`; unchanged where no rule applies."""
    text = question
    if rng.random() < 0.7:
        text = _reopened(text, rng)
    if text == question or rng.random() < 0.3:
        text = _reworded(text, rng)
    return text


def _reopened(question: str, rng: random.Random) -> str:
    for pattern, forms in _RULES:
        if match := pattern.fullmatch(question):
            return rng.choice(forms).format(match.group(1))
    return question


def _reworded(question: str, rng: random.Random) -> str:
    words = question.split(" ")
    known = [index for index, word in enumerate(words) if word.lower().strip("?.!,") in _WORDS]
    if known:
        index = rng.choice(known)
        core = words[index].strip("?.!,")
        other = rng.choice(_WORDS[core.lower()])
        words[index] = words[index].replace(core, other.capitalize() if core[0].isupper() else other)
    return " ".join(words)
