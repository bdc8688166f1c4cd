"""What `raytrt build` prints at its end: for people, and as JSON for machines."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from builders.build import Built
from builders.errors import BuildFailed, GateRefused
from serve.artifacts.manifest import CertificateSummary
from serve.artifacts.reference import BundleReference

_SHOWN_LINES = 25


def built_to_json(built: Built) -> dict[str, Any]:
    """Return a published bundle for machines."""
    manifest = built.manifest
    return {
        "status": "built" if built.made else "found",
        "bundle": str(built.reference),
        "fingerprint": manifest.fingerprint,
        "name": built.name,
        "version": built.naming.version,
        "aliases": list(built.naming.aliases),
        "aliases_left": list(built.naming.left),
        "kind": manifest.kind.value,
        "size_bytes": manifest.size_bytes,
        "certificates": manifest.certificates.model_dump(mode="json"),
        "replaces": built.replaces,
    }


def print_built(console: Console, built: Built) -> None:
    """Say what was built, what it is worth, and what to do with it."""
    manifest = built.manifest
    was = "built" if built.made else "built before, nothing to do"
    print_line(console, f"{built.reference} ({manifest.kind.value}, {manifest.size_bytes / 1e9:.3g} GB): {was}")
    for line in certificate_lines(manifest.certificates):
        print_line(console, f"  {line}")
    if built.replaces is not None:
        print_line(console, f"  This is the fallback, unquantized, because the build failed: {built.replaces}")
    for alias in built.naming.left:
        print_line(
            console,
            f"  @{alias} points to another bundle, and was left there; raytrt bundles promote "
            f"{built.reference} {alias} moves it",
        )
    selector = built.naming.aliases[0] if built.naming.aliases else str(built.naming.version)
    print_line(console, "Serve it: in a deployment's config, instead of `model:`")
    print_line(console, f"    bundle: {BundleReference(built.store, built.name, selector)}")


def certificate_lines(summary: CertificateSummary) -> Sequence[str]:
    """Return the figures that there are, one a line."""
    figures = (
        ("accuracy drop", summary.accuracy_drop, "{:+.2f} points", 100.0),
        ("greedy agreement", summary.greedy_agreement, "{:.1f} %", 100.0),
        ("perplexity", summary.perplexity_ratio, "{:.4f} of the reference's", 1.0),
        ("goodput", summary.output_tokens_per_s, "{:,.0f} tokens/s", 1.0),
        ("time to first token, p95", summary.ttft_p95_s, "{:.0f} ms", 1000.0),
        ("time per output token, p95", summary.tpot_p95_s, "{:.1f} ms", 1000.0),
    )
    return [f"{name}: {form.format(scale * value)}" for name, value, form, scale in figures if value is not None]


def failure_to_json(failure: BuildFailed) -> dict[str, Any]:
    """Return a failure for machines."""
    return {
        "status": "refused" if isinstance(failure, GateRefused) else "failed",
        "step": failure.step,
        "message": failure.message,
        "log": failure.log,
        "tail": list(failure.tail),
    }


def print_failure(console: Console, failure: BuildFailed, *, verbose: bool) -> None:
    """Say what failed, and where to look."""
    for line in failure.tail if verbose else failure.tail[-_SHOWN_LINES:]:
        console.print(f"  | {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
    print_line(console, f"raytrt build: {failure}")
    if failure.log:
        print_line(console, f"{'Its reports' if isinstance(failure, GateRefused) else 'Its log'}: {failure.log}")
    if not isinstance(failure, GateRefused):
        print_line(console, "What other steps finished is kept; the same command goes on from there.")


def print_json(value: Any) -> None:
    """Print a value for machines, to standard output."""
    print(json.dumps(value, indent=2))


def print_line(console: Console, text: str) -> None:
    """Print a text as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
