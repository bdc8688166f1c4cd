"""From an engine's settings to the engine. The adapters are imported here, late: each needs its own heavy library."""

import json
from pathlib import Path

from serve.engines.protocol import Engine
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.settings import TransformersSettings

AnyEngineSettings = TransformersSettings | SimulatedSettings


def make_engine(settings: AnyEngineSettings, model_dir: Path) -> Engine:
    """Make the engine that `settings` describes; `start` loads the model.

    Raises:
        ConfigError: The engine's library is not installed.
    """
    match settings:
        case SimulatedSettings():
            from serve.engines.simulated.engine import SimulatedEngine

            return SimulatedEngine(_fit_to_model(settings, model_dir))
        case TransformersSettings():
            from serve.engines.transformers.engine import TransformersEngine

            return TransformersEngine(model_dir, settings)


def _fit_to_model(settings: SimulatedSettings, model_dir: Path) -> SimulatedSettings:
    """Let a simulated engine generate tokens that the model's tokenizer knows, unless the settings say which."""
    if "vocab_size" in settings.model_fields_set:
        return settings
    vocab_size = json.loads((model_dir / "config.json").read_text()).get("vocab_size")
    if not isinstance(vocab_size, int):
        return settings
    return SimulatedSettings.model_validate(settings.model_dump(exclude_unset=True) | {"vocab_size": vocab_size})
