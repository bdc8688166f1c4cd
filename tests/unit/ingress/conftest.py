from pathlib import Path

import httpx
import pytest
from hypothesis import settings

from serve.ingress.api import GatewayApp, make_app
from serve.ingress.models import ServedModel, load_model
from serve.ingress.settings import GatewaySettings
from tests.unit.ingress.fake_backend import FakeBackend, say
from tests.unit.ingress.tiny_model import write_model

settings.register_profile("no deadline", deadline=None)  # test machines are shared
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model(model_dir: Path) -> ServedModel:
    return load_model("tiny", model_dir, created=1_700_000_000)


@pytest.fixture(scope="session")
def models(model: ServedModel, model_dir: Path) -> list[ServedModel]:
    return [model, load_model("org/tiny-2", model_dir)]


@pytest.fixture
def backend(model: ServedModel) -> FakeBackend:
    """Says 'Hello there, 世界 😀!'."""
    return FakeBackend(say(tokens_of(model, "Hello there, 世界 😀!")))


def tokens_of(model: ServedModel, text: str) -> list[int]:
    packed = model.text.encode(text, add_special_tokens=False, room=10**6, param="prompt")
    return list(memoryview(packed).cast("I"))


def client_of(app: GatewayApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway")


@pytest.fixture
def app(models: list[ServedModel], backend: FakeBackend) -> GatewayApp:
    return make_app(models, backend, GatewaySettings)


@pytest.fixture
def client(app: GatewayApp) -> httpx.AsyncClient:
    return client_of(app)
