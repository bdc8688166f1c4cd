"""LastConfig: what Serve ran before a deployment, and how to have it back."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from serve.artifacts.reference import BundleReference, parse_reference
from serve.config import IMPORT_PATH
from serve.dashboard import app_sights, deployed_configs


class LastConfig:
    """What was deployed before.

    Args:
        document: The new config file, for what is fixed as long as Serve runs.
        details: What Serve told of itself before.
    """

    def __init__(self, document: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        self._configs = deployed_configs(details)
        sights = app_sights(details)
        self.is_good = bool(self._configs) and all(sights[name].status == "RUNNING" for name in self._configs)
        self._fixed = {key: value for key, value in document.items() if key != "applications"}

    def fingerprints(self) -> dict[tuple[str, str], str]:
        """Return the bundles that were deployed, by application and model."""
        return {(name, model["id"]): model["bundle_fingerprint"] for name, model in _pinned_models(self._configs)}

    def without_rejected(self, instead_of: Callable[[BundleReference, str], str]) -> dict[str, Any]:
        """Return it as a config file's content; bundles that do not work are replaced.

        Args:
            instead_of: Returns what to serve for a reference that meant a bundle.
        """
        configs = copy.deepcopy(self._configs)
        for _, model in _pinned_models(configs):
            model["bundle_fingerprint"] = instead_of(parse_reference(model["bundle"]), model["bundle_fingerprint"])
        return {**self._fixed, "applications": list(configs.values())}

    def equals(self, document: Mapping[str, Any]) -> bool:
        """Return whether a config file has the same code and arguments, so that Serve restarts nothing."""
        parts = ("import_path", "args", "runtime_env")
        new = {entry.get("name", "default"): entry for entry in document["applications"]}
        return new.keys() == self._configs.keys() and all(
            (entry.get(part) or {}) == (self._configs[name].get(part) or {})
            for name, entry in new.items()
            for part in parts
        )


def _pinned_models(configs: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the models of which the bundle is fixed, with their application's name."""
    for name, config in configs.items():
        if config.get("import_path") == IMPORT_PATH:
            for model in (config.get("args") or {}).get("models", ()):
                if model.get("bundle_fingerprint") is not None:
                    yield name, model
