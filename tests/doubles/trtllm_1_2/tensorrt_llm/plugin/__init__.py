"""Plugins of the TensorRT backend."""

from trtllm_double.configs import by_name

PluginConfig = by_name["PluginConfig"]

__all__ = ["PluginConfig"]
