"""A Llama-like checkpoint in numpy, float32: the same tokens as the transformers library, without it or torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_double import quantized

_DTYPES = {"F32": "<f4", "F16": "<f2"}
_CODES = {"I8": "<i1", "U8": "<u1"}


class KvBuffer:
    """Keys and values of one sequence: (layers, 2, kv_heads, capacity, head_dim)."""

    def __init__(self, model: "LlamaModel", capacity: int) -> None:
        self._shape = (model.layers, 2, model.kv_heads)
        self._head_dim = model.head_dim
        self.data = np.empty((*self._shape, max(capacity, 1), self._head_dim), np.float32)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens."""
        have = self.data.shape[3]
        if tokens > have:
            larger = np.empty((*self._shape, max(tokens, 2 * have), self._head_dim), np.float32)
            larger[:, :, :, :have] = self.data
            self.data = larger

    def copy_out(self, start: int, end: int) -> Any:
        return self.data[:, :, :, start:end].copy()

    def copy_in(self, start: int, part: Any) -> None:
        self.reserve(start + part.shape[3])
        self.data[:, :, :, start : start + part.shape[3]] = part


@dataclass
class Chunk:
    """Tokens of one sequence to compute in this step.

    Attributes:
        tokens: Consecutive ones.
        start: Position of the first; keys and values before it are in `kv`.
        kv: The sequence's buffer.
        all_logits: Whether logits of every token are wanted, or of the last one only.
    """

    tokens: Sequence[int]
    start: int
    kv: KvBuffer
    all_logits: bool = False


class LlamaModel:
    """Weights and the forward pass of several sequences at once."""

    def __init__(self, directory: Path, *, dummy: bool = False) -> None:
        config = json.loads((directory / "config.json").read_text())
        config = config.get("pretrained_config", config).get("double_hf_config", config)  # of an engine directory
        kinds = config.get("architectures") or ["?"]
        if kinds[0] not in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"):
            raise ValueError(f"Unknown architecture for AutoModelForCausalLM: {kinds[0]}")
        self.hidden = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or self.hidden // self.heads
        self.layers = config["num_hidden_layers"]
        self.vocab_size = config["vocab_size"]
        self.max_position = config.get("max_position_embeddings", 2048)
        self._eps = np.float32(config.get("rms_norm_eps", 1e-6))
        rope = config.get("rope_parameters") or {}
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        inverse = 1.0 / theta ** (np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim)
        angles = np.outer(np.arange(self.max_position + 1, dtype=np.float32), inverse.astype(np.float32))
        self._cos = np.concatenate([np.cos(angles)] * 2, -1).astype(np.float32)
        self._sin = np.concatenate([np.sin(angles)] * 2, -1).astype(np.float32)
        quantized.check_algorithm(directory, quantized.PYTORCH)
        weights = _random_weights(self, config) if dummy else quantized.make_whole(read_tensors(directory))
        self._embedding = weights["model.embed_tokens.weight"]
        self._norm = weights["model.norm.weight"]
        tied = config.get("tie_word_embeddings", False) or "lm_head.weight" not in weights
        self._head = np.ascontiguousarray((self._embedding if tied else weights["lm_head.weight"]).T)
        self._layers = [_layer(weights, f"model.layers.{i}.") for i in range(self.layers)]

    @property
    def bytes_per_token(self) -> int:
        """Size of one token's keys and values on a GPU, in float16."""
        return int(self.layers * 2 * self.kv_heads * self.head_dim * 2)

    def forward(self, chunks: Sequence[Chunk]) -> list[Any]:
        """Compute chunks; fill their buffers; return each one's logits, (tokens or 1, vocab_size)."""
        ids = [token for chunk in chunks for token in chunk.tokens]
        positions = np.concatenate([np.arange(c.start, c.start + len(c.tokens)) for c in chunks])
        for chunk in chunks:
            chunk.kv.reserve(chunk.start + len(chunk.tokens))
        x = self._embedding[ids]
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        for index, layer in enumerate(self._layers):
            x = x + self._attend(index, layer, _rms(x, layer["input"], self._eps), cos, sin, chunks)
            y = _rms(x, layer["post"], self._eps) @ layer["gate_up"]
            gate, up = np.split(y, 2, -1)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["down"]
        wanted: list[int] = []
        counts: list[int] = []
        at = 0
        for chunk in chunks:
            size = len(chunk.tokens)
            wanted.extend(range(at if chunk.all_logits else at + size - 1, at + size))
            counts.append(size if chunk.all_logits else 1)
            at += size
        logits = _rms(x[wanted], self._norm, self._eps) @ self._head
        return list(np.split(logits, np.cumsum(counts)[:-1]))

    def _attend(self, index: int, layer: Any, x: Any, cos: Any, sin: Any, chunks: Sequence[Chunk]) -> Any:
        qkv = (x @ layer["qkv"] + layer["qkv_bias"]).reshape(len(x), -1, self.head_dim)
        q, k, v = np.split(qkv, [self.heads, self.heads + self.kv_heads], 1)
        q, k = q * cos + _rotate(q) * sin, k * cos + _rotate(k) * sin
        out = np.empty_like(q)
        at, group = 0, self.heads // self.kv_heads
        scale = np.float32(self.head_dim**-0.5)
        for chunk in chunks:
            size, start = len(chunk.tokens), chunk.start
            part, end = slice(at, at + size), start + size
            keys, values = chunk.kv.data[index]
            keys[:, start:end] = k[part].transpose(1, 0, 2)
            values[:, start:end] = v[part].transpose(1, 0, 2)
            queries = q[part].reshape(size, self.kv_heads, group, self.head_dim).transpose(1, 2, 0, 3)
            scores = queries @ keys[:, None, :end].transpose(0, 1, 3, 2) * scale
            if size > 1:
                scores += np.triu(np.full((size, end), -np.inf, np.float32), start + 1)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            mixed = scores @ values[:, None, :end]
            out[part] = mixed.transpose(2, 0, 1, 3).reshape(size, self.heads, self.head_dim)
            at += size
        return out.reshape(len(x), -1) @ layer["o"]


def _rms(x: Any, weight: Any, eps: Any) -> Any:
    return x * (1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)) * weight


def _rotate(x: Any) -> Any:
    left, right = np.split(x, 2, -1)
    return np.concatenate([-right, left], -1)


def _layer(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    def of(*names: str) -> Any:
        return np.ascontiguousarray(np.concatenate([weights[f"{prefix}{name}.weight"] for name in names]).T)

    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    biases: list[Any] = [weights.get(f"{prefix}{name}.bias") for name in projections]
    return {
        "qkv": of(*projections),
        "qkv_bias": np.concatenate(biases) if biases[0] is not None else np.float32(0),
        "o": of("self_attn.o_proj"),
        "gate_up": of("mlp.gate_proj", "mlp.up_proj"),
        "down": of("mlp.down_proj"),
        "input": weights[prefix + "input_layernorm.weight"],
        "post": weights[prefix + "post_attention_layernorm.weight"],
    }


def read_tensors(directory: Path, pattern: str = "*.safetensors") -> dict[str, Any]:
    """Read all tensors: what is a number in float32, 8-bit codes as they are, FP8 as the numbers that it stands for."""
    files = sorted(directory.glob(pattern)) or sorted(directory.glob("rank0.engine"))
    if not files:
        raise FileNotFoundError(f"No weight files found in {directory}")
    weights: dict[str, Any] = {}
    for file in files:
        raw = np.memmap(file, np.uint8, "r")
        size = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + size].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            data = raw[8 + size + start : 8 + size + end]
            if entry["dtype"] == "BF16":
                array = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] == "F8_E4M3":
                array = quantized.fp8(data)
            elif entry["dtype"] in _CODES:
                array = np.array(data.view(_CODES[entry["dtype"]]))
            else:
                array = data.view(_DTYPES[entry["dtype"]]).astype(np.float32)
            weights[name] = array.reshape(entry["shape"])
    return weights


def _random_weights(model: LlamaModel, config: dict[str, Any]) -> dict[str, Any]:
    """Weights of `load_format="dummy"`: random, the same at every start."""
    rng = np.random.default_rng(0)
    hidden, wide, inner = model.hidden, model.heads * model.head_dim, config["intermediate_size"]
    narrow = model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for i in range(model.layers):
        prefix = f"model.layers.{i}."
        shapes |= {
            f"{prefix}self_attn.{n}_proj.weight": (s, hidden)
            for n, s in zip("qkv", (wide, narrow, narrow), strict=True)
        }
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, wide)
        shapes |= {f"{prefix}mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{prefix}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    return {
        name: (rng.standard_normal(shape) * 0.2).astype(np.float32) if len(shape) == 2 else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }
