"""pump: reads one request's responses to their end, and puts deltas into its inbox."""

import asyncio
import logging
import time
from collections.abc import Callable

from serve.engines.trtllm.flights import Flight, Flights
from serve.engines.trtllm.loaded import Loaded
from serve.engines.trtllm.scoring import prompt_logprobs
from serve.errors import EngineDead, RayTRTError, RequestError, StreamLost

_log = logging.getLogger(__name__)

ABORT_S = 30.0  # how long an aborted request is counted as running, if the engine never says that it ended


async def pump(
    flight: Flight,
    loaded: Loaded,
    flights: Flights,
    on_death: Callable[[EngineDead], None],
    on_progress: Callable[[], None],
) -> None:
    """Read one request to its end; it is aborted if it cannot be read on.

    Args:
        flight: The request.
        loaded: The engine.
        flights: Where it counts.
        on_death: Told if the engine cannot go on; ends all requests.
        on_progress: Told at each response.
    """
    try:
        async for response in flight.output:  # the same object each time, changed in place
            on_progress()
            if flight.is_left:
                continue  # read on, so that its end is known
            if await _take(flight, response, flights):
                return
        if not flight.is_left:
            raise StreamLost("the engine ended a request without a reason")
    except asyncio.CancelledError:
        raise
    except RayTRTError as exc:  # this stream alone
        _log.error("Request %s cannot go on: %s", flight.request.request_id, exc)
        flight.inbox.fail(exc)
        loaded.abort(flight)
    except Exception as exc:
        error = loaded.translated(exc)
        if isinstance(error, EngineDead):
            on_death(error)
        flight.inbox.fail(error)
    finally:
        flight.is_over = True
        loaded.seeds.end(flight.name, time.monotonic())
        flights.remove(flight)


async def _take(flight: Flight, response: object, flights: Flights) -> bool:
    """Put what a response added into the inbox; return whether it was the last.

    Raises:
        StreamLost: The response cannot be read, for whatever reason; others can.
    """
    try:
        return await _read(flight, response, flights)
    except RayTRTError:
        raise
    except Exception as exc:
        _log.exception("A response to request %s cannot be read.", flight.request.request_id)
        raise StreamLost(f"the engine's response cannot be read: {type(exc).__name__}: {exc}") from exc


async def _read(flight: Flight, response: object, flights: Flights) -> bool:
    output = response.outputs[0]  # type: ignore[attr-defined]
    scores = None
    params = flight.request.sampling
    if params.prompt_logprobs is not None and not flight.has_begun:
        logits = response.context_logits  # type: ignore[attr-defined]
        if logits is None:
            if output.finish_reason is None:
                return False  # the prompt's scores go with the first delta
            raise RequestError("prompt_logprobs: the engine returned no logits of the prompt", "prompt_logprobs")
        prompt = flight.request.prompt_array().tolist()
        scores = await asyncio.to_thread(prompt_logprobs, logits, prompt, params.prompt_logprobs)
    cached = min(int(getattr(response, "cached_tokens", 0) or 0), flight.request.prompt_tokens - 1)
    delta = flight.reader.read(output, time.monotonic(), cached_tokens=cached, prompt_logprobs=scores)
    if delta is None:
        return False
    is_last = delta.finish_reason is not None
    flights.told(flight, delta)
    if is_last:
        flight.is_over = True
        flights.remove(flight)  # before the reader hears of the end
    flight.inbox.push(delta)
    return is_last
