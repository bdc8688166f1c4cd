"""Manifest: what an engine bundle is, how it was made, who may load it, and the digest of every file."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from serve.core.parallel import ParallelLayout
from serve.core.strict_model import StrictModel

FORMAT_VERSION: Literal[1] = 1

# What a bundle's directory holds besides its manifest.
MODEL = "model"
TOKENIZER = "tokenizer"
RUNTIME = "runtime.json"
CACHES = "caches"
CERTIFICATES = "certificates"
MANIFEST = "manifest.json"
ACCURACY = f"{CERTIFICATES}/accuracy.json"
PERFORMANCE = f"{CERTIFICATES}/performance.json"
GOLDEN = f"{CERTIFICATES}/golden.jsonl"


class BundleKind(StrEnum):
    """What `model/` holds, and thus which engine loads it."""

    TENSORRT_ENGINE = "tensorrt-engine"  # TensorRT-LLM 1.2.x, TensorRT backend
    TRTLLM_CHECKPOINT = "trtllm-checkpoint"  # TensorRT-LLM, both lines, PyTorch backend
    TRANSFORMERS_CHECKPOINT = "transformers-checkpoint"

    @property
    def engine(self) -> Literal["trtllm", "transformers"]:
        """The engine that loads it."""
        return "transformers" if self is BundleKind.TRANSFORMERS_CHECKPOINT else "trtllm"


class FileEntry(StrictModel):
    """One file."""

    path: str = Field(description="Relative to the bundle's directory, with `/`.")
    size_bytes: NonNegativeInt
    blake3: str = Field(pattern=r"^[0-9a-f]{64}$", description="BLAKE3 of the content.")

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        pure = PurePosixPath(path)
        odd = any(ord(character) < 32 or character in "\\:" for character in path)
        if odd or not path or pure.is_absolute() or pure.as_posix() != path or {"..", "."} & set(pure.parts):
            raise ValueError(f"{path!r} is no path inside the bundle; the bundle was tampered with: do not use it")
        return path


def check_paths(files: Sequence[FileEntry]) -> None:
    """Check the paths of a list of files together.

    Raises:
        ValueError: One is there twice, they are out of order, or one is a file and a directory.
    """
    paths = [entry.path for entry in files]
    if sorted(set(paths)) != paths:
        raise ValueError("files: paths have to be unique and in order; the list was tampered with")
    parents = {parent.as_posix() for path in paths for parent in PurePosixPath(path).parents}
    if both := parents.intersection(paths):
        raise ValueError(f"files: {min(both)!r} is a file and a directory; the list was tampered with")


class Requirements(StrictModel):
    """What a node has to have, so that a replica may load the bundle there. None or empty: whatever there is."""

    gpus: NonNegativeInt = Field(default=0, description="GPUs of the whole layout.")
    gpu_name: str | None = Field(default=None, description="As the driver has it; the same model of GPU.")
    compute_capability: str | None = Field(default=None, description="Exactly this.")
    min_compute_capability: str | None = Field(default=None, description="This, or a newer one.")
    gpu_memory_bytes: NonNegativeInt = Field(default=0, description="Of each GPU, at least; 2 % less is accepted.")
    min_driver: str | None = Field(default=None, description="Version of NVIDIA's driver.")
    machine: str | None = Field(default=None, description="Processor architecture.")
    libraries: dict[str, str] = Field(
        default={}, description="Version specifiers (PEP 440) by distribution, for instance tensorrt_llm: ==1.2.1."
    )


class ModelOrigin(StrictModel):
    """Where the weights came from."""

    source: str = Field(description="As the build's specification names it.")
    revision: str | None = Field(default=None, description="Of a hub; None: the source has no revisions.")
    digest: str = Field(description="Fingerprint of the digests of all source files.")
    architecture: str = Field(description="First of `architectures` in config.json.")
    parameters: NonNegativeInt = Field(default=0, description="Number of weights; 0: not counted.")


class Quantization(StrictModel):
    """How weights, activations, keys and values are kept."""

    recipe: str = Field(default="none", description="Name of the build's recipe; none: as the source has them.")
    algorithm: str | None = Field(default=None, description="`quant_algo` of hf_quant_config.json.")
    kv_cache_algorithm: str | None = Field(default=None, description="`kv_cache_quant_algo` of it.")


class Provenance(StrictModel):
    """How the bundle was made; nothing in it changes what the bundle does."""

    created: str = Field(description="Time of publication, ISO 8601, UTC.")
    raytrt: str = Field(description="Version that built it.")
    steps: dict[str, str] = Field(default={}, description="Fingerprint of each step's output, by the step's name.")
    seconds: dict[str, NonNegativeFloat] = Field(default={}, description="How long each step took when it ran.")
    spec: dict[str, Any] = Field(default={}, description="The build's specification.")
    replaces: str | None = Field(
        default=None, description="Why this is not the kind of bundle that the specification asks for; None: it is."
    )


class CertificateSummary(StrictModel):
    """The figures of the certificates that lists show."""

    accuracy_drop: float | None = Field(default=None, description="Of the gate's task, absolute, 0.01 is one percent.")
    greedy_agreement: float | None = Field(default=None, description="Share of greedy tokens like the reference's.")
    perplexity_ratio: float | None = Field(default=None, description="Candidate over reference.")
    output_tokens_per_s: float | None = Field(default=None, description="Goodput of the load test.")
    ttft_p95_s: float | None = Field(default=None, description="Of the load test.")
    tpot_p95_s: float | None = Field(default=None, description="Of the load test.")


class Manifest(StrictModel):
    """`manifest.json` of a bundle."""

    format_version: Literal[1] = FORMAT_VERSION
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of everything that shapes the bundle.")
    name: str = Field(description="The name under which it was published first.")
    kind: BundleKind
    model: ModelOrigin
    quantization: Quantization = Quantization()
    parallel: ParallelLayout = ParallelLayout()
    requires: Requirements = Requirements()
    provenance: Provenance
    certificates: CertificateSummary = CertificateSummary()
    files: tuple[FileEntry, ...] = Field(min_length=1, description="Every file but the manifest, ordered by path.")

    @model_validator(mode="after")
    def _paths_are_good(self) -> Self:
        check_paths(self.files)
        if any(entry.path == MANIFEST for entry in self.files):
            raise ValueError(f"files: {MANIFEST} cannot list itself; the manifest was tampered with")
        return self

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.size_bytes for entry in self.files)


class BundleRuntime(StrictModel):
    """`runtime.json`: the tuned settings. What a deployment's config says explicitly comes before them."""

    engine: dict[str, Any] = Field(
        default={}, description="Section `engine` of a model's configuration, with its `kind`, as far as it was tuned."
    )
    replica_requests: PositiveInt | None = Field(
        default=None, description="Sequences in flight at which the load test met its goal best."
    )
