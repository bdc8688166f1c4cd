"""What a bundle of a kind has to hold, besides being what its manifest says."""

from serve.artifacts.manifest import MODEL, BundleKind, Manifest
from serve.errors import BundleCorrupt


def rank_files(manifest: Manifest) -> tuple[str, ...]:
    """Return the files that each rank loads alone; empty if all ranks load the same ones."""
    if manifest.kind is not BundleKind.TENSORRT_ENGINE:
        return ()
    return tuple(f"{MODEL}/rank{rank}.engine" for rank in range(manifest.parallel.world_size))


def check_ranks(manifest: Manifest) -> None:
    """Check that there is an engine for each rank of the layout.

    Raises:
        BundleCorrupt: One is missing.
    """
    there = {entry.path for entry in manifest.files}
    missing = [path for path in rank_files(manifest) if path not in there]
    if missing:
        layout = manifest.parallel
        raise BundleCorrupt(
            f"bundle {manifest.fingerprint[:12]}: {', '.join(missing)} missing: its layout (tensor={layout.tensor}, "
            f"pipeline={layout.pipeline}) has {layout.world_size} ranks; compile it again"
        )
