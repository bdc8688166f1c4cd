"""Which executor is made: reference 4.1."""

import os
from typing import Any

from trtllm_double.engine_spec import EngineSpec
from trtllm_double.executor import Executor, InProcessExecutor
from trtllm_double.switches import NotModelled


def make_executor(args: Any, spec: EngineSpec, mpi_session: Any) -> Executor:
    """Start the ranks and return what talks to them. Blocks until the model is loaded."""
    if args.orchestrator_type == "rpc":
        raise NotModelled("orchestrator_type='rpc': the double does not imitate it")
    in_process = os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1" or args.gather_generation_logits
    if spec.world_size == 1 and in_process and args.orchestrator_type is None:
        return InProcessExecutor(spec)
    if args.orchestrator_type == "ray":
        from trtllm_double.ray_executor import start_now  # imports ray

        return start_now(args, spec)
    from trtllm_double.proxy import ProxyExecutor
    from trtllm_double.spawners import choose_spawner

    return ProxyExecutor(spec, choose_spawner(spec.world_size, mpi_session))
