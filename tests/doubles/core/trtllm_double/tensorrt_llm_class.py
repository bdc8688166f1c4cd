"""The LLM of the TensorRT backend, 1.2.x only: its model directories, building, saving (reference 5.1, 5.6)."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from trtllm_double import line, quantized, switches
from trtllm_double.configs import TrtLlmArgs, by_name
from trtllm_double.engine_spec import EngineSpec
from trtllm_double.llm import BaseLLM
from trtllm_double.model import read_tensors
from trtllm_double.switches import NotModelled

logger = logging.getLogger("tensorrt_llm")
_LEFT_OUT = ("dry_run", "visualize_network")


class LLM(BaseLLM):
    """Loads an engine directory, or builds an engine from a checkpoint in its constructor."""

    _args_class = TrtLlmArgs
    _includes_end_id = False  # the C++ sampler does not count the end id
    _engine_dir: Path | None = None

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        super().__init__(*positional, **keywords)

    @property
    def workspace(self) -> Path:
        assert self._temporary is not None, "nothing was built"
        return Path(self._temporary.name)

    def save(self, engine_dir: str | Path) -> None:
        """Copy the engine; the workspace goes with the LLM."""
        if self._engine_dir is None or not self._engine_dir.is_dir():
            raise RuntimeError("The engine is not built yet.")
        target = Path(engine_dir)
        if target.absolute() != self._engine_dir.absolute():
            shutil.copytree(self._engine_dir, target, dirs_exist_ok=True)

    def _shutdown(self) -> None:
        super()._shutdown()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    # Construction

    def _choose_orchestrator(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("orchestrator_type") is not None:
            raise ValueError("orchestrator_type is only supported by the PyTorch backend")

    def _backends(self) -> tuple[str | None, ...]:
        return (None, "tensorrt")

    def _find_model(self) -> Path:
        self._check_backend()
        model = super()._find_model()
        config = json.loads((model / "config.json").read_text())
        if "pretrained_config" in config and "build_config" in config:
            self._engine_dir = model
            if self.args.build_config is not None:
                logger.warning("The build_config is ignored for model format of TLLM_ENGINE.")
            self._adopt(config)
        else:
            self._engine_dir = self._build_engine(model, config)
        return self._engine_dir

    def _check_backend(self) -> None:
        args = self.args
        if args.kv_cache_config.dtype != "auto":
            raise ValueError("KvCacheConfig.dtype is only supported by the PyTorch backend")
        if args.guided_decoding_backend == "llguidance":
            raise ValueError("guided_decoding_backend='llguidance' is only supported by the PyTorch backend")
        if type(args.speculative_config).__name__ in ("Eagle3DecodingConfig", "PARDDecodingConfig"):
            raise ValueError("this speculation is only supported by the PyTorch backend")

    def _adopt(self, config: dict[str, Any]) -> None:
        """Take over what was fixed at the build; sizes must be 1 or the engine's."""
        if config["version"] != line.current().version:  # TensorRT refuses plans of other versions
            raise RuntimeError(f"Engine version {config['version']} does not match {line.current().version}")
        mapping, build = config["pretrained_config"]["mapping"], config["build_config"]
        for name, key in (("tensor", "tp_size"), ("pipeline", "pp_size"), ("context", "cp_size")):
            asked, built = getattr(self.args, f"{name}_parallel_size"), mapping.get(key, 1)
            if asked not in (1, built):
                raise ValueError(f"{name}_parallel_size {asked} does not match the engine's {key} {built}")
            object.__setattr__(self.args, f"{name}_parallel_size", built)
        rank_files = [self._engine_path / f"rank{rank}.engine" for rank in range(self.args.world_size)]
        for file in rank_files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist")
        self._check_gpus()
        self._limits = build

    @property
    def _engine_path(self) -> Path:
        assert self._engine_dir is not None
        return self._engine_dir

    def _build_engine(self, model: Path, source: dict[str, Any]) -> Path:
        args = self.args
        build = args.build_config or by_name["BuildConfig"]()
        is_checkpoint = "architecture" in source and "dtype" in source
        hf_config, quantization = self._from_checkpoint(source) if is_checkpoint else self._from_hf(model, source)
        if quantization.get("quant_algo") == "NVFP4":
            build.plugin_config.gemm_plugin = "nvfp4"
        limits = _plain(build)
        # Numbers given to LLM itself count for an engine that it builds, unless a build_config has them.
        limits["max_seq_len"] = limits["max_seq_len"] or hf_config.get("max_position_embeddings", 2048)
        limits["max_input_len"] = min(limits["max_input_len"], limits["max_seq_len"])
        limits["max_num_tokens"] = min(limits["max_num_tokens"], int(switches.number("BUILD_TOKENS", 1 << 30)))
        self._temporary = tempfile.TemporaryDirectory(prefix="llm-workspace-", dir=args.workspace)
        engine = Path(self._temporary.name) / "tmp.engine"
        self._limits = limits
        pretrained = {
            "architecture": hf_config["architectures"][0],
            "dtype": _dtype(hf_config) if args.dtype == "auto" else args.dtype,
            "vocab_size": hf_config["vocab_size"],
            "max_position_embeddings": hf_config.get("max_position_embeddings"),
            "mapping": self._mapping(),
            "quantization": {"quant_algo": None, **quantization},
            "double_hf_config": hf_config,
        }
        build_config = {name: value for name, value in limits.items() if name not in _LEFT_OUT}
        content = {"version": line.current().version, "pretrained_config": pretrained, "build_config": build_config}
        write_engine(engine, content, model, args.world_size)
        _write_timing_cache(engine, limits)
        return engine

    def _mapping(self) -> dict[str, int]:
        args = self.args
        return {
            "world_size": args.world_size,
            "tp_size": args.tensor_parallel_size,
            "pp_size": args.pipeline_parallel_size,
            "cp_size": args.context_parallel_size,
        }

    def _from_hf(self, model: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        found = quantized.check_algorithm(model, quantized.TENSORRT_UNIFIED)
        return config, found or (_plain(self.args.quant_config) if self.args.quant_config else {})

    def _from_checkpoint(self, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A TensorRT-LLM checkpoint: it is cut into ranks already, and tells everything itself."""
        mapping = config["mapping"]
        if mapping["world_size"] != self.args.world_size or mapping["tp_size"] != self.args.tensor_parallel_size:
            raise ValueError(f"the checkpoint's mapping {mapping} does not match the LLM's {self._mapping()}")
        kinds = {"llama": "LlamaForCausalLM"}
        hf_config = {
            **config,
            "architectures": [kinds[config["decoder"]]],
            "rms_norm_eps": config["norm_epsilon"],
            "head_dim": config["head_size"],
            "rope_theta": config.get("rotary_base", 10000.0),
            "tie_word_embeddings": False,
        }
        return hf_config, config["quantization"]

    def _spec(self) -> EngineSpec:
        spec, build = super()._spec(), self._limits
        plugins = build.get("plugin_config") or {}
        args = self.args
        return dataclasses.replace(
            spec,
            max_batch_size=min(args.max_batch_size or build["max_batch_size"], build["max_batch_size"]),
            max_num_tokens=min(args.max_num_tokens or build["max_num_tokens"], build["max_num_tokens"]),
            max_seq_len=build["max_seq_len"],
            tokens_per_block=plugins.get("tokens_per_block", 32),
            stats=args.iter_stats_max_iterations != 0,
            max_stats_len=args.iter_stats_max_iterations or 1000,
            request_stats=bool(args.request_stats_max_iterations),
        )

    # Requests

    def _check_prompt(self, prompt: list[int], params: Any) -> None:
        """What the TensorRT backend checks before a request is sent: ValueErrors, not RequestErrors."""
        if params.prompt_logprobs and not self._limits["gather_context_logits"]:
            raise ValueError(
                "`sampling_params.prompt_logprobs` requires `gather_context_logits=True` in the `BuildConfig`"
            )
        if params.logprobs and not (self.args.gather_generation_logits or self._limits["gather_generation_logits"]):
            raise ValueError("`sampling_params.logprobs` requires `gather_generation_logits` to be passed to `LLM()`")
        most = self._limits["max_seq_len"]
        if not self.args.enable_chunked_prefill and len(prompt) + params.max_tokens > most:
            raise ValueError(
                f"The sum of prompt length ({len(prompt)}) and query length (0) max_tokens ({params.max_tokens}) "
                f"should not exceed max_seq_len ({most})"
            )


def _plain(value: Any) -> Any:
    """Return a config object as JSON values."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)


def _dtype(hf_config: dict[str, Any]) -> str:
    return str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float16")


def _write_timing_cache(engine: Path, limits: dict[str, Any]) -> None:
    """TensorRT's: read if there is one, and written anew; a bare name is one of the engine's directory."""
    earlier = limits["input_timing_cache"]
    known = Path(earlier).read_text() if earlier else ""  # a file that is not there is an error
    if limits["output_timing_cache"]:
        (engine / limits["output_timing_cache"]).write_text(f"{known}timings of a build\n")


def write_engine(folder: Path, config: dict[str, Any], model: Path, world_size: int) -> None:
    """Write an engine directory: rank 0 has the weights, which stand in for a plan."""
    rank_files = sorted(model.glob("rank*.safetensors"))
    if not rank_files and len(list(model.glob("*.safetensors"))) != 1:
        raise NotModelled("checkpoints of several files: the double builds from one")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if rank_files:
        ranks = [read_tensors(model, file.name) for file in rank_files]
        weights = quantized.join_ranks(ranks, json.loads((model / "config.json").read_text()))
    else:
        weights = quantized.make_whole(read_tensors(model))
    _write_tensors(folder / "rank0.engine", weights)
    for rank in range(1, world_size):
        (folder / f"rank{rank}.engine").write_bytes(b"double of a TensorRT plan\n" + os.urandom(16))
    time.sleep(switches.number("BUILD_S", 0))
    if switches.flag("BUILD_DIES"):  # as the kernel ends what takes too much memory
        os.kill(os.getpid(), signal.SIGKILL)


def _write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write float32 tensors as safetensors."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + 4 * tensor.size]}
        at += 4 * tensor.size
    described = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for tensor in tensors.values():
            file.write(tensor.astype("<f4").tobytes())
