"""Location: what a specification's `source.location` names. PURE, but for a look whether a directory exists."""

import re
from dataclasses import dataclass
from pathlib import Path

import serve
from builders.settings.source import SourceSettings
from serve.errors import ConfigError

BUILTIN = "builtin:"
_HUB = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_PASSWORD = re.compile(r"//[^/@]*:[^/@]*@")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://.+", re.IGNORECASE)


@dataclass(frozen=True)
class LocalLocation:
    """A directory, at the same path on every node, or a model of the package, wherever that is installed."""

    directory: Path
    builtin: str | None = None

    def __str__(self) -> str:
        return str(self.directory) if self.builtin is None else BUILTIN + self.builtin


@dataclass(frozen=True)
class HubLocation:
    """A model of the Hugging Face hub; revision None: its main branch."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class UrlLocation:
    """A directory that fsspec can read."""

    url: str

    def __str__(self) -> str:
        return without_password(self.url)


Location = LocalLocation | HubLocation | UrlLocation


def parse_location(source: SourceSettings, base: Path) -> Location:
    """Read a location.

    Args:
        source: The section of the specification.
        base: Directory of the build file, which relative paths start from.

    Raises:
        ConfigError: It names nothing that can be fetched.
    """
    text = source.location
    if text.startswith(BUILTIN):
        return _unversioned(source, _builtin(text.removeprefix(BUILTIN)))
    if not text.startswith("hf://") and (url := _URL.fullmatch(text)):
        if url["scheme"].lower() == "file":
            return _unversioned(source, LocalLocation(Path(text[len("file://") :])))
        return _unversioned(source, UrlLocation(text.rstrip("/")))
    path = base / Path(text).expanduser()
    hub = _HUB.fullmatch(text.removeprefix("hf://"))
    if text.startswith("hf://") or (hub and not text.startswith((".", "~", "/")) and not path.is_dir()):
        return _hub(source, hub)
    return _unversioned(source, LocalLocation(path.absolute()))


def without_password(url: str) -> str:
    """Return a URL as it may be shown and stored."""
    return _PASSWORD.sub("//", url)


def _builtin(name: str) -> LocalLocation:
    root = Path(serve.__path__[0], "models")
    directory = root / name
    if not name or "/" in name or not directory.is_dir():
        known = ", ".join(
            sorted(f"{BUILTIN}{path.name}" for path in root.iterdir() if (path / "config.json").is_file())
        )
        raise ConfigError(f"source.location: there is no {BUILTIN}{name}; there is {known}")
    return LocalLocation(directory, name)


def _hub(source: SourceSettings, hub: re.Match[str] | None) -> HubLocation:
    if hub is None:
        raise ConfigError(
            f"source.location: {source.location!r} is no model of a hub; write hf://organisation/model or "
            "hf://organisation/model@revision"
        )
    if hub["revision"] and source.revision and hub["revision"] != source.revision:
        raise ConfigError(
            f"source.revision: {source.revision!r} contradicts source.location: {source.location!r}; remove one of both"
        )
    return HubLocation(hub["repository"], hub["revision"] or source.revision)


def _unversioned(source: SourceSettings, location: Location) -> Location:
    if source.revision is not None:
        raise ConfigError(
            f"source.revision: {source.revision!r}: {location} has no revisions, only models of a hub have; remove it"
        )
    return location
