"""Make the engine object that a plan describes: environment first, then import, check, and construct."""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from serve.engines.trtllm.arguments import EnginePlan
from serve.engines.trtllm.call import make
from serve.engines.trtllm.line import PACKAGE, Line
from serve.engines.trtllm.ray_import import mend_ray_import
from serve.engines.trtllm.signature_data import check_names

logger = logging.getLogger(__name__)


def construct(plan: EnginePlan) -> Any:
    """Make the LLM. Blocks until the model is loaded; call it in a thread without an event loop.

    With a running loop in the thread, TensorRT-LLM's Ray executor would make no workers, and then wait for them.

    Raises:
        RuntimeError: An event loop is running in this thread.
        ConfigError: The installed TensorRT-LLM does not have a keyword of the call.
    """
    if _loop_is_running():
        raise RuntimeError("an LLM is constructed in a thread without an event loop; use asyncio.to_thread")
    if PACKAGE in sys.modules and any(os.environ.get(name) != value for name, value in plan.environ.items()):
        logger.warning("TensorRT-LLM was imported before its environment was set; some variables may come too late.")
    apply_environ(plan.environ)
    if "ray_placement_config" in plan.call.keywords and plan.line is Line.V1_2:
        mend_ray_import()
    check_names(plan.call, plan.line, installed=True)
    return make(plan.call)


def apply_environ(changes: Mapping[str, str | None], environ: MutableMapping[str, str] = os.environ) -> None:
    """Set variables; None removes one."""
    for name, value in changes.items():
        if value is None:
            environ.pop(name, None)
        else:
            environ[name] = value


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
