"""Tables of bundles, for people."""

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.artifacts.manifest import Manifest
from serve.artifacts.manifest_diff import Difference
from serve.artifacts.port import AliasMove, Collected, Version
from serve.artifacts.size_text import size_text

# Where nobody looks at a terminal, a line is a line.
_WIDE = 1000


def make_console() -> Console:
    """Return where tables are printed: stdout."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, soft_wrap=False)


def bundles_table(rows: Sequence[tuple[str, Version, Manifest | None, Sequence[str]]]) -> Table:
    """Return a table of versions: name, version, manifest if it is still there, and aliases that point to it."""
    table = _table(
        "bundle", "fingerprint", "kind", "quantization", "size", "accuracy drop", "tokens/s", "aliases", "made"
    )
    for name, version, manifest, aliases in rows:
        there = (
            [
                manifest.kind.value,
                manifest.quantization.recipe,
                size_text(manifest.size_bytes),
                percent_text(manifest.certificates.accuracy_drop),
                number_text(manifest.certificates.output_tokens_per_s),
            ]
            if manifest is not None
            else ["(collected)", "", "", "", ""]
        )
        label = f"{name}@{version.number}"
        table.add_row(*_texts(label, version.fingerprint[:12], *there, ", ".join(aliases), when_text(version.created)))
    return table


def facts_table(facts: Mapping[str, str]) -> Table:
    """Return a table of two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        table.add_row(*_texts(key, value))
    return table


def manifest_facts(manifest: Manifest, holders: Sequence[str]) -> dict[str, str]:
    """Return what is told of a bundle."""
    certificates, layout, origin = manifest.certificates, manifest.parallel, manifest.model
    kv_cache = manifest.quantization.kv_cache_algorithm or "as the engine has it"
    requires = manifest.requires.model_dump(mode="json", exclude_defaults=True)
    facts = {
        "fingerprint": manifest.fingerprint,
        "name": manifest.name,
        "kind": manifest.kind.value,
        "model": f"{origin.source}{f'@{origin.revision}' if origin.revision else ''} ({origin.architecture})",
        "quantization": f"{manifest.quantization.recipe}, KV cache {kv_cache}",
        "layout": f"tensor {layout.tensor}, pipeline {layout.pipeline}",
        "requires": "; ".join(f"{key} {value}" for key, value in requires.items()) or "nothing",
        "accuracy drop": percent_text(certificates.accuracy_drop),
        "greedy agreement": percent_text(certificates.greedy_agreement),
        "perplexity ratio": number_text(certificates.perplexity_ratio, 4),
        "output tokens/s": number_text(certificates.output_tokens_per_s),
        "TTFT p95": milliseconds_text(certificates.ttft_p95_s),
        "TPOT p95": milliseconds_text(certificates.tpot_p95_s),
        "made": f"{when_text(manifest.provenance.created)} by RayTRT {manifest.provenance.raytrt}",
        "replaces": manifest.provenance.replaces or "",
        "files": f"{len(manifest.files)}, {size_text(manifest.size_bytes)}",
        "in use by": ", ".join(holders),
    }
    return {key: value for key, value in facts.items() if value}


def files_table(manifest: Manifest) -> Table:
    """Return a table of files."""
    table = _table("file", "size", "BLAKE3")
    for entry in manifest.files:
        table.add_row(*_texts(entry.path, size_text(entry.size_bytes), entry.blake3[:16]))
    return table


def differences_table(left: str, right: str, differences: Sequence[Difference]) -> Table:
    """Return a table of what differs."""
    table = _table("what", left, right)
    for item in differences:
        table.add_row(*_texts(item.key, *("-" if side is None else str(side) for side in (item.left, item.right))))
    return table


def history_table(moves: Sequence[AliasMove]) -> Table:
    """Return a table of an alias's moves."""
    table = _table("when", "to", "rejected", "reason")
    for move in moves:
        table.add_row(*_texts(when_text(move.created), move.fingerprint[:12], (move.rejected or "")[:12], move.reason))
    return table


def collected_lines(collected: Collected, *, dry_run: bool) -> str:
    """Return what a collection did, in a sentence, and which bundles."""
    verb = "would be removed" if dry_run else "removed"
    lines = [
        f"{len(collected.bundles)} bundles, {len(collected.steps)} steps, {collected.blobs} blobs, "
        f"{size_text(collected.size_bytes)} {verb}"
    ]
    return "\n".join([*lines, *(f"  bundle {fingerprint}" for fingerprint in collected.bundles)])


def percent_text(share: float | None) -> str:
    """Return a share in percent; empty if it is not known."""
    return "" if share is None else f"{share * 100:.2f} %"


def number_text(value: float | None, digits: int = 0) -> str:
    """Return a number; empty if it is not known."""
    return "" if value is None else f"{value:,.{digits}f}"


def milliseconds_text(seconds: float | None) -> str:
    """Return a time in milliseconds; empty if it is not known."""
    return "" if seconds is None else f"{seconds * 1000:.1f} ms"


def when_text(iso: str) -> str:
    """Return a time of day in this machine's time zone; as it stands if it is no time."""
    try:
        return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return iso


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _texts(*cells: str) -> list[Text]:
    # Not plain strings: rich would take [brackets] in a note or a path for markup.
    return [Text(cell) for cell in cells]
