"""Names: versions and aliases of one store, each a series of records."""

import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from serve.artifacts.clock import Clock
from serve.artifacts.fingerprint import is_fingerprint
from serve.artifacts.objects import Objects
from serve.artifacts.port import AliasMove, Version
from serve.artifacts.reference import DEFAULT_ALIAS, NAME
from serve.artifacts.rollback import rollback_target
from serve.artifacts.series import Series
from serve.errors import BundleCorrupt, ConfigError

NAMES = "names"
# Until a listing shows what somebody else wrote just now; network file systems take their time.
_AGAIN_S = 0.05


class Names:
    """The names of one store.

    Args:
        objects: Of the store.
        clock: For what is written into records.
        protect: Keeps a bundle from being collected while the block runs; raises `ConfigError` if there is no such
            bundle.
        exists: Whether there is a bundle with a fingerprint.
    """

    def __init__(
        self,
        objects: Objects,
        clock: Clock,
        protect: Callable[[str], AbstractContextManager[None]],
        exists: Callable[[str], bool],
    ) -> None:
        self._objects = objects
        self._clock = clock
        self._protect = protect
        self._exists = exists

    def names(self) -> tuple[str, ...]:
        """Return the names that have versions, in order."""
        keys = (info.key.split("/") for info in self._objects.listing(NAMES))
        return tuple(sorted({parts[1] for parts in keys if len(parts) == 4 and parts[2] == "versions"}))

    def versions(self, name: str) -> tuple[Version, ...]:
        """Return the versions of a name, oldest first."""
        return tuple(_version(number, record) for number, record in self._versions(name).read_all().items())

    def newest(self, name: str) -> Version | None:
        """Return the newest version of a name; None: it has none."""
        series = self._versions(name)
        numbers = series.numbers()
        return _version(numbers[-1], series.read(numbers[-1])) if numbers else None

    def add_version(self, name: str, fingerprint: str, note: str = "") -> Version:
        """Add a version; if the newest one is this bundle already, return that."""
        series = self._versions(name)
        with self._protect(fingerprint):
            while True:
                newest = self.newest(name)
                if newest is not None and newest.fingerprint == fingerprint:
                    return newest
                version = Version(newest.number + 1 if newest else 1, fingerprint, self._clock.iso(), note)
                record = {
                    "fingerprint": fingerprint,
                    "created": version.created,
                    "note": note,
                    "nonce": uuid.uuid4().hex,
                }
                if series.create(version.number, record):
                    return version
                self._clock.sleep(_AGAIN_S)

    def aliases(self, name: str) -> Mapping[str, AliasMove]:
        """Return where the aliases of a name point."""
        prefix = f"{NAMES}/{_checked_name(name)}/aliases"
        parts = [info.key.removeprefix(f"{prefix}/").split("/") for info in self._objects.listing(prefix)]
        found = sorted({part[0] for part in parts if len(part) == 2})
        moves = {alias: self.last_move(name, alias) for alias in found}
        return {alias: move for alias, move in moves.items() if move is not None}

    def history(self, name: str, alias: str) -> tuple[AliasMove, ...]:
        """Return the moves of an alias, oldest first."""
        return tuple(map(_move, self._moves(name, alias).read_all().values()))

    def last_move(self, name: str, alias: str) -> AliasMove | None:
        """Return where an alias points; None: there is no such alias."""
        series = self._moves(name, alias)
        numbers = series.numbers()
        return _move(series.read(numbers[-1])) if numbers else None

    def move_alias(
        self, name: str, alias: str, fingerprint: str, *, reason: str = "", rejected: str | None = None
    ) -> AliasMove:
        """Point an alias, new or old, to a version of the name."""
        _check_can_move(name, alias)
        self._check_is_version(name, fingerprint)
        series = self._moves(name, alias)
        with self._protect(fingerprint):
            while True:
                number = max(series.numbers(), default=0) + 1
                if move := self._append(series, number, fingerprint, reason, rejected):
                    return move
                self._clock.sleep(_AGAIN_S)

    def roll_back(self, name: str, alias: str, *, reason: str, rejected: str | None = None) -> AliasMove:
        """Point an alias to the newest bundle of its history that is neither where it points now, nor was rejected."""
        _check_can_move(name, alias)
        series = self._moves(name, alias)
        while True:
            number = max(series.numbers(), default=0) + 1  # before the history is read: who moved it since, took that
            history = self.history(name, alias)
            if history and rejected is not None and history[-1].fingerprint != rejected:
                return history[-1]
            target = rollback_target(history, self._exists)
            if target is None:
                raise ConfigError(_nothing_to_go_back_to(name, alias, history))
            # Not protected, which may have to wait for a running collection: each one keeps this bundle anyway.
            if move := self._append(series, number, target, reason, rejected):
                return move
            self._clock.sleep(_AGAIN_S)

    def _append(
        self, series: Series, number: int, fingerprint: str, reason: str, rejected: str | None
    ) -> AliasMove | None:
        move = AliasMove(fingerprint, self._clock.iso(), reason, rejected)
        record = {
            "fingerprint": fingerprint,
            "created": move.created,
            "reason": reason,
            "rejected": rejected,
            "nonce": uuid.uuid4().hex,
        }
        return move if series.create(number, record) else None

    def _check_is_version(self, name: str, fingerprint: str) -> None:
        versions = self.versions(name)
        if fingerprint not in {version.fingerprint for version in versions}:
            there = ", ".join(f"{version.number} ({version.fingerprint[:12]})" for version in versions) or "none"
            raise ConfigError(
                f"{name}: {fingerprint[:12]} is none of its versions; there are: {there}. Publish the bundle under "
                "this name first"
            )

    def _versions(self, name: str) -> Series:
        _checked_name(name)
        return Series(self._objects, f"{NAMES}/{name}/versions")

    def _moves(self, name: str, alias: str) -> Series:
        _checked_name(name)
        _check_form(name, alias)
        return Series(self._objects, f"{NAMES}/{name}/aliases/{alias}")


def _version(number: int, record: Mapping[str, object]) -> Version:
    return Version(number, _fingerprint(record), str(record.get("created", "")), str(record.get("note", "")))


def _move(record: Mapping[str, object]) -> AliasMove:
    rejected = record.get("rejected")
    return AliasMove(
        _fingerprint(record),
        str(record.get("created", "")),
        str(record.get("reason", "")),
        str(rejected) if rejected is not None else None,
    )


def _fingerprint(record: Mapping[str, object]) -> str:
    value = record.get("fingerprint")
    if not isinstance(value, str) or not is_fingerprint(value):
        raise BundleCorrupt(f"a record of the store names {value!r} as a fingerprint; it was damaged")
    return value


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ConfigError(f"name: {name!r} is no name of a bundle; use letters, digits, '.', '_' and '-'")
    return name


def _check_can_move(name: str, alias: str) -> None:
    if alias == DEFAULT_ALIAS:
        raise ConfigError(f"{name}: alias {alias!r} moves by itself, to the newest version; choose another alias")
    _check_form(name, alias)


def _check_form(name: str, alias: str) -> None:
    if not NAME.fullmatch(alias) or alias.isdigit():
        raise ConfigError(f"{name}: {alias!r} is no alias; use letters, digits, '.', '_' and '-', and not a number")


def _nothing_to_go_back_to(name: str, alias: str, history: tuple[AliasMove, ...]) -> str:
    if not history:
        return f"{name}: there is no alias {alias!r}"
    return (
        f"{name}@{alias} points to {history[-1].fingerprint[:12]}, and its history has no other bundle that was not "
        "rejected and is still there; point it to a version by `raytrt bundles promote`"
    )
