"""QuantizeSettings and CalibrationSettings: which recipe, and the texts that it is calibrated with."""

from typing import Literal

from pydantic import Field, PositiveInt

from serve.core.strict_model import StrictModel

Recipe = Literal["none", "int8_weight_only", "fp8", "int8_smoothquant", "int4_awq", "nvfp4"]


class TextsSettings(StrictModel):
    """Texts, one a sample."""

    file: str | None = Field(
        default=None,
        description="JSON lines with `text`, `prompt` or `messages`, or plain text with blank lines between samples; "
        "relative to the build file. None: the texts that come with the package, which suit no model in particular.",
    )
    samples: PositiveInt = Field(default=128, description="How many are used, drawn by `seed`.")
    max_tokens: PositiveInt = Field(default=512, description="Longer ones are cut.")
    seed: int = 0


class QuantizeSettings(StrictModel):
    """How weights, activations and KV cache are quantized. In a build file a text is taken for `recipe`."""

    recipe: Recipe = Field(
        default="none",
        description="int8_weight_only: for the transformers kind, on any machine. fp8: Ada, Hopper and newer. "
        "int8_smoothquant, int4_awq (4-bit weights): any GPU. nvfp4: Blackwell.",
    )
    kv_cache: Literal["auto", "fp8", "nvfp4"] = Field(default="auto", description="auto: 16 bits.")
    exclude: tuple[str, ...] = Field(
        default=("lm_head",), description="Modules that stay as they are; * stands for anything."
    )
    group_size: PositiveInt = Field(default=128, description="Of int4_awq: weights that share a scale.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the calibration runs.")
    calibration: TextsSettings = TextsSettings()
