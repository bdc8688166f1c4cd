"""Reader of Azure's LLM traces: CSV of TIMESTAMP, ContextTokens and GeneratedTokens. Prompts share nothing.

Source of the format: Azure/AzurePublicDataset, AzureLLMInferenceDataset2023; Patel et al., "Splitwise: efficient
generative LLM inference using phase splitting", ISCA 2024.
"""

import csv
from datetime import datetime
from pathlib import Path

import numpy as np

from serve.core.blocks import block_hashes
from sim.text_file import TraceError, numbered_lines
from sim.workload import SimRequest, Workload, make_workload

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_EXAMPLE = "2023-11-16 18:15:46.6805900,374,44"


def read_azure(path: Path, tokens_per_block: int, *, limit: int | None = None) -> Workload:
    """Read a trace, `.xz` and `.gz` too.

    Args:
        path: The file.
        tokens_per_block: Of the engines that will be simulated.
        limit: Requests to read at most.

    Raises:
        TraceError: A line cannot be read; names file and line.
    """
    lines = numbered_lines(path, None if limit is None else limit + 1)
    number, header = next(lines, (1, b""))
    if tuple(_cells(header)) != _COLUMNS:
        raise TraceError(f"{path}:{number}: the first line must be {','.join(_COLUMNS)}, not {header[:80]!r}")
    requests: list[SimRequest] = []
    for number, line in lines:
        try:
            requests.append(_request(_cells(line), len(requests), tokens_per_block))
        except ValueError as exc:
            raise TraceError(f"{path}:{number}: {exc}; each line must be like {_EXAMPLE}") from None
    if not requests:
        raise TraceError(f"{path}: it has no requests; give a file with lines like {_EXAMPLE}")
    return make_workload(path.name.split(".")[0], requests, tokens_per_block)


def _cells(line: bytes) -> list[str]:
    return next(csv.reader([line.decode(errors="replace").strip()]), [])


def _request(cells: list[str], number: int, tokens_per_block: int) -> SimRequest:
    if len(cells) != len(_COLUMNS):
        raise ValueError(f"{len(cells)} columns instead of {len(_COLUMNS)}")
    # Seven digits of a second are one more than Python reads.
    moment, _, fraction = cells[0].partition(".")
    at = datetime.fromisoformat(moment + "+00:00").timestamp() + float(f"0.{fraction or 0}")
    prompt_tokens, output_tokens = int(cells[1]), int(cells[2])
    if prompt_tokens < 1 or output_tokens < 0:
        raise ValueError(
            f"ContextTokens={prompt_tokens} must be positive, GeneratedTokens={output_tokens} not negative"
        )
    # Tokens that nobody else has.
    tokens = np.arange(prompt_tokens, dtype=np.uint32)
    tokens[0] = number
    return SimRequest(at, prompt_tokens, output_tokens, block_hashes(tokens, tokens_per_block).tolist())
