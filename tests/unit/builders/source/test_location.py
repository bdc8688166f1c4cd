"""What a source's location names."""

from pathlib import Path

import pytest

from builders.settings.source import SourceSettings
from builders.source.location import HubLocation, LocalLocation, Location, UrlLocation, parse_location
from serve.errors import ConfigError


def parse(location: str, revision: str | None = None, base: Path = Path("/base")) -> Location:
    return parse_location(SourceSettings(location=location, revision=revision), base)


@pytest.mark.parametrize(
    ("location", "found"),
    [
        ("/models/llama", LocalLocation(Path("/models/llama"))),
        ("./llama", LocalLocation(Path("/base/llama"))),
        ("file:///models/llama", LocalLocation(Path("/models/llama"))),
        ("hf://meta-llama/Llama-3.1-8B", HubLocation("meta-llama/Llama-3.1-8B", None)),
        ("meta-llama/Llama-3.1-8B@v1", HubLocation("meta-llama/Llama-3.1-8B", "v1")),
        ("s3://bucket/llama/", UrlLocation("s3://bucket/llama")),
    ],
)
def test_a_location_is_a_directory_a_hub_or_a_url(location: str, found: Location) -> None:
    assert parse(location) == found


def test_the_home_directory_is_the_users() -> None:
    assert parse("~/llama") == LocalLocation(Path.home() / "llama")


def test_the_small_model_comes_with_the_package() -> None:
    found = parse("builtin:quickstart")
    assert isinstance(found, LocalLocation)
    assert (found.directory / "config.json").is_file()


def test_a_directory_that_exists_comes_before_a_hub(tmp_path: Path) -> None:
    (tmp_path / "org/model").mkdir(parents=True)
    assert parse("org/model", base=tmp_path) == LocalLocation(tmp_path / "org/model")
    assert parse("hf://org/model", base=tmp_path) == HubLocation("org/model", None)


def test_a_hubs_model_has_revisions() -> None:
    assert parse("org/model", "main") == HubLocation("org/model", "main")
    assert parse("org/model@main", "main") == HubLocation("org/model", "main")
    with pytest.raises(ConfigError, match=r"source.revision: 'b' contradicts"):
        parse("org/model@a", "b")


@pytest.mark.parametrize("location", ["/models/llama", "s3://bucket/llama", "builtin:quickstart"])
def test_nothing_else_has_revisions(location: str) -> None:
    with pytest.raises(ConfigError, match=r"source.revision: 'main'.*has no revisions"):
        parse(location, "main")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("builtin:other", "there is builtin:quickstart"),
        ("hf://model", "is no model of a hub"),
        ("builtin:", "there is"),
    ],
)
def test_a_location_that_names_nothing_is_refused(location: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(location)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host/model", "https://host/model"),
        ("abfs://container@account.dfs.core.windows.net/model", "abfs://container@account.dfs.core.windows.net/model"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert str(parse(url)) == shown
    found = parse(url)
    assert isinstance(found, UrlLocation)
    assert found.url == url
