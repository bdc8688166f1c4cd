"""serve/engines/trtllm/signatures/*.json from a collected file: `python -m tools.trtllm_signatures FILE.json`.

The collection is a JSON file: line -> class -> keyword -> {type, default[, status]}, with `_meta` (version, sources,
imports) for each line. What it lacks is in `NOT_COLLECTED`, with the source of each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "serve/engines/trtllm/signatures"
_ARGS = "tensorrt_llm.llmapi.llm_args"
_API = "tensorrt_llm.llmapi"

# The classes that constructor calls may name, and where each is imported from.
CLASSES = {
    "1.2.x": {
        "LLM": "tensorrt_llm:LLM",
        "TrtLLM": "tensorrt_llm._tensorrt_engine:LLM",
        "KvCacheConfig": f"{_API}:KvCacheConfig",
        "BuildConfig": f"{_API}:BuildConfig",
        "QuantConfig": f"{_API}:QuantConfig",
        "CalibConfig": f"{_API}:CalibConfig",
        "BuildCacheConfig": f"{_API}:BuildCacheConfig",
        "PluginConfig": "tensorrt_llm.plugin:PluginConfig",
        "LoraConfig": "tensorrt_llm.lora_helper:LoraConfig",
        "CudaGraphConfig": f"{_ARGS}:CudaGraphConfig",
    },
    "newest": {
        "LLM": "tensorrt_llm:LLM",
        "KvCacheConfig": f"{_API}:KvCacheConfig",
        "KVEventsConfig": f"{_ARGS}:KVEventsConfig",
        "LoraConfig": "tensorrt_llm._torch.peft.lora.config:LoraConfig",
        "CudaGraphConfig": f"{_ARGS}:DecodeCudaGraphConfig",
    },
}
for _line in CLASSES.values():
    for _name in (
        "SchedulerConfig",
        "DynamicBatchConfig",
        "CacheTransceiverConfig",
        "RayPlacementConfig",
        "TorchCompileConfig",
        "PeftCacheConfig",
        "MoeConfig",
        "AttentionDpConfig",
        "Nvfp4GemmConfig",
        "KvCacheConnectorConfig",
    ):
        _line[_name] = f"{_ARGS}:{_name}"


def _field(type_: str, default: Any = None) -> dict[str, Any]:
    return {"type": type_, "default": default}


_DECODING = {
    "max_draft_len": _field("Optional[int]"),
    "speculative_model": _field("Optional[Union[str, Path]]"),
    "max_concurrency": _field("Optional[int]"),
    "load_format": _field("Optional[str]"),
}
_EAGLE = _DECODING | {
    "greedy_sampling": _field("Optional[bool]", True),
    "eagle3_one_model": _field("Optional[bool]", True),
    "eagle3_layers_to_capture": _field("Optional[Set[int]]"),
}
_NGRAM = _DECODING | {
    "max_matching_ngram_size": _field("int", 2),
    "is_keep_all": _field("bool", True),
    "is_use_oldest": _field("bool", True),
    "is_public_pool": _field("bool", True),
}
_MTP = _DECODING | {
    "use_relaxed_acceptance_for_thinking": _field("bool", False),
    "relaxed_topk": _field("int", 1),
    "relaxed_delta": _field("float", 0.0),
}
_DECODING_SOURCE = (
    "speculative decoding configs: documentation of 1.2.1; tensorrt_llm/llmapi/llm_args.py of the main branch, late "
    "2025 and mid 2026"
)
NOT_COLLECTED: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "1.2.x": {
        f"{_ARGS}:DraftTargetDecodingConfig": _DECODING,
        f"{_ARGS}:EagleDecodingConfig": _EAGLE,
        f"{_ARGS}:NGramDecodingConfig": _NGRAM,
        f"{_ARGS}:MTPDecodingConfig": _MTP | {"num_nextn_predict_layers": _field("int", 1)},
    },
    "newest": {
        f"{_ARGS}:DraftTargetDecodingConfig": _DECODING,
        f"{_ARGS}:Eagle3DecodingConfig": _EAGLE,
        f"{_ARGS}:NGramDecodingConfig": _NGRAM,
        f"{_ARGS}:MTPDecodingConfig": _MTP,
        f"{_ARGS}:TelemetryConfig": {"disabled": _field("bool", False), "usage_context": _field("UsageContext")},
        f"{_ARGS}:SleepConfig": {},
    },
}
EXTRA_SOURCES = {
    "1.2.x": [_DECODING_SOURCE],
    "newest": [
        _DECODING_SOURCE,
        "DecodeCudaGraphConfig: the class that CudaGraphConfig became; tensorrt_llm/llmapi/llm_args.py, main, 2026",
        "TelemetryConfig: tensorrt_llm/usage/config.py 222982db69cbca3b5cde446df4a773e6632d5c5e",
        "SleepConfig: 1.3.0rc29 documentation names it; its fields are not known here, and none is passed",
    ],
}


def signatures(collection: dict[str, Any], line: str) -> dict[str, Any]:
    """Return what is stored about a line."""
    collected = collection[line]
    meta = collected["_meta"]
    classes = {}
    for name, target in CLASSES[line].items():
        classes[target] = {key: _only_facts(entry) for key, entry in collected[name].items()}
    return {
        "line": line,
        "version": meta["version"],
        "sources": [*meta["sources"], *EXTRA_SOURCES[line]],
        "classes": classes | NOT_COLLECTED[line],
    }


def _only_facts(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("type", "default", "status") if key in entry}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("collection", type=Path, help="the JSON file")
    collection = json.loads(parser.parse_args().collection.read_text())
    for line in CLASSES:
        text = json.dumps(signatures(collection, line), indent=1)
        (TARGET / f"{line}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
