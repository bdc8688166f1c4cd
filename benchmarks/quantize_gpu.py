"""Quantization of a model of Llama 3.1 8B's shape on a GPU: the build's own step, its exports loaded back and compared.

    python -m benchmarks.quantize_gpu [--model quickstart] [--recipes "fp8;nvfp4"] [--limit-s 540] [--keep DIRECTORY]

The weights are random, with the spread of a fresh model of that depth: what rounding costs is measured on weights, and
on logits of the same tokens, not on answers. For each recipe: time of each part of the step, most memory, size; the
relative error of each layer (norm of the change over norm of the weight), from the export's own tensors; and of logits:

    rounding    the model with quantized weights, as ModelOpt simulates it, beside the original
    all         the same with quantized activations, too
    reloaded    a plain model with the export's weights, beside the original, and beside `rounding`: ModelOpt's export
                lets layers with the same input share scales, and rounds the weights of AWQ again for that
"""

import argparse
import gc
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.report import RESULTS, Report
from builders.context import StepContext, StepInput, StepName
from builders.quantize import int8_checkpoint, modelopt_checkpoint
from builders.quantize.dequantize import effective_weight
from builders.quantize.recipes import export_format
from builders.quantize.tensor_files import TensorReader
from builders.spec import parse_spec
from serve.artifacts.node_facts import NodeFacts
from serve.engines.transformers.int8_linear import Int8Linear, Scratch

QUICKSTART = Path(__file__).parents[1] / "serve" / "models" / "quickstart"
LLAMA_8B = transformers.LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)
RECIPES: dict[str, dict[str, Any]] = {
    "fp8": {"kind": "trtllm-checkpoint", "quantize": {"recipe": "fp8"}},
    "fp8, KV fp8": {"kind": "trtllm-checkpoint", "quantize": {"recipe": "fp8", "kv_cache": "fp8"}},
    "nvfp4": {"kind": "trtllm-checkpoint", "quantize": {"recipe": "nvfp4"}},
    "int8_smoothquant": {"kind": "tensorrt-engine", "quantize": {"recipe": "int8_smoothquant"}},
    "int4_awq": {"kind": "trtllm-checkpoint", "quantize": {"recipe": "int4_awq"}},
    "int8_weight_only": {"kind": "transformers-checkpoint", "quantize": {"recipe": "int8_weight_only"}},
}
_SEQUENCES, _LENGTH = 2, 256
_COMPARED = 64  # last positions of each sequence
_SHAPES = ((4096, 4096), (14_336, 4096))


def main() -> int:
    """Run all recipes that fit the time; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("8b", "quickstart"), default="8b")
    parser.add_argument("--recipes", default=";".join(RECIPES), help="names, with semicolons between")
    parser.add_argument("--source", type=Path, help="where the model is, or is put; none: a temporary directory")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--layers", action="store_true", help="time single int8 layers, too")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="no recipe is begun after this time")
    parser.add_argument("--keep", type=Path, default=RESULTS, help="directory of the report")
    parser.add_argument("--name", default="quantize_gpu", help="of the report's file")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    report, begin_s, failed = Report(options.name, "python -m benchmarks.quantize_gpu"), time.monotonic(), False
    report.note(_machine())
    with tempfile.TemporaryDirectory(prefix="quantize-") as folder:
        place = Path(folder)
        source = QUICKSTART if options.model == "quickstart" else options.source or place / "source"
        if not source.is_dir():
            _make_source(source)
        report.note(f"Model: {_described(source)}. Texts: {options.samples} of at most {options.max_tokens} tokens.")
        original = _logits(_load(source))
        exact = _logits(_load(source).float())
        report.add("logits of the source beside those in float32", _distance(original, exact), "")
        _release()
        if torch.cuda.is_available() and options.layers:
            _measure_products(report)
        for name in options.recipes.split(";"):
            if time.monotonic() - begin_s > options.limit_s:
                report.note(f"{name}: not begun, the time is over.")
                continue
            try:
                _measure(report, name, source, place / "run", original, options)
            except Exception as exc:
                failed = True
                report.note(f"{name} FAILED: {type(exc).__name__}: {exc}")
            shutil.rmtree(place / "run", ignore_errors=True)
            _release()
            (options.keep / f"{options.name}.txt").write_text(report.text())  # so far
    print(report.text())
    return int(failed)


def _measure(
    report: Report, name: str, source: Path, place: Path, original: torch.Tensor, options: argparse.Namespace
) -> None:
    """Run the step for one recipe, load its export back, and compare."""
    context = _context(source, place, RECIPES[name], options)
    seen: dict[str, torch.Tensor] = {}
    _release()
    begin_s = time.monotonic()
    if RECIPES[name]["quantize"]["recipe"] == "int8_weight_only":
        result = int8_checkpoint.make(context)
        result["parts_s"] = {"write and check": time.monotonic() - begin_s}
    else:
        result = modelopt_checkpoint.make(context, look=lambda model: seen.update(_look(model)))
        report.add(f"{name}: most memory", result["peak_memory_bytes"] / 2**30, "GiB")
    for part, seconds in result["parts_s"].items():
        if part != "look":
            report.add(f"{name}: {part}", seconds, "s")
    size = sum(path.stat().st_size for path in context.output.rglob("*") if path.is_file())
    report.add(f"{name}: size", size / 2**30, "GiB")
    errors = result["relative_error"]
    report.add(f"{name}: mean relative error of {len(errors['layers'])} layers", errors["mean"], "")
    report.add(f"{name}: worst ({errors['worst_layer']})", errors["worst"], "")
    for what, logits in seen.items():
        report.add(f"{name}: logits, {what}", _distance(logits, original), "")
    if export_format(context.spec.quantize, context.spec.kind) == "unified":
        reloaded = _logits(_reload(source, context.output))
        report.add(f"{name}: logits, reloaded", _distance(reloaded, original), "")
        if "rounding" in seen:
            report.add(f"{name}: logits, reloaded beside rounding", _distance(reloaded, seen["rounding"]), "")
    for note in result["notes"]:
        report.note(f"{name}: {note}")


def _context(source: Path, place: Path, recipe: dict[str, Any], options: argparse.Namespace) -> StepContext:
    calibration = {"samples": options.samples, "max_tokens": options.max_tokens}
    spec = parse_spec(
        {"name": "benchmark", **recipe, "quantize": {**recipe["quantize"], "calibration": calibration, "exclude": []}}
    )
    files = sorted(path.name for path in source.iterdir() if path.is_file())
    fetched = StepInput("0" * 64, source, {"files": files, "parameters": _parameters(source)})
    for folder in (place / "output", place / "scratch"):
        folder.mkdir(parents=True)
    last = [0.0]

    def tell(done: float, total: float, message: str = "") -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(f"    {done / total:.0%} {message}", file=sys.stderr, flush=True)

    node = NodeFacts(machine="x86_64")
    return StepContext(spec, {StepName.FETCH: fetched}, place / "output", place / "scratch", node, progress=tell)


def _look(model: Any) -> dict[str, torch.Tensor]:
    """Compute logits of a quantized model: as it is, and with its weights alone quantized."""
    try:
        everything = _logits(model)
    except AssertionError as exc:  # NVFP4 is not simulated on a CPU
        print(f"    {exc}", file=sys.stderr)
        return {}
    others = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2].endswith("_quantizer")
        and "weight_quantizer" not in name
        and getattr(module, "is_enabled", False)
    ]
    for module in others:
        module.disable()
    rounding = _logits(model)
    for module in others:
        module.enable()
    return {"all": everything, "rounding": rounding}


def _reload(source: Path, export: Path) -> Any:
    """Return a plain model with what an export's tensors stand for."""
    model = _load(source)
    parameters = dict(model.named_parameters())
    with TensorReader(export) as reader, torch.no_grad():
        for name in reader.names:
            layer, _, part = name.rpartition(".")
            if part == "weight" and f"{layer}.weight_scale" in reader:
                parts = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale")
                tensors = {
                    key: reader.tensor(f"{layer}.{key}").to(model.device) for key in parts if f"{layer}.{key}" in reader
                }
                parameters[name].copy_(effective_weight(layer, tensors))
            elif name in parameters:
                parameters[name].copy_(reader.tensor(name))
    return model


def _logits(model: Any) -> torch.Tensor:
    """Return logits of always the same tokens, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, model.config.vocab_size, (_SEQUENCES, _LENGTH), generator=generator)
    with torch.no_grad():
        output = model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=_COMPARED)
    logits: torch.Tensor = output.logits.float().cpu()
    return logits


def _distance(found: torch.Tensor, other: torch.Tensor) -> float:
    return float((found - other).norm() / other.norm())


def _load(source: Path) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map={"": device}).eval()


def _make_source(directory: Path) -> None:
    """Save a model with the weights of a fresh one, and the quickstart model's tokenizer."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(LLAMA_8B).to(torch.bfloat16)
    model = model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            torch.nn.init.ones_(parameter)
            continue
        # What adds to the residual stream is smaller in deep models, or any rounding grows from layer to layer.
        depth = math.sqrt(2 * LLAMA_8B.num_hidden_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        torch.nn.init.normal_(parameter, std=LLAMA_8B.initializer_range / depth)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(QUICKSTART / name, directory / name)


@torch.no_grad()
def _measure_products(report: Report) -> None:
    """Time int8 layers of the transformers engine beside bfloat16 ones."""
    for outputs, inputs in _SHAPES:
        plain = torch.nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
        small = Int8Linear(plain, Scratch())
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda")
        scale = torch.rand(outputs, device="cuda") / 127
        small.fill(weight, scale)
        plain.weight.copy_(weight * scale[:, None])
        hidden = torch.randn(64, inputs, device="cuda", dtype=torch.bfloat16)
        for layer, what in ((small, "int8"), (plain, "bfloat16")):
            exact = hidden.float() @ (weight * scale[:, None]).t()
            report.add(f"{what} layer, {inputs} x {outputs}: error", _distance(layer(hidden).float(), exact), "")
        for rows in (1, 16, 256):
            hidden = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            what = f"{rows} x {inputs} x {outputs}"
            report.add(f"bfloat16 layer, {what}", _time_us(partial(plain, hidden)), "us")
            report.add(f"int8 layer, {what}", _time_us(partial(small, hidden)), "us")
            report.add(f"int8 layer in float16, {what}", _time_us(partial(small, hidden.half())), "us")
            try:
                call = partial(torch._weight_int8pack_mm, hidden, weight, scale.bfloat16())
                error = _distance(call().float().cpu(), small(hidden).float().cpu())
                report.add(f"PyTorch's int8 kernel, {what} (error {error:.1e})", _time_us(call), "us")
            except (RuntimeError, NotImplementedError) as exc:
                report.note(f"PyTorch's int8 kernel on the GPU, {what}: {str(exc).splitlines()[0]}")


@torch.no_grad()
def _time_us(call: Callable[[], Any], repeats: int = 50) -> float:
    for _ in range(5):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / repeats


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _parameters(source: Path) -> int:
    with TensorReader(source) as reader:
        return sum(math.prod(reader.shape(name)) for name in reader.names)


def _described(source: Path) -> str:
    config = json.loads((source / "config.json").read_bytes())
    shape = f"{config['num_hidden_layers']} layers of {config['hidden_size']}, {config['dtype']}"
    return f"{config['architectures'][0]}, {_parameters(source) / 1e9:.2f} billion parameters, {shape}"


def _machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    names = ("nvidia-modelopt", "torch", "transformers", "safetensors")
    return f"{gpu}; {', '.join(f'{name} {version(name)}' for name in names)}; CUDA {torch.version.cuda}"


if __name__ == "__main__":
    sys.exit(main())
