"""gearcpp: a compressed KV cache (GEAR, arXiv 2403.05527) inside stock, unpatched llama.cpp.

>>> from gearcpp import Llama
>>> llm = Llama("model.gguf", n_ctx=32768)  # kv_type="gear" is the default
>>> llm.kv_stats()["total"]["bits_per_element"]
"""

from __future__ import annotations

import importlib
from pkgutil import extend_path as _extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from .cache.kv_type import KVType, normalize_kv_type
    from .config import PRESETS, GearConfig
    from .convert import convert_model
    from .errors import AbiError, BusyError, ClosedError, CodecError, ConfigError, DataError, GearError, OutOfMemoryError, UnsupportedError
    from .model_info import ModelInfo, read_model_info
    from .runtime.llama import Llama
    from .runtime.low_level import context_params, model_params
    from .runtime.prompt_cache import GearDiskCache, GearRAMCache
    from .runtime.sessions import GearState

# Python started in a clone imports the sources there, which hide the installed package: what is built is found in the latter all the same.
__path__ = _extend_path(__path__, __name__)

# Imported when asked for: llama_cpp takes a second, and `gearcpp --help` does not need it. Nothing at all is imported before, so that the command line is
# there for Ctrl-C from the first moment on.
_LAZY = {
    **dict.fromkeys(("PRESETS", "GearConfig"), "config"),
    **dict.fromkeys(
        ("AbiError", "BusyError", "ClosedError", "CodecError", "ConfigError", "DataError", "GearError", "OutOfMemoryError", "UnsupportedError"), "errors"
    ),
    "GearDiskCache": "runtime.prompt_cache",
    "GearRAMCache": "runtime.prompt_cache",
    "GearState": "runtime.sessions",
    "KVType": "cache.kv_type",
    "Llama": "runtime.llama",
    "ModelInfo": "model_info",
    "context_params": "runtime.low_level",
    "convert_model": "convert",
    "model_params": "runtime.low_level",
    "normalize_kv_type": "cache.kv_type",
    "read_model_info": "model_info",
}

__all__ = [
    "PRESETS",
    "AbiError",
    "BusyError",
    "ClosedError",
    "CodecError",
    "ConfigError",
    "DataError",
    "GearConfig",
    "GearDiskCache",
    "GearError",
    "GearRAMCache",
    "GearState",
    "KVType",
    "Llama",
    "ModelInfo",
    "OutOfMemoryError",
    "UnsupportedError",
    "__version__",
    "context_params",
    "convert_model",
    "model_params",
    "normalize_kv_type",
    "read_model_info",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gearcpp")
    if name in ("config", "errors"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
