"""docs/configuration.md from the configuration models: `make docs`. A test keeps the file current."""

import json
from pathlib import Path
from typing import Any

from serve.config import AppConfig
from serve.core.routing.settings import RoutingSettings

TARGET = Path(__file__).parents[1] / "docs/configuration.md"
FIRST = (
    "ModelConfig",
    "ParallelLayout",
    "RankResources",
    "EngineEnv",
    "GroupSettings",
    "ScalingSettings",
    "ReplicaSettings",
    "BundleSettings",
    "RoutingSettings",
    "FairnessSettings",
    "PredictiveSettings",
    "GatewayConfig",
    "GatewaySettings",
    "TrtllmSettings",
    "TransformersSettings",
    "SimulatedSettings",
)
INTRODUCTION = """# Configuration

A RayTRT config file is a [Ray Serve config file](https://docs.ray.io/en/latest/serve/production-guide/config.html);
our part is `args` of the application whose `import_path` is `serve.app:build_app`. `raytrt check FILE` finds mistakes
without starting anything. Unknown keys are errors. (This page is made by `make docs`.)

```yaml
http_options: {host: 0.0.0.0, port: 8000}
applications:
  - name: llm
    import_path: serve.app:build_app
    route_prefix: /
    args:
      models:
        - id: my-model
          model: /models/my-model
          engine: {kind: transformers, kv_cache_fraction: 0.9, max_batch_size: 128}
          autoscaling: {min_replicas: 1, max_replicas: 8, target_ongoing_requests: 64}
          resources: {num_cpus: 4, num_gpus: 1, accelerator_type: H100}
          limits: {max_ongoing_requests: 256, drain_timeout_s: 600}
          routing: {policy: predictive, slowdown_weight: 1.0}    # or a name; docs/routing.md
        - id: rehearsal                       # the same traffic without a GPU
          model: /models/my-model             # only its tokenizer and config are read
          engine: {kind: simulated, latency: {kind: roofline, model: llama-3.1-8b, gpu: h100}}
      gateway:
        replicas: 2
        limits: {max_in_flight: 8192}
```
"""


def reference() -> str:
    """Return the whole page."""
    schema = AppConfig.model_json_schema()
    sections = {name: part for name, part in schema["$defs"].items() if "properties" in part}
    shared = RoutingSettings.model_json_schema()
    for section in sections.values():
        _share(section, shared)
    sections["RoutingSettings"] = shared
    names = [*FIRST, *(name for name in sections if name not in FIRST)]
    parts = [INTRODUCTION, f"## args\n\n{_table(schema, sections)}"]
    for name in names:
        text = sections[name].get("description", "").split("\n\n")[0].replace("\n", " ")
        parts.append(f"\n## {name}\n\n{text}\n\n{_table(sections[name], sections)}")
    return "\n".join(parts) + "\n"


def _share(section: dict[str, Any], shared: dict[str, Any]) -> None:
    """Let the section of a policy refer to what all of them have, instead of repeating it."""
    names = shared["properties"].keys()
    if names <= section["properties"].keys():
        section["properties"] = {name: text for name, text in section["properties"].items() if name not in names}
        first, *rest = section.get("description", "").split("\n\n")
        first += " And all of [RoutingSettings](#routingsettings)."
        section["description"] = "\n\n".join([first, *rest])


def _table(section: dict[str, Any], sections: dict[str, Any]) -> str:
    rows = ["| setting | type | default | what |", "|---|---|---|---|"]
    for name, setting in section["properties"].items():
        text = setting.get("description") or _section_text(setting, sections)
        default = "required" if name in section.get("required", ()) else _default(setting)
        rows.append(f"| `{name}` | {_type(setting)} | {default} | {_cell(text)} |")
    return "\n".join(rows)


def _section_text(setting: dict[str, Any], sections: dict[str, Any]) -> str:
    name = str(setting.get("$ref", "")).split("/")[-1]
    return str(sections.get(name, {}).get("description", "")).split("\n")[0]


def _default(setting: dict[str, Any]) -> str:
    text = json.dumps(setting.get("default", ""))
    return f"`{text}`" if len(text) <= 30 and text != '""' else "see there" if len(text) > 30 else ""


def _type(setting: dict[str, Any]) -> str:
    if "$ref" in setting:
        name = setting["$ref"].split("/")[-1]
        return f"[{name}](#{name.lower()})"
    if "enum" in setting or "const" in setting:
        return " or ".join(f"`{value}`" for value in setting.get("enum", [setting.get("const")]))
    if choices := setting.get("anyOf") or setting.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices))
    if setting.get("type") == "array":
        return "list of " + _type(setting["items"]) if "items" in setting else "list"
    names = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "object": "map"}
    return names.get(str(setting.get("type")), "null")


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(reference())
