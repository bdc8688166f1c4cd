"""Synthesiser: workloads from a description of who talks to the service, and how.

Every conversation begins with one of a few system prompts, some more popular than others, perhaps a document, and goes
on for some turns, each of which repeats all before it: that is a chat; with short gaps and long turns it is an agent at
work; with one turn it is a question about a document. Prompts are made of random token ids and hashed by the production
function, outputs included, so that a later turn finds what an earlier one has left in the cache.

Arrivals do not wait for the simulated service: a turn follows the one before after the time that an answer usually
takes, and the gap. So all policies are given exactly the same requests at the same moments.
"""

import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from serve.core.blocks import ROOT, block_hashes, chain_seed
from serve.core.strict_model import StrictModel
from sim.workload import SimRequest, Workload, make_workload

_VOCABULARY = 1 << 17


class TokenCounts(StrictModel):
    """Log-normal numbers of tokens."""

    mean: PositiveFloat = Field(description="Mean, before it is cut.")
    deviation: NonNegativeFloat = Field(default=0.5, description="Standard deviation, as a share of the mean.")
    max: PositiveInt = Field(default=131072, description="More become so many.")

    def draw(self, rng: np.random.Generator) -> int:
        """Draw a number, 1 at least."""
        variance = np.log1p(self.deviation**2)
        drawn = rng.lognormal(np.log(self.mean) - variance / 2, np.sqrt(variance))
        return int(min(self.max, max(1.0, round(drawn))))


class Shared(StrictModel):
    """A set of texts that requests begin with; the k-th most popular is chosen with probability ~ 1 / k**zipf."""

    count: PositiveInt = Field(description="How many there are.")
    tokens: TokenCounts = Field(description="How long they are.")
    zipf: NonNegativeFloat = Field(default=1.0, description="0: all are equally popular.")


class Arrivals(StrictModel):
    """When conversations begin: a Gamma renewal process, and bursts."""

    per_s: PositiveFloat = Field(description="Mean rate of conversations.")
    variation: PositiveFloat = Field(
        default=1.0, description="Coefficient of variation of the times between them: 1 is Poisson, more is bursty."
    )
    burst_every_s: PositiveFloat | None = Field(default=None, description="Mean time between bursts; None: none.")
    burst_size: PositiveInt = Field(default=32, description="Conversations that begin at once in a burst.")
    burst_shares_prompt: bool = Field(
        default=True, description="Whether all conversations of a burst have the same system prompt."
    )


class Stream(StrictModel):
    """One kind of conversations."""

    name: str = Field(default="", description="Tenant of its requests.")
    arrivals: Arrivals = Field(description="When conversations begin.")
    system_prompts: Shared | None = Field(default=None, description="What conversations begin with; None: nothing.")
    documents: Shared | None = Field(default=None, description="What follows the system prompt; None: nothing.")
    turns: PositiveFloat = Field(default=1.0, ge=1, description="Mean number of turns; geometric.")
    message_tokens: TokenCounts = Field(description="What each turn adds: a question, or a tool's result.")
    output_tokens: TokenCounts = Field(description="Length of answers.")
    gap_s: NonNegativeFloat = Field(
        default=0.0, description="Mean time from an answer to the next turn, exponential: thinking, or a tool at work."
    )
    max_tokens: NonNegativeInt = Field(default=0, description="Output limit that the client names; 0: none.")
    context_tokens: PositiveInt = Field(default=131072, description="A conversation ends before it is longer.")
    sessions: bool = Field(default=True, description="Whether requests carry the name of their conversation.")
    priority: int = Field(default=0, description="Lower is served first, where requests have to wait.")
    loras: NonNegativeInt = Field(default=0, description="LoRA adapters, one for each conversation; 0: none.")


class SyntheticWorkload(StrictModel):
    """A workload to be made."""

    name: str = Field(default="synthetic", description="For reports.")
    seed: NonNegativeInt = Field(default=0, description="Another seed gives other requests of the same kind.")
    duration_s: PositiveFloat = Field(
        default=600.0, description="Requests arrive during this time; conversations that would go on are cut."
    )
    answer_s: NonNegativeFloat = Field(default=0.5, description="Assumed time to the first token, for later turns")
    answer_token_s: NonNegativeFloat = Field(default=0.02, description="... and for each token of an answer.")
    streams: tuple[Stream, ...] = Field(min_length=1, description="Kinds of conversations, at the same time.")


def synthesise(settings: SyntheticWorkload, tokens_per_block: int, *, limit: int | None = None) -> Workload:
    """Make a workload. The same settings give the same requests.

    Args:
        settings: What it is like.
        tokens_per_block: Of the engines that will be simulated.
        limit: Requests to keep at most, the first ones.
    """
    requests: list[SimRequest] = []
    for number, stream in enumerate(settings.streams):
        rng = np.random.default_rng([settings.seed, number])
        requests += _StreamMaker(settings, stream, number, tokens_per_block, rng).requests()
    kept = (request for request in requests if request.arrival_s <= settings.duration_s)
    return make_workload(settings.name, kept, tokens_per_block).first(limit)


class _StreamMaker:
    def __init__(
        self, settings: SyntheticWorkload, stream: Stream, number: int, size: int, rng: np.random.Generator
    ) -> None:
        self._settings, self._stream, self._number, self._size, self._rng = settings, stream, number, size, rng
        self._texts: dict[tuple[str, int], npt.NDArray[np.uint32]] = {}
        self._conversations = 0

    def requests(self) -> Iterator[SimRequest]:
        for at_s, prompt in self._starts():
            yield from self._conversation(at_s, prompt)

    def _starts(self) -> Iterator[tuple[float, int | None]]:
        """Yield when conversations begin, and with which system prompt, if the burst decides it."""
        arrivals, duration_s = self._stream.arrivals, self._settings.duration_s
        shape = 1.0 / arrivals.variation**2
        at_s = 0.0
        while (at_s := at_s + self._rng.gamma(shape, 1.0 / (arrivals.per_s * shape))) < duration_s:
            yield at_s, None
        if arrivals.burst_every_s is None:
            return
        at_s = 0.0
        while (at_s := at_s + self._rng.exponential(arrivals.burst_every_s)) < duration_s:
            shared = self._stream.system_prompts if arrivals.burst_shares_prompt else None
            prompt = None if shared is None else self._choose(shared)
            for _ in range(arrivals.burst_size):
                yield at_s, prompt

    def _conversation(self, at_s: float, prompt: int | None) -> Iterator[SimRequest]:
        stream, settings, rng = self._stream, self._settings, self._rng
        self._conversations += 1
        session = f"{self._number}-{self._conversations}" if stream.sessions else ""
        lora = f"lora-{int(rng.integers(stream.loras))}" if stream.loras else ""
        chain = _Chain(self._size, chain_seed(lora=lora) if lora else ROOT)
        if stream.system_prompts is not None:
            number = self._choose(stream.system_prompts) if prompt is None else prompt
            chain.add(self._text("system", stream.system_prompts, number))
        if stream.documents is not None:
            chain.add(self._text("document", stream.documents, self._choose(stream.documents)))
        for _ in range(int(rng.geometric(1.0 / stream.turns))):
            chain.add(self._tokens(stream.message_tokens.draw(rng)))
            output = stream.output_tokens.draw(rng)
            if chain.tokens + output > stream.context_tokens:
                return
            prompt_tokens, blocks = chain.tokens, len(chain.hashes)
            chain.add(self._tokens(output))
            yield SimRequest(
                arrival_s=at_s,
                prompt_tokens=prompt_tokens,
                output_tokens=output,
                hashes=tuple(chain.hashes[:blocks]),
                max_tokens=max(output, stream.max_tokens) if stream.max_tokens else 0,
                output_hashes=tuple(chain.hashes[blocks:]),
                session=session,
                tenant=stream.name,
                lora=lora,
                priority=stream.priority,
            )
            at_s += settings.answer_s + output * settings.answer_token_s
            at_s += rng.exponential(stream.gap_s) if stream.gap_s else 0.0

    def _choose(self, shared: Shared) -> int:
        weights = 1.0 / np.arange(1, shared.count + 1) ** shared.zipf
        return int(self._rng.choice(shared.count, p=weights / weights.sum()))

    def _text(self, kind: str, shared: Shared, number: int) -> npt.NDArray[np.uint32]:
        """Return a text that all conversations share; the same whoever asks first."""
        if (kind, number) not in self._texts:
            own = random.Random(f"{self._settings.seed} {self._number} {kind} {number}")
            rng = np.random.default_rng(own.getrandbits(64))
            self._texts[kind, number] = _random_tokens(rng, shared.tokens.draw(rng))
        return self._texts[kind, number]

    def _tokens(self, count: int) -> npt.NDArray[np.uint32]:
        return _random_tokens(self._rng, count)


class _Chain:
    """Hashes of a text that grows."""

    def __init__(self, size: int, parent: int) -> None:
        self._size = size
        self._parent = parent
        self._rest = np.empty(0, dtype=np.uint32)  # tokens after the last full block
        self.tokens = 0
        self.hashes: list[int] = []

    def add(self, tokens: npt.NDArray[np.uint32]) -> None:
        """Append tokens."""
        self.tokens += len(tokens)
        rest = np.concatenate((self._rest, tokens))
        new = block_hashes(rest, self._size, self.hashes[-1] if self.hashes else self._parent).tolist()
        self.hashes += new
        self._rest = rest[len(new) * self._size :]


def _random_tokens(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint32]:
    return rng.integers(_VOCABULARY, size=count, dtype=np.uint32)
