"""Orchestration: who starts the ranks of a TensorRT-LLM engine, as the adapter needs to know it. No Ray here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OrchestratorKind = Literal["in_process", "mpi", "ray"]


@dataclass(frozen=True)
class Orchestration:
    """Who starts the ranks.

    Attributes:
        kind: in_process: one rank, a thread of this process; mpi: TensorRT-LLM spawns one process a rank on this node;
            ray: one Ray actor a rank, in the bundles named below.
        placement_groups: Ray placement groups, opaque here; empty unless `kind` is ray.
        bundle_indices: For each group, the bundle of each of its ranks, in rank order.
        environ: Variables that have to be set before TensorRT-LLM is imported; None removes one.
    """

    kind: OrchestratorKind = "in_process"
    placement_groups: tuple[Any, ...] = ()
    bundle_indices: tuple[tuple[int, ...], ...] = ()
    environ: Mapping[str, str | None] = field(default_factory=dict)
