"""Addresses that no cluster answers at. That a cluster is joined is shown in tests/integration/test_builds.py."""

import socket
from collections.abc import Iterator

import pytest

from builders import ray_cluster
from builders.ray_cluster import connected
from serve.errors import ConfigError


@pytest.fixture
def deaf() -> Iterator[str]:
    """A port that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["", "ray://", "http://"])
def test_an_address_without_a_cluster_is_refused_soon(scheme: str, deaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_ANSWER_S", 0.3)
    with (
        pytest.raises(ConfigError, match=f"no Ray cluster answers at '{scheme}{deaf}'; give the host and port"),
        connected(scheme + deaf),
    ):
        pass
