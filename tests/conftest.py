"""Settings of all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Examples are judged by what they do, not by how long a busy machine takes for one.
settings.register_profile("raytrt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raytrt")

# Threads of PyTorch that spin while they wait starve each other on a machine with few cores; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let two workers share the tests: integration tests one after the other on one of them, which begins with them.

    They start whole systems, and would take each other's cores. All others are cut by module, which shares fixtures.
    """
    for item in items:
        parts = item.path.relative_to(TESTS).parts
        name = parts[0] if parts[0] == "integration" else "/".join(parts)
        item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] != "integration")
