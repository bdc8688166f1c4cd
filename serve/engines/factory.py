"""From an engine's settings to the engine. The adapters are imported here, late: each needs its own heavy library."""

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

            return SimulatedEngine(settings)
        case TransformersSettings():
            from serve.engines.transformers.engine import TransformersEngine

            return TransformersEngine(model_dir, settings)
