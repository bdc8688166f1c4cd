"""Lets the Ray executor of TensorRT-LLM 1.2.x be imported with Ray 2.55 and newer."""

import importlib
from types import ModuleType

_NAME = "PlacementGroupSchedulingStrategy"


def mend_ray_import() -> None:
    """Put a class back where 1.2.x imports it from: Ray 2.54 was the last to have it there, too.

    Ray is not imported by a statement, as engines do not depend on it: it is here wherever this orchestrator is.
    """
    old: ModuleType = importlib.import_module("ray.util.placement_group")
    if not hasattr(old, _NAME):
        setattr(old, _NAME, getattr(importlib.import_module("ray.util.scheduling_strategies"), _NAME))
