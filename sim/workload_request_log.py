"""Reader of the gateway's request log (`serve.core.request_log`)."""

from pathlib import Path

from serve.core.request_log import LoggedRequest, RequestLogFormat, unpack_hashes
from sim.text_file import TraceError, numbered_lines
from sim.workload import SimRequest, Workload, make_workload


def read_request_log(
    path: Path, tokens_per_block: int | None = None, *, model: str | None = None, limit: int | None = None
) -> Workload:
    """Read a log, `.xz` and `.gz` too.

    Args:
        path: The file.
        tokens_per_block: Of the engines that will be simulated: a multiple of the log's; None: the log's.
        model: Whose requests; None: there are those of one model only.
        limit: Lines to read at most.

    Raises:
        TraceError: A line cannot be read, no request is left, or they do not go together; names file and line.
    """
    lines = RequestLogFormat()
    requests: list[SimRequest] = []
    size, first_model = 0, model
    for number, text in numbered_lines(path, limit):
        try:
            logged = lines.decode(text)
        except ValueError as exc:
            raise TraceError(f"{path}:{number}: {exc}; give a log that RayTRT's gateway has written") from None
        if model is not None and logged.model != model:
            continue
        size, first_model = size or logged.tokens_per_block, first_model if first_model is not None else logged.model
        if logged.model != first_model:
            raise TraceError(
                f"{path}:{number}: a request to {logged.model!r} after one to {first_model!r}; choose by --log-model"
            )
        if logged.tokens_per_block != size:
            raise TraceError(
                f"{path}:{number}: tokens_per_block={logged.tokens_per_block} after {size}; split the file where the "
                "configuration changed"
            )
        requests.append(_request(logged))
    if not requests:
        raise TraceError(f"{path}: it has no requests{'' if model is None else f' to {model!r}'}; choose another file")
    return _in_blocks(path, make_workload(path.name.split(".")[0], requests, size), tokens_per_block)


def _in_blocks(path: Path, workload: Workload, tokens_per_block: int | None) -> Workload:
    size = workload.tokens_per_block
    if tokens_per_block is None:
        return workload
    if tokens_per_block % size:
        raise TraceError(
            f"{path}: tokens_per_block={tokens_per_block} is no multiple of the log's {size}; use {size} or {2 * size}"
        )
    return workload.coarser(tokens_per_block)


def _request(logged: LoggedRequest) -> SimRequest:
    blocks = logged.prompt_tokens // logged.tokens_per_block
    hashes = unpack_hashes(logged.prompt_hashes)
    if not hashes and blocks:  # the gateway did not know them: a prompt that shares nothing
        hashes = [(logged.route_id * 0x9E3779B97F4A7C15 + block) & (1 << 64) - 1 for block in range(blocks)]
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
