"""One running system for all integration tests: quickstart model and simulated engines, behind one gateway."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.integration.serving import Serving

SMALL = {"num_cpus": 0.05}


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The system that most tests share; a test must not leave it changed."""
    running = Serving(
        {
            "models": [
                {"id": "quickstart", "engine": "transformers", "resources": SMALL},
                {
                    "id": "sim",
                    "engine": {"kind": "simulated", "latency": {"kind": "fixed", "decode_step_s": 0.005}},
                    "replicas": 2,
                    "resources": SMALL,
                },
                {
                    "id": "slow",
                    "engine": {"kind": "simulated", "latency": {"kind": "fixed", "decode_step_s": 0.05}},
                    "resources": SMALL,
                },
                {
                    "id": "sleeper",
                    "engine": {"kind": "simulated", "speed": 0},
                    "autoscaling": {"min_replicas": 0, "max_replicas": 1},
                    "resources": SMALL,
                },
                {
                    "id": "tiny",
                    "engine": {
                        "kind": "simulated",
                        "latency": {"kind": "fixed", "decode_step_s": 0.01},
                        "max_batch_size": 2,
                        "max_waiting": 2,
                        "total_blocks": 130,
                    },
                    "resources": SMALL,
                },
            ],
            "gateway": {"num_cpus": 0.05, "limits": {"max_body_bytes": 2_000_000}},
        },
        tmp_path_factory.mktemp("serving"),
    )
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


@pytest.fixture
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parents[2]
