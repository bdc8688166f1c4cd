"""BaseLLM and the PyTorch LLM (reference 1.1, 1.2, 2.1)."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from trtllm_double import line, signatures, switches
from trtllm_double.async_queue import running_loop
from trtllm_double.configs import TorchLlmArgs, TrtLlmArgs
from trtllm_double.engine_spec import EngineSpec
from trtllm_double.errors import RequestError
from trtllm_double.executor import Executor, IterationResult
from trtllm_double.results import RequestOutput
from trtllm_double.sampling_params import SamplingParams, to_engine
from trtllm_double.switches import NotModelled, device_count
from trtllm_double.tokenizer import TransformersTokenizer

_TENSORRT_ONLY = (
    frozenset(TrtLlmArgs.model_fields) - frozenset(TorchLlmArgs.model_fields) if TrtLlmArgs else frozenset()
)
_SPECIAL = ("_mpi_session", "backend")


class BaseLLM:
    """What both backends have in common.

    Raises:
        ValueError: An unknown keyword, by name (pydantic's ValidationError is one too).
        RuntimeError: No GPU is visible, or too few.
    """

    _args_class: Any = TorchLlmArgs
    _defers = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._executor: Executor | None = None
        kwargs.pop("executor_cls", None)  # a hook of upstream's tests
        self._choose_orchestrator(kwargs)
        self._check_names(kwargs)
        self._mpi_session = kwargs.pop("_mpi_session", None)
        backend = kwargs.pop("backend", None)
        if backend not in self._backends():
            raise ValueError(f"Unsupported backend: {backend}")
        self._llm_id = f"{platform.node()}-{os.getpid()}-{int(time.time() * 1000)}"
        self.args = self._args_class(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            **kwargs,
        )
        os.environ.update(self.args.env_overrides or {})  # reference 7.1: LLM changes its process's environment
        self._check_gpus()
        self._next_id = 0
        self._started_s = time.monotonic()
        self._model_dir = self._find_model()
        self._tokenizer = self._load_tokenizer()
        if not self._defers:
            self._build()

    # Construction

    def _choose_orchestrator(self, kwargs: dict[str, Any]) -> None:
        """Reference 4.2: the variable and the keyword imply each other, for the PyTorch backend."""
        if os.environ.get("TLLM_DISABLE_MPI") == "1":
            kwargs["orchestrator_type"] = "ray"
        if kwargs.get("orchestrator_type") == "ray":
            os.environ["TLLM_DISABLE_MPI"] = "1"

    def _check_names(self, kwargs: dict[str, Any]) -> None:
        for key in kwargs:
            if key in self._args_class.model_fields or key in _SPECIAL:
                continue
            if key in _TENSORRT_ONLY:
                raise ValueError(
                    f"{key} is only supported by the TensorRT backend: use tensorrt_llm._tensorrt_engine.LLM instead"
                )
            raise ValueError(f"{type(self).__name__} got invalid argument: {key}")

    def _backends(self) -> tuple[str | None, ...]:
        return (None, "pytorch")

    def _check_gpus(self) -> None:
        args = self.args
        trained = os.environ.get("RAY_LOCAL_WORLD_SIZE") is not None
        per_node = args.tensor_parallel_size if trained else args.gpus_per_node or device_count()
        object.__setattr__(args, "gpus_per_node", per_node)
        world = args.world_size
        if world > 1 and not trained:
            nodes = -(-world // per_node) if per_node else 1
            needed = world // nodes
            if device_count() < needed:
                raise RuntimeError(f"Only {device_count()} GPUs are available, but {needed} are required.")

    def _find_model(self) -> Path:
        """Return the model's directory; hub ids go through MPI if there are several ranks (reference 4.3b)."""
        path = Path(self.args.model)
        if not path.is_dir():
            if self.args.world_size > 1:
                switches.misuse(f"{path} is no local directory: all ranks would be told through MPI to download it")
            raise ValueError(f"Repo id {str(path)!r} cannot be downloaded: the double has no network")
        draft = getattr(getattr(self.args, "speculative_config", None), "speculative_model", None)
        if draft is not None and not Path(draft).is_dir():
            raise ValueError(f"speculative_model {str(draft)!r} cannot be downloaded: the double has no network")
        return path

    def _load_tokenizer(self) -> Any:
        if self.args.skip_tokenizer_init:
            return None
        given = self.args.tokenizer
        if given is not None and not isinstance(given, str | Path):
            return given
        directory = Path(given or self.args.model)  # an engine directory has none (reference 5.1)
        if not (directory / "tokenizer.json").is_file():
            return None  # upstream warns, and goes on without
        return TransformersTokenizer(directory)

    def _build(self) -> None:
        from trtllm_double.choose_executor import make_executor

        self._executor = make_executor(self.args, self._spec(), self._mpi_session)
        self._startup_s = time.monotonic() - self._started_s

    def _spec(self) -> EngineSpec:
        args, kv = self.args, self.args.kv_cache_config
        return EngineSpec(
            line=line.current().name,
            model=str(self._model_dir),
            dummy=getattr(args.load_format, "name", args.load_format) in ("DUMMY", "dummy"),
            tensor_parallel=args.tensor_parallel_size,
            pipeline_parallel=args.pipeline_parallel_size,
            max_batch_size=args.max_batch_size or 2048,
            max_num_tokens=args.max_num_tokens or 8192,
            max_seq_len=args.max_seq_len,
            tokens_per_block=kv.tokens_per_block,
            max_tokens=kv.max_tokens,
            memory_fraction=0.9 if kv.free_gpu_memory_fraction is None else kv.free_gpu_memory_fraction,
            host_bytes=kv.host_cache_size or 0,
            chunked_prefill=args.enable_chunked_prefill,
            guaranteed=args.scheduler_config.capacity_scheduler_policy != "MAX_UTILIZATION",
            reuse=kv.enable_block_reuse,
            partial_reuse=kv.enable_partial_reuse,
            min_offload_priority=kv.secondary_offload_min_priority or 0,
            event_buffer=kv.event_buffer_max_size,
            attention_windows=tuple(kv.max_attention_window or ()),
            attention_dp=args.enable_attention_dp,
            stats=getattr(args, "enable_iter_perf_stats", False) or bool(args.iter_stats_max_iterations),
            request_stats=getattr(args, "enable_iter_req_stats", False) or bool(args.request_stats_max_iterations),
            max_stats_len=getattr(args, "max_stats_len", 1000),
            includes_end_id=self._includes_end_id,
        )

    _includes_end_id = True

    # Requests

    def generate_async(self, *positional: Any, **keywords: Any) -> RequestOutput:
        """Submit one prompt; see `__signature__`, which is the line's. Tokenises on the caller's thread."""
        bound = _GENERATE_ASYNC.bind(*positional, **keywords)
        bound.apply_defaults()
        executor = self._living()
        given = bound.arguments
        for name in ("prompt_adapter_request", "kv_cache_retention_config", "disaggregated_params", "_postproc_params"):
            if given.get(name) is not None:
                raise NotModelled(f"generate_async({name}=...): the double does not imitate it")
        if not 0 <= given.get("priority", 0.5) <= 1:
            raise ValueError(f"priority must be in [0, 1], got {given['priority']}")
        params = self._prepare(given["sampling_params"])
        text, prompt = self._tokenise(given["inputs"], params)
        self._check_prompt(prompt, params)
        self._next_id += 1
        lora = given["lora_request"]
        if lora is not None and not (self.args.enable_lora or self.args.lora_config):
            raise ValueError("lora_request needs an LLM that was made with enable_lora=True or a lora_config")
        from trtllm_double.block_key import salt_id

        request = to_engine(
            params,
            self._next_id,
            prompt,
            executor.vocab_size,
            streaming=given["streaming"],
            stream_interval=getattr(self.args, "stream_interval", 1),
            salt_id=salt_id(given["cache_salt"]),
            lora_id=None if lora is None else lora.adapter_id,
            priority=given.get("priority", 0.5),
        )
        output = RequestOutput(
            self._next_id,
            text,
            prompt,
            params,
            streaming=given["streaming"],
            executor=executor,
            tokenizer=self._tokenizer,
            on_error=executor.raise_background_error,
            wants_metrics=params.return_perf_metrics or self.args.return_perf_metrics,
        )
        executor.submit(request, output)
        return output

    def generate(self, *positional: Any, **keywords: Any) -> Any:
        """Generate for one prompt or a list of prompts, and wait."""
        if running_loop() is not None:
            switches.misuse("generate() was called on the thread of an event loop: it blocks")
        bound = _GENERATE.bind(*positional, **keywords)
        bound.apply_defaults()
        given = dict(bound.arguments)
        given.pop("use_tqdm")
        inputs, params = given.pop("inputs"), given.pop("sampling_params")
        single = isinstance(inputs, str | dict) or not inputs or isinstance(inputs[0], int)
        prompts = [inputs] if single else list(inputs)
        each = params if isinstance(params, list) else [params] * len(prompts)
        if params is not None and not isinstance(params, list) and len(prompts) > 1:
            params._used = False
        futures = []
        for prompt, one in zip(prompts, each, strict=True):
            if one is not None and len(prompts) > 1 and not isinstance(params, list):
                one._used = False  # one object for a whole `generate` is upstream's own use of it
            futures.append(self.generate_async(prompt, one, **given))
        results = [future.result() for future in futures]
        return results[0] if single else results

    def _prepare(self, params: Any) -> Any:
        if params is None:
            if self._tokenizer is None:
                raise ValueError("tokenizer is required to initialize a default sampling_params")
            params = SamplingParams(end_id=self._tokenizer.eos_token_id, pad_id=self._tokenizer.pad_token_id)
        elif not isinstance(params, SamplingParams):
            raise TypeError(f"The sampling_params must be type SamplingParams or None, but got {type(params)}")
        params._mark_used()
        if params.end_id is None:
            if self._tokenizer is None:
                raise ValueError("tokenizer is required to reset end_id if it is None, or you can specify the end_id")
            params._setup(self._tokenizer)
        elif (params.stop is not None or params.bad is not None) and self._tokenizer is not None:
            params._setup(self._tokenizer)
        params.return_perf_metrics = params.return_perf_metrics or self.args.return_perf_metrics
        if params.guided_decoding is not None:
            if self.args.guided_decoding_backend is None:
                raise RequestError("Guided decoding is not enabled: the LLM needs a guided_decoding_backend")
            raise NotModelled("guided decoding: the double does not imitate it")
        return params

    def _tokenise(self, inputs: Any, params: Any) -> tuple[str | None, list[int]]:
        if isinstance(inputs, dict):
            inputs = inputs.get("prompt_token_ids", inputs.get("prompt"))
        if isinstance(inputs, str):
            if self._tokenizer is None:
                raise ValueError("tokenizer is required to tokenize a string prompt: pass token ids")
            ids = self._tokenizer.encode(inputs, add_special_tokens=params.add_special_tokens)
            if params.truncate_prompt_tokens is not None:
                ids = ids[-params.truncate_prompt_tokens :]
            return inputs, ids
        if not isinstance(inputs, list) or not all(type(token) is int for token in inputs):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        if not inputs:
            raise ValueError("The prompt is empty")
        return None, inputs

    def _check_prompt(self, prompt: list[int], params: Any) -> None:
        """Reference 2.1: raised at once, by generate_async itself."""
        most = self.args.max_num_tokens
        if not self.args.enable_chunked_prefill and most and len(prompt) > most:
            raise RequestError(
                f"The sum of prompt length ({len(prompt)}), query length (0) should not exceed max_num_tokens ({most})"
            )

    def _living(self) -> Executor:
        if self._executor is None or self._executor.is_shutdown():
            raise RuntimeError("LLM is shutting down")
        return self._executor

    # The rest of the surface

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        executor = self._living()
        if line.current().pushes and not executor.was_asked:
            return []
        return executor.drain("stats", timeout or 0)

    def get_stats_async(self, timeout: float | None = 2) -> IterationResult:
        return self._iterate("stats", timeout)

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        executor = self._living()
        if line.current().pushes:
            assert executor.was_asked, "KV cache events are not initialised: make a request first"
        return executor.drain("events", timeout or 0)

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> IterationResult:
        return self._iterate("events", timeout)

    def _iterate(self, kind: str, timeout: float | None) -> IterationResult:
        executor = self._living()
        if line.current().pushes:
            assert executor.was_asked, f"{kind} are not initialised: make a request first"
        result = IterationResult(executor, kind)
        result.set_timeout(timeout or 0)
        return result

    def _check_health(self) -> bool:
        return self._executor is not None and self._executor.check_health()

    @property
    def llm_id(self) -> str:
        return self._llm_id

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    def shutdown(self) -> None:
        """Release every rank. Can block (reference 7.3): call it in a thread."""
        if running_loop() is not None:
            switches.misuse("shutdown() was called on the thread of an event loop: it can block for minutes")
        self._shutdown()

    def _shutdown(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def __enter__(self) -> "BaseLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self._shutdown()

    def __del__(self) -> None:
        if getattr(self, "_executor", None) is not None and not self._executor.is_shutdown():  # type: ignore[union-attr]
            self._shutdown()

    def __getstate__(self) -> Any:
        raise RuntimeError("LLM object can not be pickled.")


_GENERATE_ASYNC = signatures.signature_of("generate_async")
_GENERATE = signatures.signature_of("generate")


class LLM(BaseLLM):
    """The PyTorch backend's."""

    def _build(self) -> None:
        super()._build()
        path = os.environ.get("TLLM_AUTOTUNER_CACHE_PATH")
        if path and self.args.enable_autotuner and not Path(path).exists():  # one that is there is read, and kept
            Path(path).write_text(json.dumps({"metadata": {"lib_version": line.current().version}, "rank_0": {}}))


if line.current().is_newest:

    def _capacity(self: BaseLLM) -> dict[str, int]:
        """Reference 1.4."""
        return dict(self._living().capacity)

    def _startup_metrics(self: BaseLLM) -> dict[str, float]:
        return {"total_startup_s": self._startup_s}

    def _preprocess(self: BaseLLM, *positional: Any, **keywords: Any) -> Any:
        raise NotModelled("preprocess: the double does not imitate it")

    BaseLLM.get_kv_cache_capacity = _capacity  # type: ignore[attr-defined]
    BaseLLM.startup_metrics = property(_startup_metrics)  # type: ignore[attr-defined]
    BaseLLM.preprocess = _preprocess  # type: ignore[attr-defined]
