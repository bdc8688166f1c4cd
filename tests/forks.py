"""Processes for tests in milliseconds, forked from one that has imported everything and has no threads.

`multiprocessing` has one such server a process, and it imports what the first one to start it asked for: a server that
each test asks for what it needs itself has the others import PyTorch in every process that they start.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext

_IMPORTED = [
    "builders.ray_cluster",
    "builders.runner",
    "tests.contract.tensor_followers",
    "tests.integration.build_program",
    "tests.unit.artifacts.killed_process",
    "tests.unit.artifacts.test_killed_processes",
    "tests.unit.artifacts.test_node_cache",
]


def fork_server() -> ForkServerContext:
    """Return the server; the first process takes as long as all these imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context
