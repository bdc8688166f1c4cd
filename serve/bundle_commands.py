"""List, compare, promote, roll back, verify and remove bundles of a store.

A bundle is written as name@alias, name@3, name@sha256:<digits>, or name, which is its newest version; with a store in
front, s3://bundles/name@alias, another store than --store is meant.
"""

import argparse
import getpass
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from serve import bundle_tables as tables
from serve.artifacts.bundle_check import verify_directory
from serve.artifacts.damage import DamagedFile
from serve.artifacts.manifest import MANIFEST, Manifest
from serve.artifacts.manifest_diff import compare
from serve.artifacts.parsing import write_manifest
from serve.artifacts.port import ByteProgress
from serve.artifacts.reference import BundleReference, parse_reference
from serve.artifacts.size_text import size_text
from serve.artifacts.store import Store, open_store
from serve.errors import BundleCorrupt, ConfigError, StoreUnavailable

STORE_VARIABLE = "RAYTRT_STORE"
DEFAULT_STORE = "~/.raytrt/store"
_UNFINISHED = ".unfinished"  # in a directory whose export was broken off: which bundle it is of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--store",
        default=os.environ.get(STORE_VARIABLE) or DEFAULT_STORE,
        help=f"directory or URL (s3://..., gs://...); default: ${STORE_VARIABLE}, or {DEFAULT_STORE}",
    )
    shared.add_argument("--json", action="store_true", help="for machines")
    commands = parser.add_subparsers(dest="action", required=True, metavar="action")

    def command(name: str, action: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=summary, description=summary)
        added.set_defaults(act=action)
        return added

    listing = command("list", _list, "bundles, their versions and aliases")
    listing.add_argument("name", nargs="?", help="of the bundles; default: all")
    show = command("show", _show, "what a bundle is, what it was measured to do, and who uses it")
    show.add_argument("bundle")
    show.add_argument("--files", action="store_true", help="its files, too")
    diff = command("diff", _diff, "what differs between two bundles")
    diff.add_argument("left")
    diff.add_argument("right")
    versions = command("versions", _list, "versions of a name")
    versions.add_argument("name")
    history = command("history", _history, "where an alias pointed")
    history.add_argument("alias", metavar="name@alias")
    _add_changing(command)


def _add_changing(command: Callable[..., argparse.ArgumentParser]) -> None:
    promote = command("promote", _promote, "point an alias to a bundle")
    promote.add_argument("bundle")
    promote.add_argument("alias", help="for instance prod; it is made if there is none")
    promote.add_argument("--reason", default="", help="for the history")
    rollback = command("rollback", _rollback, "point an alias to the bundle before")
    rollback.add_argument("alias", metavar="name@alias")
    rollback.add_argument("--reason", default="", help="for the history")
    rollback.add_argument("--reject", action="store_true", help="never go back to the bundle that it points to now")
    gc = command("gc", _gc, "remove bundles, steps and files that nobody needs")
    gc.add_argument("--keep-versions", type=_count, default=5, help="newest versions of each name; default 5")
    gc.add_argument(
        "--keep-steps-days", type=_days, default=7.0, help="how long outputs of build steps are kept; default 7"
    )
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    verify = command("verify", _verify, "check every byte of a bundle in the store, or of a bundle's directory")
    verify.add_argument("bundle", help="a bundle, or a directory")
    verify.add_argument(
        "--remove-damaged",
        action="store_true",
        help="remove damaged files from the store, so that a build makes them anew",
    )
    export = command("export", _export, "write a bundle into a directory")
    export.add_argument("bundle")
    export.add_argument("directory", type=Path)


def run(options: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status: 1 if a bundle is damaged, or the store does not answer.

    Raises:
        ConfigError: There is no such bundle, name, version or alias.
    """
    try:
        status: int = options.act(options)
        return status
    except (BundleCorrupt, StoreUnavailable) as exc:
        print(f"raytrt: {exc}", file=sys.stderr)
        return 1


def _list(options: argparse.Namespace) -> int:
    store = open_store(options.store)
    names = store.names() if options.name is None else (options.name,)
    rows, damaged = [], []
    for name in names:
        versions = store.versions(name)
        if not versions:
            there = ", ".join(store.names()) or "no bundles"
            raise ConfigError(f"{store.url} has no bundle named {name!r}; it has: {there}")
        pointing: dict[str, list[str]] = {versions[-1].fingerprint: ["latest"]}
        for alias, move in store.aliases(name).items():
            pointing.setdefault(move.fingerprint, []).append(alias)
        newest = {version.fingerprint: version.number for version in versions}
        for version in versions:
            aliases = pointing.get(version.fingerprint, []) if newest[version.fingerprint] == version.number else []
            try:
                manifest = store.find_bundle(version.fingerprint)
            except BundleCorrupt as exc:  # one damaged manifest hides no other bundle
                damaged.append(str(exc))
                continue
            rows.append((name, version, manifest, aliases))
    for message in damaged:
        print(f"raytrt bundles: {message}", file=sys.stderr)
    if options.json:
        _print_json([_row(*row) for row in rows])
        return 1 if damaged else 0
    if rows:
        tables.make_console().print(tables.bundles_table(rows))
    elif not damaged:
        print(f"{store.url} has no bundles; make one by `raytrt build`")
    return 1 if damaged else 0


def _row(name: str, version: Any, manifest: Manifest | None, aliases: list[str]) -> dict[str, Any]:
    found = manifest.model_dump(mode="json", exclude={"files", "provenance"}) if manifest is not None else None
    size = manifest.size_bytes if manifest is not None else None
    return {"name": name, **asdict(version), "aliases": aliases, "size_bytes": size, "manifest": found}


def _show(options: argparse.Namespace) -> int:
    store, manifest = _resolve(options, options.bundle)
    holders = store.holders(manifest.fingerprint)
    if options.json:
        return _print_json({**manifest.model_dump(mode="json"), "in_use_by": holders})
    console = tables.make_console()
    console.print(tables.facts_table(tables.manifest_facts(manifest, holders)))
    if options.files:
        console.print()
        console.print(tables.files_table(manifest))
    return 0


def _diff(options: argparse.Namespace) -> int:
    _, left = _resolve(options, options.left)
    _, right = _resolve(options, options.right)
    differences = compare(left, right)
    if options.json:
        return _print_json([asdict(item) for item in differences])
    if differences:
        tables.make_console().print(tables.differences_table(options.left, options.right, differences))
    else:
        print("no difference")
    return 0


def _history(options: argparse.Namespace) -> int:
    store, reference = _alias(options)
    moves = store.history(reference.name, reference.selector)
    if not moves:
        aliases = ", ".join(store.aliases(reference.name)) or "none"
        raise ConfigError(f"{reference.name} has no alias {reference.selector!r}; it has: {aliases}")
    if options.json:
        return _print_json([asdict(move) for move in moves])
    tables.make_console().print(tables.history_table(moves))
    return 0


def _promote(options: argparse.Namespace) -> int:
    reference = parse_reference(options.bundle, options.store)
    store, manifest = _resolve(options, options.bundle)
    reason = options.reason or f"promoted by {_who()}"
    move = store.move_alias(reference.name, options.alias, manifest.fingerprint, reason=reason)
    return _print_move(options, reference.name, options.alias, asdict(move))


def _rollback(options: argparse.Namespace) -> int:
    store, reference = _alias(options)
    rejected = None
    if options.reject:
        now = store.aliases(reference.name).get(reference.selector)
        rejected = now.fingerprint if now is not None else None
    reason = options.reason or f"rolled back by {_who()}"
    move = store.roll_back(reference.name, reference.selector, reason=reason, rejected=rejected)
    return _print_move(options, reference.name, reference.selector, asdict(move))


def _print_move(options: argparse.Namespace, name: str, alias: str, move: dict[str, Any]) -> int:
    if options.json:
        return _print_json({"name": name, "alias": alias, **move})
    print(f"{name}@{alias} -> {move['fingerprint'][:12]}")
    print("Deployments follow when they are deployed again: raytrt deploy CONFIG")
    return 0


def _gc(options: argparse.Namespace) -> int:
    collected = open_store(options.store).collect(
        keep_versions=options.keep_versions, keep_steps_s=options.keep_steps_days * 86400.0, dry_run=options.dry_run
    )
    if options.json:
        return _print_json({**asdict(collected), "dry_run": options.dry_run})
    print(tables.collected_lines(collected, dry_run=options.dry_run))
    return 0


def _verify(options: argparse.Namespace) -> int:
    directory = Path(options.bundle)
    damaged: Sequence[DamagedFile] = ()
    if directory.is_dir():
        with _progress(options, "reading") as progress:
            manifest = verify_directory(directory, progress=progress)
    else:
        store, manifest = _resolve(options, options.bundle)
        with _progress(options, "reading") as progress:
            damaged = store.find_damage(manifest.files, progress)
        if options.remove_damaged:
            store.remove_damage(damaged)
    wrong = [f"{file.entry.path} {file.reason}" for file in damaged]
    if options.json:
        _print_json({"fingerprint": manifest.fingerprint, "good": not wrong, "damaged": wrong})
    elif wrong:
        done = "removed; publish or build the bundle again" if options.remove_damaged else "see --remove-damaged"
        print("\n".join([f"bundle {manifest.fingerprint} is damaged ({done}):", *(f"  {line}" for line in wrong)]))
    else:
        size = size_text(manifest.size_bytes)
        print(f"bundle {manifest.fingerprint} ({manifest.name}) is good: {len(manifest.files)} files, {size}")
    return 1 if wrong else 0


def _export(options: argparse.Namespace) -> int:
    store, manifest = _resolve(options, options.bundle)
    directory: Path = options.directory
    unfinished = directory / _UNFINISHED
    goes_on = unfinished.is_file() and unfinished.read_text() == manifest.fingerprint
    if directory.exists() and not goes_on and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there and not empty; name a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(manifest.fingerprint)
    with _progress(options, "writing") as progress:
        store.materialize(manifest.files, directory, progress)
    (directory / MANIFEST).write_bytes(write_manifest(manifest))
    unfinished.unlink()
    if options.json:
        return _print_json({"fingerprint": manifest.fingerprint, "directory": str(directory)})
    print(f"{directory}: bundle {manifest.fingerprint[:12]} ({manifest.name})")
    return 0


def _resolve(options: argparse.Namespace, text: str) -> tuple[Store, Manifest]:
    reference = parse_reference(text, options.store)
    store = open_store(reference.store)
    return store, store.resolve(reference)


def _alias(options: argparse.Namespace) -> tuple[Store, BundleReference]:
    reference = parse_reference(options.alias, options.store, "alias")
    if "@" not in options.alias.rsplit("/", 1)[-1]:
        raise ConfigError(
            f"alias: {options.alias!r} names no alias; write name@alias, for instance {options.alias}@prod"
        )
    return open_store(reference.store), reference


@contextmanager
def _progress(options: argparse.Namespace, what: str) -> Iterator[ByteProgress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=options.json or not console.is_terminal) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=1, ensure_ascii=False))
    return 0


def _who() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container whose user has no name
        return f"uid {os.getuid()}@{socket.gethostname()}"


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _days(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise ValueError(text)
    return number
