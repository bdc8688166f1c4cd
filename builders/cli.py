"""`raytrt build`, `python -m builders`: make an engine bundle from a build file, and publish it if it passes its gate.

Exit status: 0 published, or there already; 1 failed, or refused by the gate; 2 a mistake in the build file or on the
command line; 3 failed, and its fallback was published instead; 130 interrupted. What was finished is kept in any case:
the same command goes on where it was broken off.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from builders.build import BuildOptions, build
from builders.display import make_display
from builders.errors import BuildFailed
from builders.home import digest_database
from builders.inputs import read_inputs
from builders.progress import Progress
from builders.reports import (
    built_to_json,
    failure_to_json,
    print_built,
    print_failure,
    print_json,
)
from serve.artifacts.digests import DigestCache
from serve.artifacts.store import open_store
from serve.errors import BundleCorrupt, StoreUnavailable

OK, FAILED, MISTAKE, FELL_BACK, INTERRUPTED = 0, 1, 2, 3, 130
_LOCAL = "local"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("spec", type=Path, help="build file, for instance configs/builds/quickstart.yaml")
    parser.add_argument("--dry-run", action="store_true", help="show the steps, and which are done already; do nothing")
    parser.add_argument("--retry", action="store_true", help="verify again, though the gate refused this candidate")
    parser.add_argument(
        "--probe", action="store_true", help="ask the nodes for their hardware and libraries, though this was built"
    )
    parser.add_argument("--address", help="of a Ray cluster (or RAY_ADDRESS); without it, Ray is started here")
    parser.add_argument("--store", help="where the bundle is published, instead of the build file's `store`")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and no progress")
    parser.add_argument("--verbose", action="store_true", help="show more of a failed step's log")


def run(options: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit status.

    Raises:
        ConfigError: The build file, the command line or the cluster is not as it has to be.
        KeyboardInterrupt: It was interrupted; everything that it started has ended.
    """
    # A shell that starts this in the background has SIGINT ignored; and whoever sends SIGTERM wants the same.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return _outline(options) if options.dry_run else _build(options)
    except BuildFailed as exc:
        if options.json:
            print_json(failure_to_json(exc))
        print_failure(Console(stderr=True), exc, verbose=options.verbose)
        return MISTAKE if exc.mistake else FAILED
    except StoreUnavailable as exc:
        print(f"raytrt build: {exc}; the same command goes on from here", file=sys.stderr)
        return FAILED
    except BundleCorrupt as exc:
        print(f"raytrt build: {exc}", file=sys.stderr)
        return FAILED


def _build(options: argparse.Namespace) -> int:
    display = make_display(Console(stderr=True), quiet=options.json)

    def reading(done: int, total: int) -> None:
        display.reading(Progress(done, total, "reading the source"))

    with display:
        inputs = read_inputs(options.spec, options.store, reading)
        display.say(f"{options.spec}: {inputs.source}")
        store = open_store(inputs.spec.store, DigestCache(digest_database()))
        how = BuildOptions(_address(options), probe=options.probe, retry=options.retry)
        built = build(inputs, store, how, display)
    if options.json:
        print_json(built_to_json(built))
    else:
        print_built(Console(), built)
    return OK if built.replaces is None else FELL_BACK


def _outline(options: argparse.Namespace) -> int:
    # Imported here: only this needs it, and it takes a while.
    from builders.making import outline
    from builders.outline_report import outline_to_json, print_outline

    inputs = read_inputs(options.spec, options.store)
    found = outline(inputs, open_store(inputs.spec.store), _address(options))
    if options.json:
        print_json(outline_to_json(found))
    else:
        print_outline(Console(), found)
    return OK


def _address(options: argparse.Namespace) -> str | None:
    """Return the address of the cluster to join; None: none, so that Ray is started here."""
    address = options.address or os.environ.get("RAY_ADDRESS") or _LOCAL
    return None if address == _LOCAL else str(address)
