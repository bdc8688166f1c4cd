"""A build: the bundle that it led to before, or one that is made now, or its fallback; and its names."""

from dataclasses import dataclass, replace

from builders.context import StepName
from builders.display import BuildDisplay
from builders.errors import BuildFailed
from builders.fallback import fallback_spec
from builders.inputs import BuildInputs
from builders.naming import Naming, name_bundle
from serve.artifacts.manifest import Manifest
from serve.artifacts.port import ArtifactStore
from serve.artifacts.reference import BundleReference


@dataclass(frozen=True)
class BuildOptions:
    """How a build is run.

    Attributes:
        address: Of a Ray cluster; None: Ray is started here, if it is needed.
        probe: Ask the nodes, though the same build led to a bundle before.
        retry: Ask the gate again, though it refused the candidate before.
    """

    address: str | None = None
    probe: bool = False
    retry: bool = False


@dataclass(frozen=True)
class Built:
    """A bundle that is published.

    Attributes:
        manifest: Its.
        store: URL of its store.
        name: Under which it can be found.
        naming: Version and aliases of that name.
        made: Whether this build made it; False: it was there.
        replaces: Why it is the fallback; None: it is what was asked for.
    """

    manifest: Manifest
    store: str
    name: str
    naming: Naming
    made: bool
    replaces: str | None = None

    @property
    def reference(self) -> BundleReference:
        """A reference to this version."""
        return BundleReference(self.store, self.name, str(self.naming.version))


def build(inputs: BuildInputs, store: ArtifactStore, options: BuildOptions, display: BuildDisplay) -> Built:
    """Build, publish and name a bundle, or find the one that the same build led to before; or the fallback.

    Raises:
        ConfigError: It cannot be made like this, or here; nothing was begun.
        BuildFailed: A step failed, or the gate refused, and there is no fallback; what was finished is kept.
    """
    spec = inputs.spec
    earlier = None if options.probe or options.retry else find_earlier(inputs, store)
    if earlier is not None:
        return Built(earlier, store.url, spec.name, name_bundle(store, spec, earlier), made=False)
    # Imported here: it takes half a second, and a build that was done before does not need it.
    from builders.making import make

    replaces = None
    try:
        manifest, made = make(inputs, store, options, display)
        store.record_build(inputs.key, manifest.fingerprint)
    except BuildFailed as exc:
        fallback = fallback_spec(spec)
        if fallback is None or exc.step == StepName.FETCH:
            raise
        replaces = str(exc)
        display.say(f"{replaces}; building the fallback: the unquantized checkpoint for the transformers engine")
        manifest, made = make(replace(inputs, spec=fallback), store, options, display, replaces)
    naming = name_bundle(store, spec, manifest, replaces)
    return Built(manifest, store.url, spec.name, naming, made, replaces)


def find_earlier(inputs: BuildInputs, store: ArtifactStore) -> Manifest | None:
    """Return the bundle that the same build led to before; None: there is none. Asks no node."""
    fingerprint = store.find_build(inputs.key)
    return store.find_whole_bundle(fingerprint) if fingerprint is not None else None
