"""Reader of the gateways' request logs (`serve.core.request_log`)."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from serve.core.request_log import LoggedRequest, RequestLogFormat, unpack_hashes
from sim.text_file import TraceError, numbered_lines
from sim.workload import SimRequest, Workload, make_workload

_SCATTER, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1

logger = logging.getLogger(__name__)


def read_request_log(
    paths: Sequence[Path], tokens_per_block: int | None = None, *, model: str | None = None, limit: int | None = None
) -> Workload:
    """Read a log, `.xz` and `.gz` too. A request that failed without a token gets an output of mean length.

    Args:
        paths: Files of all gateways, and the older ones that they have put aside; in any order.
        tokens_per_block: Of the engines that will be simulated: a multiple of the log's; None: the log's.
        model: Whose requests; None: there are those of one model only.
        limit: Requests to keep at most, the first ones.

    Raises:
        TraceError: A line cannot be read, no request is left, or they do not go together; names file and line.
    """
    reader = _LogReader(model)
    requests = [_request(logged) for path in paths for logged in reader.read(path)]
    if not requests:
        raise TraceError(
            f"{paths[0]}: it has no requests{'' if model is None else f' to {model!r}'}; choose another file"
        )
    workload = make_workload(paths[0].name.split(".")[0], _with_outputs(requests), reader.tokens_per_block).first(limit)
    if tokens_per_block is None:
        return workload
    if tokens_per_block % reader.tokens_per_block:
        raise TraceError(
            f"{paths[0]}: tokens_per_block={tokens_per_block} is no multiple of the log's {reader.tokens_per_block}; "
            f"use {reader.tokens_per_block} or {2 * reader.tokens_per_block}"
        )
    return workload.coarser(tokens_per_block)


class _LogReader:
    """Reads lines that must go together: requests to one model, in blocks of one size."""

    def __init__(self, model: str | None) -> None:
        self._wanted = self._model = model
        self._lines = RequestLogFormat()
        self.tokens_per_block = 0

    def read(self, path: Path) -> Iterator[LoggedRequest]:
        for number, text in numbered_lines(path):
            try:
                logged = self._lines.decode(text)
            except ValueError as exc:
                if "truncated" in str(exc):  # a gateway was killed, a disk was full, or the log is being written
                    logger.warning("%s:%d: this line is not complete; it is left out", path, number)
                    continue
                raise TraceError(f"{path}:{number}: {exc}; give a log that RayTRT's gateway has written") from None
            if self._wanted is None or logged.model == self._wanted:
                self._check(logged, f"{path}:{number}")
                yield logged

    def _check(self, logged: LoggedRequest, place: str) -> None:
        if self._model is None:
            self._model = logged.model
        self.tokens_per_block = self.tokens_per_block or logged.tokens_per_block
        if logged.model != self._model:
            raise TraceError(
                f"{place}: a request to {logged.model!r} after one to {self._model!r}; choose by --log-model"
            )
        if logged.tokens_per_block != self.tokens_per_block:
            raise TraceError(
                f"{place}: tokens_per_block={logged.tokens_per_block} after {self.tokens_per_block}; leave out what "
                "was logged before the configuration changed"
            )


def _with_outputs(requests: Sequence[SimRequest]) -> list[SimRequest]:
    known = [request.output_tokens for request in requests if request.output_tokens]
    mean = round(sum(known) / len(known)) if known else 1
    return [
        request
        if request.output_tokens
        else replace(request, output_tokens=min(mean, request.max_tokens or mean), output_hashes=())
        for request in requests
    ]


def _request(logged: LoggedRequest) -> SimRequest:
    blocks = logged.prompt_tokens // logged.tokens_per_block
    hashes = unpack_hashes(logged.prompt_hashes)
    if not hashes and blocks:  # the gateway did not know them: a prompt that shares nothing
        hashes = [(logged.route_id * _SCATTER + block) & _MASK for block in range(blocks)]
    output_hashes = unpack_hashes(logged.output_hashes)
    # The last token's keys and values are never computed.
    written = max(logged.prompt_tokens, logged.prompt_tokens + logged.output_tokens - 1)
    if len(output_hashes) < written // logged.tokens_per_block - blocks:
        output_hashes = []
    return SimRequest(
        arrival_s=logged.arrival_s,
        prompt_tokens=logged.prompt_tokens,
        output_tokens=logged.output_tokens,
        hashes=hashes,
        max_tokens=logged.max_tokens,
        output_hashes=output_hashes,
        session=logged.session,
        tenant=logged.tenant,
        lora=logged.lora,
        priority=logged.priority,
        measured_ttft_s=logged.ttft_s,
        measured_duration_s=logged.duration_s,
    )
