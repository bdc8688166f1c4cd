"""RequestOutput: a future and an iterator over one object whose state is updated in place (reference 2.2, 2.3)."""

import enum
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from trtllm_double import signatures
from trtllm_double.async_queue import AsyncQueue, running_loop
from trtllm_double.engine_request import EngineResponse
from trtllm_double.errors import EngineDeadError, RequestError


class MetricNames(enum.Enum):
    """Keys of `metrics_dict`: members, not strings (reference 6.3)."""

    TTFT = "ttft"
    TPOT = "tpot"
    E2E = "e2e"
    REQUEST_QUEUE_TIME = "request_queue_time"


@dataclass(slots=True)
class Logprob:
    """Log probability of a token, and its rank in the vocabulary from 1."""

    logprob: float
    rank: int | None = None


class _CompletionBase:
    """What CompletionOutput has beside its fields. Diffs are of the last processed response only."""

    _last_text: int = 0
    _last_tokens: int = 0
    _last_logprobs: int = 0
    token_ids: list[int]
    text: str
    logprobs: list[Any]

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text :]

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_tokens :]

    @property
    def logprobs_diff(self) -> list[Any]:
        return self.logprobs[self._last_logprobs :]


CompletionOutput: Any = signatures.make_dataclass(
    "CompletionOutput", signatures.runtime["CompletionOutput"], bases=(_CompletionBase,)
)


def _named(entries: list[tuple[int, float, int]]) -> dict[int, Logprob]:
    return {token: Logprob(logprob, rank) for token, logprob, rank in entries}


@dataclass
class _Deliveries:
    """Where responses arrive: an async queue only if a loop runs where the request is made."""

    sync: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)
    on_loop: AsyncQueue | None = None


class RequestOutput:
    """Made by `generate_async`; one object for the life of a request."""

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        sampling_params: Any,
        *,
        streaming: bool,
        executor: Any,
        tokenizer: Any,
        on_error: Callable[[Any], None],
        wants_metrics: bool = False,
    ) -> None:
        self.request_id = self.id = request_id
        self.prompt, self.prompt_token_ids = prompt, prompt_token_ids
        self.sampling_params = sampling_params
        self.outputs = [CompletionOutput(0)]
        self.context_logits: Any = None
        self.disaggregated_params: Any = None
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.metrics_dict: dict[Any, float] = {}
        if "error" in signatures.runtime["RequestOutput"]:
            self.error: str | None = None
        if "mm_embedding_handle" in signatures.runtime["RequestOutput"]:
            self.mm_embedding_handle: Any = None
        self._streaming, self._tokenizer, self._on_error = streaming, tokenizer, on_error
        self._wants_metrics = wants_metrics
        self._executor = weakref.ref(executor)
        self._done = self._aborted = False
        self._awaited = self._iterated = False
        self._full_text = ""
        self._deliveries = _Deliveries(on_loop=AsyncQueue() if running_loop() else None)

    @property
    def finished(self) -> bool:
        return self._done

    @property
    def avg_decoded_tokens_per_iter(self) -> float | None:
        return self.outputs[0].length / self.decoding_iter if self.decoding_iter else None

    def abort(self) -> None:
        """Ask for the end; it comes later, with finish_reason 'cancelled' (reference 2.4)."""
        executor = self._executor()
        assert executor is not None, "The executor is not set for this result."
        executor.abort_request(self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def clear_logprob_params(self) -> None:
        """Nothing to clear here."""

    def result(self, timeout: float | None = None) -> "RequestOutput":
        """Wait for the end. The timeout is ignored, as in the versions read (reference 2.3)."""
        while not self._done:
            self._handle(self._next_sync())
        return self

    async def aresult(self) -> "RequestOutput":
        assert not self._iterated, "double: do not mix `await out` with iteration (reference 2.3)"
        self._awaited = True
        while not self._done:
            await self._step()
        return self

    def __await__(self) -> Generator[Any, None, "RequestOutput"]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator["RequestOutput"]:
        return self

    def __next__(self) -> "RequestOutput":
        if self._done:
            raise StopIteration
        self._handle(self._next_sync())
        return self

    def __aiter__(self) -> AsyncIterator["RequestOutput"]:
        return self

    async def __anext__(self) -> "RequestOutput":
        assert not self._awaited, "double: do not mix `await out` with iteration (reference 2.3)"
        self._iterated = True
        if self._done:
            raise StopAsyncIteration
        await self._step()
        return self

    def __hash__(self) -> int:
        return hash(self.request_id)

    def __repr__(self) -> str:
        return f"RequestOutput(request_id={self.request_id}, outputs={self.outputs}, finished={self.finished})"

    def deliver(self, item: Any) -> AsyncQueue | None:
        """Put a response; return the async queue whose reader has to be woken."""
        on_loop = self._deliveries.on_loop
        if on_loop is None:
            self._deliveries.sync.put(item)
        else:
            on_loop.put(item)
        return on_loop

    @property
    def loop(self) -> Any:
        return self._deliveries.on_loop.loop if self._deliveries.on_loop else None

    async def _step(self) -> None:
        assert self._deliveries.on_loop is not None, (
            "The asyncio event loop was not present during initialization, so async operations are not available."
        )
        self._handle(await self._deliveries.on_loop.get())

    def _next_sync(self) -> Any:
        assert self._deliveries.on_loop is None, "double: result() of a request that was made on an event loop"
        return self._deliveries.sync.get()

    def _handle(self, item: Any) -> None:
        if isinstance(item, EngineDeadError):
            self._done = True
            raise item
        response: EngineResponse = item
        if response.error is not None:
            self._done = True
            if hasattr(self, "error"):
                self.error = response.error
            raise RequestError(response.error)
        self._done = response.is_final
        self.decoding_iter, self.cached_tokens = response.decoding_iter, response.cached_tokens
        self._add_tokens(response)
        self._finish(response)
        self._add_text()
        self._on_error(None)

    def _add_tokens(self, response: EngineResponse) -> None:
        output = self.outputs[0]
        output._last_tokens = len(output.token_ids)
        output.token_ids.extend(response.tokens)
        output.cumulative_logprob = response.cumulative_logprob if response.logprobs is not None else None
        if response.logprobs is not None:
            output._last_logprobs = len(output.logprobs)
            output.logprobs.extend(_named(entries) for entries in response.logprobs)
        if response.prompt_logprobs is not None:
            output.prompt_logprobs = [_named(entries) for entries in response.prompt_logprobs]
        if response.context_logits is not None:
            self.context_logits = _tensor(response.context_logits)
        if response.generation_logits is not None:
            output.generation_logits = _tensor(response.generation_logits)

    def _finish(self, response: EngineResponse) -> None:
        output = self.outputs[0]
        if response.finish is None:
            return
        if self._wants_metrics:
            self.metrics_dict = {MetricNames(name): value for name, value in response.metrics.items()}
        names = {"END_ID": "stop", "STOP_WORDS": "stop", "LENGTH": "length", "CANCELLED": "cancelled"}
        output.finish_reason = names[response.finish]
        if response.finish == "STOP_WORDS":
            for reason, words in self.sampling_params._get_stop_reasons_and_words():
                if output.token_ids[-len(words) :] == words:
                    output.stop_reason = reason
                    if not self.sampling_params.include_stop_str_in_output:
                        output.token_ids = output.token_ids[: -len(words)]
                    break

    def _add_text(self) -> None:
        """Text is cumulative, and is cut at a stop string: it can shrink below what was streamed."""
        output, params = self.outputs[0], self.sampling_params
        if self._tokenizer is None or not params.detokenize:
            return
        output._last_text = len(output.text)
        text = self._tokenizer.decode(output.token_ids, skip_special_tokens=params.skip_special_tokens)
        output.text = text.rstrip("\ufffd") if not self._done else text
        stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        for stop in stops:
            at = output.text.find(stop)
            if at >= 0 and not (self._done and output.finish_reason != "stop"):
                output.text = output.text[: at + (len(stop) if params.include_stop_str_in_output else 0)]
                output.finish_reason, output.stop_reason = "stop", stop
                if not self._done:
                    self.abort()
                    self._done = True
                return


def _tensor(array: Any) -> Any:
    """Return a torch.Tensor, if torch can be imported; else the numpy array."""
    try:
        import torch
    except ImportError:
        return array
    return torch.from_numpy(array)
