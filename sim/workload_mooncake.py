"""Reader of Mooncake traces: JSON lines of timestamp (ms), input_length, output_length and hash_ids.

An id stands for 512 tokens and all before them, so it is a chained hash already. The last id of a prompt may stand for
a part of a block, which no cache keeps.

Source of the format: kvcache-ai/Mooncake, FAST25-release; Qin et al., "Mooncake: trading more storage for less
computation", FAST 2025.
"""

from pathlib import Path

import msgspec
import numpy as np

from sim.text_file import TraceError, numbered_lines
from sim.workload import SimRequest, Workload, make_workload

BLOCK_TOKENS = 512
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_mooncake(path: Path, tokens_per_block: int = BLOCK_TOKENS, *, limit: int | None = None) -> Workload:
    """Read a trace, `.xz` and `.gz` too.

    Args:
        path: The file.
        tokens_per_block: Of the engines that will be simulated; a divisor of 512.
        limit: Lines to read at most.

    Raises:
        TraceError: A line cannot be read, or the block size does not fit; names file and line.
    """
    if BLOCK_TOKENS % tokens_per_block:
        raise TraceError(
            f"{path}: tokens_per_block={tokens_per_block} does not divide the trace's blocks of {BLOCK_TOKENS}; "
            "use 512, 256, 128, 64, 32 or 16"
        )
    decoder = msgspec.json.Decoder(_Line)
    requests = []
    for number, text in numbered_lines(path, limit):
        try:
            line = decoder.decode(text)
            _check(line)
        except (msgspec.DecodeError, ValueError) as exc:
            raise TraceError(
                f"{path}:{number}: {exc}; each line must be a JSON object such as "
                '{"timestamp": 0, "input_length": 600, "output_length": 10, "hash_ids": [0, 1]}'
            ) from None
        requests.append(
            SimRequest(
                arrival_s=line.timestamp * 1e-3,
                prompt_tokens=line.input_length,
                output_tokens=line.output_length,
                hashes=_block_hashes(line.hash_ids, line.input_length, tokens_per_block),
            )
        )
    if not requests:
        raise TraceError(f"{path}: it has no requests; give a file with one JSON object a line")
    return make_workload(path.name.split(".")[0], requests, tokens_per_block)


def _check(line: _Line) -> None:
    if line.timestamp < 0 or line.input_length < 1 or line.output_length < 0:
        raise ValueError(
            f"timestamp={line.timestamp}, input_length={line.input_length} and output_length={line.output_length} must "
            "not be negative, and input_length not 0"
        )
    blocks = -(-line.input_length // BLOCK_TOKENS)
    if len(line.hash_ids) != blocks:
        raise ValueError(
            f"hash_ids has {len(line.hash_ids)} ids, but input_length={line.input_length} has {blocks} blocks of "
            f"{BLOCK_TOKENS} tokens"
        )
    if line.hash_ids and not 0 <= min(line.hash_ids) <= max(line.hash_ids) < 1 << 53:
        raise ValueError("hash_ids must be in [0, 2**53)")


def _block_hashes(hash_ids: list[int], prompt_tokens: int, tokens_per_block: int) -> list[int]:
    # Scattered over 64 bits, as real hashes are. The blocks of one id are numbered in the low bits, which is unique
    # because an odd factor is a bijection modulo 2**64.
    parts = BLOCK_TOKENS // tokens_per_block
    ids = np.asarray(hash_ids, dtype=np.uint64)[:, None] * np.uint64(parts) + np.arange(1, parts + 1, dtype=np.uint64)
    hashes: list[int] = (ids.ravel()[: prompt_tokens // tokens_per_block] * _SPREAD).tolist()
    return hashes
