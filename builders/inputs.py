"""What a build file refers to: its source and its user's files, by content; and with that, what the build is."""

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from blake3 import blake3

from builders.context import StepName
from builders.home import digest_database
from builders.quantize.recipes import recipe_mistakes
from builders.source.listing import SourceListing
from builders.source.reading import list_source, pinned_source
from builders.spec import BuildSpec, read_spec
from builders.step_order import STEPS
from builders.step_table import files_of, step_needs
from builders.texts.package import package_texts_digest
from serve.artifacts.digests import DigestCache
from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.port import ByteProgress, no_progress
from serve.errors import ConfigError

_LARGEST_FILE_BYTES = 256 * 2**20
_STORE_VARIABLE = "RAYTRT_STORE"  # as `raytrt bundles` has it
_CODE_VERSION = "CODE_VERSION"


@dataclass(frozen=True)
class BuildInputs:
    """A build before any node was asked.

    Attributes:
        spec: The specification, with its source pinned: absolute paths, a commit instead of a branch.
        source: The files of the checkpoint.
        user_files: Content of the files that the specification names, as it names them.
        code: Version of each step's code.
        package: Of the steps' modules.
    """

    spec: BuildSpec
    source: SourceListing
    user_files: Mapping[str, bytes]
    code: Mapping[StepName, int]
    package: str = STEPS

    @property
    def digests(self) -> Mapping[str, str]:
        """BLAKE3 of the user's files."""
        return {name: blake3(content).hexdigest() for name, content in self.user_files.items()}

    @property
    def key(self) -> str:
        """Fingerprint of all this: a build with the same key led to the same bundle, if its nodes are as they were."""
        how = {"target": {"num_cpus", "memory_bytes", "time_limit_s", "max_retries"}}
        what = dict.fromkeys(("name", "store", "source", "aliases", "fallback"), True)
        document = self.spec.model_dump(mode="json", exclude={**what, **how})
        return fingerprint(
            {
                "spec": document,
                "source": self.source.digest,
                "texts": package_texts_digest(),
                "files": self.digests,
                "code": {step.value: number for step, number in self.code.items()},
                "raytrt": version("raytrt"),
            }
        )


def read_inputs(path: Path, store: str | None = None, progress: ByteProgress = no_progress) -> BuildInputs:
    """Read a build file, and what it refers to. Blocks; a local source is hashed, if it was not before.

    Args:
        path: The build file; what it refers to is relative to its directory.
        store: Instead of the specification's, and before RAYTRT_STORE.
        progress: Told bytes of the source that were hashed.

    Raises:
        ConfigError: Something is wrong or missing; names file, key and remedy.
    """
    spec, base = read_spec(path), path.absolute().parent
    chosen = store or (None if "store" in spec.model_fields_set else os.environ.get(_STORE_VARIABLE))
    spec = spec.model_copy(update={"store": chosen or _beside(base, spec.store)})
    return inputs_of(spec, base, progress)


def inputs_of(spec: BuildSpec, base: Path, progress: ByteProgress = no_progress, package: str = STEPS) -> BuildInputs:
    """Read what a specification refers to; see `read_inputs`."""
    if mistakes := recipe_mistakes(spec.quantize, spec.kind):
        raise ConfigError("\n".join(mistakes))
    steps = step_needs(spec)
    names = dict.fromkeys(name for step in steps for name in files_of(spec, step))
    user_files = {name: _read(base, name) for name in names}
    listing = list_source(spec, DigestCache(digest_database()), base, progress)
    spec = spec.model_copy(update={"source": pinned_source(spec.source, listing, base)})
    return BuildInputs(
        spec=spec,
        source=listing,
        user_files=user_files,
        code={step: code_version(step, package) for step in steps},
        package=package,
    )


def code_version(step: StepName, package: str = STEPS) -> int:
    """Return the version of a step's code, without importing it: it may need a toolchain that is elsewhere.

    Raises:
        LookupError: There is none, which is a mistake of ours.
    """
    name = f"{package}.{step.value}"
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise LookupError(f"{name} does not exist")
    for statement in ast.parse(Path(spec.origin).read_bytes()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Constant(value=int(number))) if (
                target == _CODE_VERSION
            ):
                return number
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.Constant(value=int(number))) if (
                target == _CODE_VERSION
            ):
                return number
    raise LookupError(f"{name} has no {_CODE_VERSION}")


def _beside(base: Path, store: str) -> str:
    """Return a store as the build file in a directory means it."""
    is_fixed = "://" in store or store.startswith("~")
    return store if is_fixed else str(base / store)


def _read(base: Path, name: str) -> bytes:
    path = base / Path(name).expanduser()
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE_BYTES:
            raise ConfigError(
                f"file: {path} has {size / 2**20:.0f} MiB; texts and questions may have 256 MiB: use fewer"
            )
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"file: {path}: {exc.strerror}; paths in a build file are relative to its directory"
        ) from None
