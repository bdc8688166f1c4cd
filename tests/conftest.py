"""Settings of all tests."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Examples are judged by what they do, not by how long a busy machine takes for one.
# Fewer examples than hypothesis has: there are hundreds of properties, and all tests together may take half an hour.
settings.register_profile("raytrt", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raytrt")

# Threads of PyTorch that spin while they wait starve each other on a machine with few cores; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTEGRATION = "tests/integration/"
# Those that start Ray alone, and no service.
LIGHT = ("tests/integration/test_builds.py", "tests/integration/test_mpi_group.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(INTEGRATION))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let workers share the tests by module, and most integration tests be one worker's.

    These start whole systems, and two at a time would take each other's cores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # it is untyped here
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return INTEGRATION if module.startswith(INTEGRATION) and module not in LIGHT else module

    return Scheduling(config, log)
