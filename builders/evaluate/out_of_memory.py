"""PURE: whether a message says that memory ran out. Libraries have no exception of their own for it in common."""

import re

_OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|std::bad_alloc|cannot allocate memory|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CUBLAS_STATUS_ALLOC_FAILED|\bMemoryError\b|no available memory|insufficient memory|not enough (gpu )?memory"
    r"|not fit (in )?(the |gpu )?memory|more than available memory",
    re.IGNORECASE,
)


def says_out_of_memory(text: str) -> bool:
    """Whether a message, or a log, says so."""
    return _OUT_OF_MEMORY.search(text) is not None
