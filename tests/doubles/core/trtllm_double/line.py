"""Which line of TensorRT-LLM this process imitates: chosen once, by the `tensorrt_llm` package that was imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """What differs in behaviour; what differs in names is in the data files.

    Attributes:
        name: As the signature files are called.
        version: What `tensorrt_llm.__version__` says.
        notices_death: A killed worker ends all requests with EngineDeadError (reference 2.5).
        pushes: Statistics and events are pushed every 0.2 s, and not before the first request (2.6); else pulled.
        describes_prompt: Prompt logprobs contain the token that really follows; 1.2.x gives the likeliest ones only.
        zero_logprobs: `logprobs=0` gives the chosen token's; 1.2.x takes it for "none" (`bool(logprobs)`).
    """

    name: str
    version: str
    notices_death: bool
    pushes: bool
    describes_prompt: bool
    zero_logprobs: bool

    @property
    def is_newest(self) -> bool:
        return self.name == "newest"


V1_2 = Line("1.2.x", "1.2.1", notices_death=False, pushes=True, describes_prompt=False, zero_logprobs=False)
NEWEST = Line("newest", "1.4.0rc1", notices_death=True, pushes=False, describes_prompt=True, zero_logprobs=True)

_chosen: list[Line] = []


def choose(name: str) -> None:
    """Imitate a line from now on; called before anything else of the double is imported."""
    line = {V1_2.name: V1_2, NEWEST.name: NEWEST}[name]
    if _chosen and _chosen[0] is not line:
        raise ImportError(f"this process imitates TensorRT-LLM {_chosen[0].name} already; use a fresh one for {name}")
    _chosen[:] = [line]


def current() -> Line:
    """Return the line that this process imitates."""
    return _chosen[0]
