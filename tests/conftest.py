"""Settings of all tests."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Examples are judged by what they do, not by how long a busy machine takes for one.
# Half of hypothesis' examples: there are hundreds of properties, and all tests together may take half an hour.
settings.register_profile("raytrt", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raytrt")

# Threads of PyTorch that spin while they wait starve each other on a machine with few cores; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTEGRATION = "tests/integration/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(INTEGRATION))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let workers share the tests by module, and all integration tests be one worker's.

    These start whole systems, and two at a time would take each other's cores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # it is untyped here
        def _split_scope(self, nodeid: str) -> str:
            return INTEGRATION if nodeid.startswith(INTEGRATION) else nodeid.partition("::")[0]

    return Scheduling(config, log)
