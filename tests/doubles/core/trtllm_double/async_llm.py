"""AsyncLLM: the PyTorch LLM with deferred start on Ray (reference 1.7)."""

import asyncio
from collections.abc import Generator
from typing import Any

from trtllm_double import signatures
from trtllm_double.configs import by_name
from trtllm_double.llm import LLM
from trtllm_double.switches import NotModelled


class AsyncLLM(LLM):
    """Its three placement arguments come first. Nothing runs until `await llm.setup_async()`."""

    _defers = True

    def __init__(
        self,
        placement_groups: Any = None,
        placement_bundle_indices: Any = None,
        per_worker_gpu_share: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        kwargs["orchestrator_type"] = "ray"
        kwargs["ray_placement_config"] = by_name["RayPlacementConfig"](
            defer_workers_init=True,
            placement_groups=placement_groups,
            placement_bundle_indices=placement_bundle_indices,
            per_worker_gpu_share=per_worker_gpu_share,
        )
        kwargs["allreduce_strategy"] = "NCCL"
        kwargs.setdefault("ray_worker_extension_cls", "tensorrt_llm.llmapi.rlhf_utils.WorkerExtension")
        super().__init__(*args, **kwargs)

    async def setup_async(self) -> "AsyncLLM":
        """Start the ranks."""
        if self._executor is None:
            from trtllm_double.ray_executor import start_deferred

            self._executor = await start_deferred(self.args, self._spec())
            self._startup_s = 0.0
        return self

    def __await__(self) -> Generator[Any, None, "AsyncLLM"]:
        return self.setup_async().__await__()

    async def __aenter__(self) -> "AsyncLLM":
        return await self.setup_async()

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._shutdown)

    def __enter__(self) -> "AsyncLLM":
        raise RuntimeError("Please use 'async with AsyncLLM' instead")

    def _no_rpc(self, *_: Any, **__: Any) -> Any:
        raise NotModelled("release, resume, update_weights, collective_rpc: the double does not imitate them")


for _name in signatures.runtime["async_methods"]:
    if _name != "setup_async":
        setattr(AsyncLLM, _name, AsyncLLM._no_rpc)
