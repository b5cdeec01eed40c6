"""llama.cpp parameters with a GEAR cache, for those who use llama_cpp's low-level API: several sequences, streams, batches of their own.

>>> import llama_cpp, gearcpp
>>> params, device = gearcpp.model_params("model.gguf", "gear3", n_ubatch=512)
>>> model = llama_cpp.llama_model_load_from_file(b"model.gguf", params)
>>> context = llama_cpp.llama_init_from_model(model, gearcpp.context_params("gear3", n_ctx=16384, n_seq_max=4))
>>> ...  # when a call of llama.cpp fails, device.take_failure() is the exception that says why, if the cache was to blame
>>> llama_cpp.llama_free(context); llama_cpp.llama_model_free(model)
>>> device.close()  # last of all
"""

from __future__ import annotations

import os
from typing import Any

import llama_cpp

from .. import native
from ..cache.device import GearDevice
from ..cache.kv_type import KVTypeLike, normalize_kv_type
from ..cache.placement import ARGUMENTS, Placement, choose_placement
from ..cache.python_codec import Codec, codec_of
from ..config import check_names
from ..errors import ConfigError
from ..model_info import read_model_info
from . import amx


def model_params(
    path: str | os.PathLike[str], kv_type: KVTypeLike = "gear", *, n_ubatch: int = 512, codec: Codec | None = None, **fields: Any
) -> tuple[llama_cpp.llama_model_params, GearDevice | None]:
    """Parameters for ``llama_model_load_from_file``.

    Args:
        path: the model's file.
        kv_type: as in `gearcpp.Llama`; the same must go to `context_params`.
        n_ubatch: at least the n_ubatch of every context.
        codec: a codec in Python instead of the native one (`gearcpp.cache.python_codec.Codec`).
        fields: other members of llama_model_params. On GPUs (docs/cuda.md) n_gpu_layers, split_mode, main_gpu and tensor_split (a sequence of numbers) say
            where the layers go; on the CPU kv_type does.

    Returns:
        The parameters, and the device, which must be closed after every context and model made with it; None for llama.cpp's own types. With a codec
        in Python ``device.codec.bits_per_element()`` is what that would store; the memory is that of f16.

    Raises:
        ConfigError: a field is unknown or contradicts the cache.
        GearError: others as in `gearcpp.Llama`.
    """
    kv = normalize_kv_type(kv_type)
    codec = codec_of(kv, codec)
    if not kv.gear:
        return _filled(_default_params(), fields, reserved=()), None
    info, placement = read_model_info(path), Placement()
    if native.default_devices() != placement.devices:
        placement = choose_placement({name: fields.pop(name) for name in ARGUMENTS if name in fields}, info.n_layer)
    params = _filled(_default_params(), fields, reserved=("devices", "n_gpu_layers", "split_mode", "tensor_split"))
    device = GearDevice(info, kv.gear, n_ubatch=n_ubatch, codec=codec, placement=placement)
    device.attach(params)
    return params, device


def context_params(kv_type: KVTypeLike = "gear", **fields: Any) -> llama_cpp.llama_context_params:
    """Parameters for ``llama_init_from_model``: llama.cpp's defaults with this cache, flash attention on, and ``fields`` set.

    Raises:
        ConfigError: a field is unknown or contradicts the cache.
    """
    kv = normalize_kv_type(kv_type)
    params = llama_cpp.llama_context_default_params()
    params.type_k, params.type_v = kv.type_numbers
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return _filled(params, fields, reserved=("type_k", "type_v", *(("flash_attn_type", "offload_kqv") if kv.gear else ())))


def _default_params() -> llama_cpp.llama_model_params:
    params = llama_cpp.llama_model_default_params()
    amx.avoid_if_broken(params)
    return params


def _filled(params: Any, fields: dict[str, Any], reserved: tuple[str, ...]) -> Any:
    known = [name for name, *_ in params._fields_]
    check_names(fields, known, type(params).__name__ + " field")
    for name, value in fields.items():
        if name in reserved:
            raise ConfigError(f"{name} is set by kv_type; leave it out")
        setattr(params, name, value)
    return params
