"""BundleReference: `store/name@alias`, as configs and commands name a bundle."""

import re
from dataclasses import dataclass

from serve.artifacts.fingerprint import is_fingerprint
from serve.errors import ConfigError

DEFAULT_ALIAS = "latest"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FORM = (
    "store/name@alias, for instance s3://bundles/llama-3.1-8b@prod, ./store/quickstart@3 or name@sha256:<fingerprint>"
)


@dataclass(frozen=True)
class BundleReference:
    """Which bundle of which store.

    Attributes:
        store: URL or directory of the store.
        name: Of the bundle.
        selector: An alias (`prod`; `latest` is the newest version), a version's number (`3`), or
            `sha256:<fingerprint>`, of which eight digits are enough.
    """

    store: str
    name: str
    selector: str = DEFAULT_ALIAS

    def __str__(self) -> str:
        return f"{self.store}/{self.name}@{self.selector}"

    @property
    def version(self) -> int | None:
        """The version, if the selector is one."""
        return int(self.selector) if self.selector.isdigit() else None

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint, or its first digits, if the selector is one."""
        return self.selector.removeprefix("sha256:") if self.selector.startswith("sha256:") else None

    def pinned(self, fingerprint: str) -> "BundleReference":
        """Return a reference to exactly one bundle, wherever the alias moves."""
        return BundleReference(self.store, self.name, f"sha256:{fingerprint}")


def parse_reference(text: str, default_store: str | None = None, field: str = "bundle") -> BundleReference:
    """Read a reference.

    Args:
        text: `store/name@selector`; without `@`, `latest` is meant.
        default_store: Used for a name without a store; None: there has to be one.
        field: For the message.

    Raises:
        ConfigError: It has no such form.
    """
    place, _, selector = text.rpartition("@") if "@" in text.rsplit("/", 1)[-1] else (text, "", DEFAULT_ALIAS)
    store, _, name = place.rpartition("/")
    if not store and default_store is not None:
        store = default_store
    prefix = selector.removeprefix("sha256:")
    exact = selector.startswith("sha256:")
    good = is_fingerprint(prefix.ljust(64, "0")) and len(prefix) >= 8 if exact else NAME.fullmatch(selector)
    if not store or not NAME.fullmatch(name) or not good:
        raise ConfigError(f"{field}: {text!r} is no reference of a bundle; write {_FORM}")
    return BundleReference(store, name, selector)
