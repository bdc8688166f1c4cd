"""Manifests as they are read from a store or a directory."""

from pydantic import ValidationError

from serve.artifacts.manifest import Manifest
from serve.artifacts.sealing import seal, unseal
from serve.core.strict_model import describe_mistakes
from serve.errors import BundleCorrupt


def parse_manifest(data: bytes, source: str, fingerprint: str | None = None) -> Manifest:
    """Read a manifest.

    Args:
        data: The file.
        source: Where it is, for messages.
        fingerprint: That it has to have; None: any.

    Raises:
        BundleCorrupt: It is none, or another bundle's.
    """
    try:
        manifest = Manifest.model_validate(unseal(data))
    except ValidationError as exc:
        raise BundleCorrupt(f"{source} is no manifest of a bundle:\n{describe_mistakes(exc, 'manifest')}") from None
    except ValueError as exc:
        raise BundleCorrupt(
            f"{source} is no manifest of a bundle ({exc}); bring the file back, or run the bundle's build again"
        ) from None
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise BundleCorrupt(f"{source} is the manifest of {manifest.fingerprint}, not of {fingerprint}")
    return manifest


def write_manifest(manifest: Manifest) -> bytes:
    """Write a manifest, as stores and directories have it."""
    return seal(manifest.model_dump(mode="json"))
