"""Marking: which bundles and steps of a store are needed. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.artifacts.alias_history import bundle_before
from serve.artifacts.port import AliasMove, Version
from serve.artifacts.rollback import rollback_target


@dataclass(frozen=True)
class StoredRecord:
    """A manifest or a step's record: when it was written (seconds since the epoch), and the blobs it needs."""

    written_s: float
    blobs: frozenset[str]


@dataclass(frozen=True)
class StoreState:
    """What a collection saw of a store.

    Attributes:
        bundles, steps: By fingerprint.
        versions: Of each name, oldest first.
        histories: The moves of every alias, oldest first.
        used: Fingerprints that deployments and builds use, or that are being published.
        is_building: Whether a build runs.
    """

    bundles: Mapping[str, StoredRecord]
    steps: Mapping[str, StoredRecord]
    versions: Mapping[str, Sequence[Version]]
    histories: Sequence[Sequence[AliasMove]]
    used: frozenset[str]
    is_building: bool


@dataclass(frozen=True)
class KeepRules:
    """What is kept besides what aliases point to.

    Attributes:
        versions: Newest ones of each name.
        steps_s: Age of a step up to which it is kept.
        grace_s: The same of everything.
    """

    versions: int
    steps_s: float
    grace_s: float


def kept_bundles(state: StoreState, rules: KeepRules, now_s: float) -> frozenset[str]:
    """Return the fingerprints of the bundles that are needed."""
    kept = {fingerprint for fingerprint in state.bundles if fingerprint in state.used}
    kept |= {key for key, record in state.bundles.items() if now_s - record.written_s <= rules.grace_s}
    for versions in state.versions.values():
        kept |= {version.fingerprint for version in versions[max(0, len(versions) - rules.versions) :]}
    for history in state.histories:
        kept |= {move.fingerprint for move in history[-2:]}
        # What an operator would go back to, and what replicas go back to by themselves.
        kept.add(rollback_target(history, state.bundles.__contains__) or "")
        kept.add(bundle_before(history, history[-1].fingerprint) or "")
    return frozenset(kept.intersection(state.bundles))


def kept_steps(state: StoreState, rules: KeepRules, now_s: float) -> frozenset[str]:
    """Return the fingerprints of the steps that are needed."""
    if state.is_building:
        return frozenset(state.steps)  # which of them it will ask for, nobody knows
    youngest_s = max(rules.steps_s, rules.grace_s)
    return frozenset(
        key for key, record in state.steps.items() if key in state.used or now_s - record.written_s <= youngest_s
    )
