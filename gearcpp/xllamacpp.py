"""GEAR in xllamacpp, which has llama.cpp's own server as a Python class: no llama-cpp-python takes part, and none is loaded.

>>> import xllamacpp, gearcpp.xllamacpp
>>> params = xllamacpp.CommonParams()
>>> params.model.path, params.n_ctx = "model.gguf", 32768
>>> server = xllamacpp.Server(gearcpp.xllamacpp.use(params, "gear"))
>>> gearcpp.xllamacpp.kv_stats()["total"]["bits_per_element"]
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from . import native
from .cache.kv_type import KVTypeLike, normalize_kv_type
from .cache.stats import gear_layers, seen_in, summarize
from .errors import AbiError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from .cache.kv_type import KVType

_ALL_LAYERS = 999
_FIRST_DEVICE = b"GEAR0"
_NOMINAL_TYPE = 1  # ggml's number of f16, of which llama.cpp thinks that the cache is

_lock = threading.Lock()
_loaded: KVType | None = None  # one device for all servers of the process: llama.cpp never gives a registered one back

Params = TypeVar("Params")


def use(params: Params, kv_type: KVTypeLike = "gear") -> Params:
    """Have an ``xllamacpp.CommonParams`` put the model's KV cache into GEAR; the same object is returned, for ``xllamacpp.Server``.

    The plugin is registered with xllamacpp's own ggml. Set are ``n_gpu_layers`` (all layers on the plugin's device, which hands everything but the cache
    to the CPU) and ``flash_attn_type`` (on). All servers of a process have the same ``kv_type``.

    Args:
        kv_type: a preset by name, a `GearConfig`, or a mapping of its fields; the forms that are not GEAR's are llama.cpp's own (``params.cache_type_k``).

    Raises:
        AbiError: xllamacpp is not installed, its ggml is laid out in a way that is not known, or another llama.cpp of this process has the plugin.
        ConfigError: ``kv_type`` is not GEAR's, or not the one that this process has already, or ``params`` ask for what contradicts it.
        UnsupportedError: this build of xllamacpp has a GPU, which its server would choose instead.
    """
    kv = normalize_kv_type(kv_type)
    if not kv.gear or kv.method:
        raise ConfigError(f"kv_type {kv.name!r} is not a cache of the plugin's; set cache_type_k and cache_type_v for llama.cpp's own types")
    try:
        from xllamacpp import xllamacpp
    except ImportError as error:
        raise AbiError(f"xllamacpp cannot be imported: {error}; install it with pip install xllamacpp") from error
    if not isinstance(params, xllamacpp.CommonParams):
        raise ConfigError(f"params must be an xllamacpp.CommonParams, not {type(params).__name__}")
    _check(params)
    _load(xllamacpp, kv)
    gpus = [d["name"] for d in xllamacpp.get_device_info() if str(d["type"]).endswith("_GPU") and not d["name"].startswith("GEAR")]
    if gpus:
        raise UnsupportedError(
            f"this xllamacpp has GPUs ({', '.join(gpus)}), and its parameters cannot name another device; install its build for the CPU"
        )
    settings: Any = params
    settings.n_gpu_layers = _ALL_LAYERS
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return params


def kv_stats() -> dict[str, Any]:
    """What the KV caches of this process's servers hold and cost, in the form of `Llama.kv_stats`.

    Raises:
        ConfigError: `use` was not called.
    """
    device = native.lib.gear_plugin_device()
    if not _loaded or device == native.ffi.NULL:
        raise ConfigError("no server of this process has a GEAR cache; call gearcpp.xllamacpp.use first")
    n = 0
    while True:
        stats = native.ffi.new("gear_store_stats[]", max(n, 1))
        count = native.lib.gear_device_stats(device, stats, n)
        if count < 0:
            raise native.last_error()
        if count <= n:
            stores = [native.struct_to_dict(stats[i]) for i in range(count)]
            info, allocation = seen_in(stores)
            layers = gear_layers(stores, _loaded, info, allocation, operation=lambda il: native.text(native.lib.gear_device_other_use(device, il)))
            return summarize(_loaded, layers, int(native.lib.gear_device_scratch_bytes(device)), info, allocation)
        n = count


def _check(params: Any) -> None:
    """Raise ConfigError for what contradicts a GEAR cache."""
    for name in ("cache_type_k", "cache_type_v"):
        if int(getattr(params, name)) != _NOMINAL_TYPE:
            raise ConfigError(f"{name} must stay at f16, which GEAR takes the place of")
    if params.no_kv_offload:
        raise ConfigError("no_kv_offload must stay False: with it llama.cpp keeps the cache to itself")


def _load(module: Any, kv: KVType) -> None:
    """Register the plugin with the ggml inside xllamacpp's extension module, once."""
    global _loaded
    assert kv.gear
    with _lock:
        if _loaded and _loaded.gear != kv.gear:
            raise ConfigError(f"this process has kv_type {_loaded.name!r} already: all its servers share it; use a process for each kv_type")
        ggml = ctypes.CDLL(module.__file__)
        ggml.ggml_backend_load.restype = ctypes.c_void_p
        ggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
        ggml.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
        if _loaded:
            return
        if ggml.ggml_backend_dev_by_name(_FIRST_DEVICE):
            raise ConfigError("the plugin was loaded before, by GGML_BACKEND_PATH; unset that variable, or set GEARCPP_KV instead of calling use()")
        kept = os.environ.get("GEARCPP_KV")
        os.environ["GEARCPP_KV"] = kv.gear.to_text()
        try:
            if not ggml.ggml_backend_load(str(native.library_path()).encode()):
                raise native.last_error()
        finally:
            if kept is None:
                del os.environ["GEARCPP_KV"]
            else:
                os.environ["GEARCPP_KV"] = kept
        _loaded = kv
