"""Bring a config file to a running Ray Serve, with what its bundles' aliases point to now; go back if that fails."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from serve.artifacts.alias_history import rejected_bundles
from serve.artifacts.reference import BundleReference
from serve.artifacts.store import open_store
from serve.bundle_config import same_tokenizer
from serve.bundle_models import OpenStore
from serve.config_file import ConfigFile, read_config_file
from serve.core.rollout import RolloutLimits, RolloutState, Stage, judge
from serve.dashboard import DEFAULT_ADDRESS, Dashboard, DashboardError, app_sights
from serve.errors import BundleCorrupt, ConfigError, StoreUnavailable
from serve.last_config import LastConfig
from serve.pins import Pin, find_pins, pin_document
from serve.ready import readiness, stand_ins

POLL_S = 1.0
STAND_IN_S = 2.5  # gateways ask their replicas every two seconds
_DEFAULT_TIMEOUT_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", type=Path, help="Serve config file")
    parser.add_argument(
        "--address", default=DEFAULT_ADDRESS, help=f"URL of the cluster's dashboard (default: {DEFAULT_ADDRESS})"
    )
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stay until it is rolled out, and go back to what was deployed before if it fails (default: yes)",
    )
    parser.add_argument("--timeout", type=float, default=_DEFAULT_TIMEOUT_S, help="seconds to wait (default: 3600)")
    parser.add_argument(
        "--change-tokenizer",
        action="store_true",
        help="deploy a bundle with another tokenizer under the same model id; requests under way may be garbled",
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(options: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status.

    Raises:
        ConfigError: The file has a mistake, a bundle is not there, or the cluster refuses.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    deploy = Deploy(Dashboard(options.address), open_store, lambda text: console.print(f"raytrt: {text}", markup=False))
    config = read_config_file(options.config)
    try:
        outcome = deploy.run(
            config, wait=options.wait, timeout_s=options.timeout, change_tokenizer=options.change_tokenizer
        )
    except DashboardError as exc:
        raise ConfigError(f"{exc}; is a Ray cluster running there? See --address") from None
    if options.json:
        print(json.dumps(outcome.to_json()))
    return 0 if outcome.good else 1


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        state: `deployed`, `unchanged` (Serve runs exactly this), `submitted` (nobody waited), `rolled_back` (it failed,
            and what was deployed before serves again) or `failed`.
        seconds: How long it took.
        pins: The bundles.
        before: Fingerprints that were deployed before, by application and model.
        reason: Why it failed.
        stand_ins: Models of which some replicas are not served as configured, and by what they are.
    """

    state: str
    seconds: float
    pins: Sequence[Pin] = ()
    before: Mapping[tuple[str, str], str] = field(default_factory=dict)
    reason: str = ""
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether what was asked for is what serves, or will."""
        return self.state in ("deployed", "unchanged", "submitted")

    def to_json(self) -> dict[str, Any]:
        """Return it for machines."""
        return {
            "state": self.state,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "stand_ins": dict(self.stand_ins),
            "bundles": [
                {
                    "application": pin.app,
                    "model": pin.model_id,
                    "bundle": str(pin.resolved.config.reference),
                    "fingerprint": pin.bundle.fingerprint,
                    "before": self.before.get((pin.app, pin.model_id)),
                }
                for pin in self.pins
            ],
        }


class Deploy:
    """One deployment of one config file.

    Args:
        dashboard: Of the cluster.
        stores: Opens a store by its URL.
        tell: Told what happens, a line at a time.
        monotonic_s, sleep: The clock.
    """

    def __init__(
        self,
        dashboard: Dashboard,
        stores: OpenStore,
        tell: Callable[[str], None],
        monotonic_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._dashboard = dashboard
        self._open_store = stores
        self._tell = tell
        self._monotonic_s = monotonic_s
        self._sleep = sleep

    def run(self, config: ConfigFile, *, wait: bool, timeout_s: float, change_tokenizer: bool = False) -> Outcome:
        """Deploy a config file.

        Args:
            config: Of which the aliases are read now.
            wait: Until it is rolled out, and go back if it fails.
            timeout_s: How long.
            change_tokenizer: Whether a model may get another tokenizer.

        Raises:
            ConfigError: A bundle is not there, or the cluster refuses.
            DashboardError: The cluster does not answer.
        """
        began_s = self._monotonic_s()
        pins = find_pins(config.applications, self._open_store)
        for pin in pins:
            self._tell(str(pin))
        document = pin_document(config.document, pins)
        details = self._dashboard.details()
        last = LastConfig(document, details)
        before = last.fingerprints()
        if not change_tokenizer:
            self._check_tokenizers(pins, before)
        unchanged = last.is_good and last.equals(document)
        self._dashboard.deploy(document)
        if not wait:
            return Outcome("submitted", self._monotonic_s() - began_s, pins, before)
        reason = self._wait(config, pins, RolloutLimits(timeout_s))
        if reason is None:
            seconds, state = self._monotonic_s() - began_s, "unchanged" if unchanged else "deployed"
            self._tell(f"{state} after {seconds:.0f} s")
            return Outcome(state, seconds, pins, before, stand_ins=self._find_stand_ins(config))
        self._tell(f"failed: {reason}")
        state = self._go_back(config, last, timeout_s)
        return Outcome(state, self._monotonic_s() - began_s, pins, before, reason)

    def _find_stand_ins(self, config: ConfigFile) -> Mapping[str, str]:
        """Return what serves in the place of what was deployed, as far as a gateway can be asked from here."""
        self._sleep(STAND_IN_S)
        found = stand_ins(config.url)
        for model, text in found.items():
            self._tell(f"{model}: some replicas are served by {text}, and not as configured; see their log")
        return found

    def _go_back(self, config: ConfigFile, last: LastConfig, timeout_s: float) -> str:
        if not last.is_good:
            self._tell("nothing that worked was deployed before: the applications are left as they are")
            return "failed"
        self._tell("going back to what was deployed before")
        self._dashboard.deploy(last.without_rejected(self._instead_of))
        reason = self._wait(config, (), RolloutLimits(timeout_s))
        if reason is not None:
            self._tell(f"going back failed, too: {reason}")
            return "failed"
        self._tell("what was deployed before serves again")
        return "rolled_back"

    def _wait(self, config: ConfigFile, pins: Sequence[Pin], limits: RolloutLimits) -> str | None:
        """Wait for the end of a rollout; return why it failed, or None."""
        began_s, state, shown = self._monotonic_s(), RolloutState(), ""
        names = list(config.applications)
        while True:
            elapsed_s = self._monotonic_s() - began_s
            try:
                sights = app_sights(self._dashboard.details())
            except DashboardError as exc:  # its process may be restarted while Serve serves on
                if elapsed_s >= limits.timeout_s:
                    raise
                self._tell(f"{exc}; trying again")
                self._sleep(POLL_S)
                continue
            verdict = judge(state, {name: sights.get(name) for name in names}, elapsed_s, limits)
            state = verdict.state
            if rejection := self._rejection(pins):
                return rejection
            if verdict.stage is not Stage.UNDER_WAY:
                return verdict.text if verdict.stage is Stage.FAILED else None
            text = "; ".join(filter(None, (verdict.text, readiness(config.url)[1])))
            if text != shown:
                self._tell(text)
                shown = text
            self._sleep(POLL_S)

    def _rejection(self, pins: Sequence[Pin]) -> str | None:
        """Return which bundle the new replicas have rejected: they serve something else, or nothing."""
        for pin in pins:
            bundle = pin.bundle
            if bundle.alias is None:
                continue
            try:
                history = self._open_store(bundle.store).history(bundle.name, bundle.alias)
            except (StoreUnavailable, BundleCorrupt) as exc:
                self._tell(f"{exc}; trying again")
                continue
            if bundle.fingerprint in rejected_bundles(history):
                why = next(move.reason for move in reversed(history) if move.rejected == bundle.fingerprint)
                return f"bundle {bundle} was rejected: {why}"
        return None

    def _instead_of(self, reference: BundleReference, fingerprint: str) -> str:
        """Return where an alias points, if the bundle that it meant was rejected since; else that bundle."""
        if reference.version is not None or reference.fingerprint is not None:
            return fingerprint
        store = self._open_store(reference.store)
        if fingerprint not in rejected_bundles(store.history(reference.name, reference.selector)):
            return fingerprint
        return store.aliases(reference.name)[reference.selector].fingerprint

    def _check_tokenizers(self, pins: Sequence[Pin], before: Mapping[tuple[str, str], str]) -> None:
        """Check that old and new replicas of a model understand the same tokens.

        During the rollout old gateways send to new replicas, and new gateways to old ones.
        """
        for pin in pins:
            fingerprint = before.get((pin.app, pin.model_id))
            if fingerprint is None or fingerprint == pin.bundle.fingerprint:
                continue
            old = self._open_store(pin.bundle.store).find_bundle(fingerprint)
            if old is not None and not same_tokenizer(old, pin.bundle.manifest):
                raise ConfigError(
                    f"models[{pin.model_id}].bundle: {pin.bundle} has another tokenizer than {fingerprint[:12]}, which "
                    "is deployed, and requests of the rollout could be garbled; give it another `id`, or say "
                    "--change-tokenizer"
                )
