"""Which arguments reach llama_cpp.Llama: the user's own, checked, plus what the cache needs.

Only arguments that the user gave can contradict the cache, so they come as a mapping of what was given: llama_cpp.Llama's defaults (flash_attn=False,
n_gpu_layers=0) say nothing about what the user wants.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp

from ..cache.kv_type import KVType
from ..cache.placement import Placement
from ..config import suggest
from ..errors import ConfigError, DataError, UnsupportedError
from .threads import llama_threads

_PARENT = llama_cpp.Llama  # now: programs may put gearcpp.Llama in its place later
CELL_PADDING = 256  # llama.cpp rounds n_ctx up to this (llama-context.cpp), llama_cpp.Llama's own buffers do not
_MOST_CONTEXT = 2**31 - CELL_PADDING
# Arguments that llama-cpp-python once had, and programs still give: what they asked for is always so, or decided elsewhere.
OBSOLETE = ("f16_kv", "low_vram", "mul_mat_q", "n_gqa", "n_parts", "rms_norm_eps")
_WITHOUT_FLASH_ATTENTION = ("f32", "f16", "bf16")  # types of V that llama.cpp can keep without flash attention


def known_arguments() -> list[str]:
    """Arguments of the installed llama_cpp.Llama."""
    parameters = inspect.signature(_PARENT.__init__).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]


def taken(given: Mapping[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """The user's arguments without those that llama_cpp.Llama takes and ignores; of these, one warning. Paths become text.

    Args:
        given: all that the user gave, ``kv_type`` excepted.
        lenient: unknown names are ignored as well, as the parent does; also with GEARCPP_LENIENT=1 in the environment.

    Raises:
        ConfigError: a name is unknown, or asks for what llama.cpp does not do.
        DataError: a LoRA file is not there.
    """
    lenient = lenient or os.environ.get("GEARCPP_LENIENT", "") not in ("", "0")
    known = known_arguments()
    ignored = [name for name in given if name not in known and (lenient or name in OBSOLETE or given[name] is None)]  # None asks for nothing
    for name in given:
        if name not in known and name not in ignored:
            near = suggest(name, known)
            advice = near or "; llama_cpp.Llama would ignore it: leave it out, or set gearcpp.Llama.lenient = True"
            raise ConfigError(f"unknown argument of Llama {name!r}{advice}")
    if ignored:
        warnings.warn(f"ignored, as by llama_cpp.Llama: {', '.join(ignored)} (kv_type alone says what the cache is made of)", stacklevel=3)
    arguments = {name: value for name, value in given.items() if name not in ignored}
    for name in ("model_path", "lora_path"):
        if isinstance(arguments.get(name), os.PathLike):
            arguments[name] = os.fspath(arguments[name])
    lora = arguments.get("lora_path")
    if lora and not Path(lora).is_file():
        raise DataError(f"there is no LoRA file {lora}; check lora_path")
    if arguments.get("lora_base"):
        raise ConfigError("lora_base: llama.cpp applies LoRA to the loaded model and takes no other base any more; leave it out")
    if not lora and arguments.get("lora_scale", 1.0) != 1.0:
        raise ConfigError("lora_scale without lora_path scales nothing: give the adapter, or leave it out")
    return arguments


def parent_arguments(
    kv: KVType, given: Mapping[str, Any], n_ctx_train: int, *, has_cache: bool = True, placement: Placement | None = None
) -> dict[str, Any]:
    """What to call llama_cpp.Llama with.

    Args:
        kv: the cache.
        given: the user's arguments, ``kv_type`` excepted.
        n_ctx_train: what n_ctx=0 means for this model.
        has_cache: False when no KV cache will be made (vocab_only, models without one): nothing can contradict it then.
        placement: where the layers go with a GEAR cache; None: all on the CPU.

    Raises:
        ConfigError: an argument is unknown (with the nearest names), out of range, or contradicts the cache.
        UnsupportedError: layers would go to a GPU, which a GEAR cache cannot follow.
    """
    given = taken(given)
    arguments = {**given, "n_ctx": _rounded_context(given.get("n_ctx", 512), n_ctx_train)}
    if "swa_full" in known_arguments():  # as llama.cpp's own programs have it; the library's default is True
        arguments["swa_full"] = bool(given.get("swa_full"))
    for name in ("n_batch", "n_ubatch"):
        if name in given:
            _whole(name, given[name], 1)
    for name in ("n_threads", "n_threads_batch", "last_n_tokens_size"):
        if given.get(name) is not None:
            _whole(name, given[name], 0)
    _without_effect(given)
    arguments["n_threads"], arguments["n_threads_batch"] = llama_threads(given.get("n_threads"), given.get("n_threads_batch"))
    if not has_cache:
        return arguments
    _check_types(kv, given)
    return {**arguments, **(_for_gear(given, placement or Placement()) if kv.gear else _for_llama(kv, given))}


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _MOST_CONTEXT:
        raise ConfigError(f"{name} must be a whole number from {low} to {_MOST_CONTEXT}, not {value!r}")


def _without_effect(given: Mapping[str, Any]) -> None:
    """Refuse what the parent would take and never use."""
    if given.get("pooling_type", llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED) != llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED and not given.get("embedding"):
        raise ConfigError("pooling_type says how embeddings are made: it needs embedding=True")
    if given.get("spm_infill"):
        raise ConfigError("spm_infill: llama-cpp-python puts token 0 where a model's own infill tokens belong; write those into the prompt, suffix first")


def _rounded_context(n_ctx: Any, n_ctx_train: int) -> int:
    _whole("n_ctx", n_ctx, 0)
    return -(-(n_ctx or n_ctx_train) // CELL_PADDING) * CELL_PADDING


def _check_types(kv: KVType, given: Mapping[str, Any]) -> None:
    for name, number in zip(("type_k", "type_v"), kv.type_numbers, strict=True):
        if given.get(name) is not None and (kv.gear or given[name] != number):
            raise ConfigError(
                f"{name} contradicts kv_type={kv.name!r}: kv_type alone says what the cache is made of, as in kv_type='q8_0' or ('q8_0', 'q4_0')"
            )


def _for_gear(given: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    contradictions: tuple[tuple[str, Any, str], ...] = (
        ("flash_attn", True, "a GEAR cache is read by flash attention"),
        ("offload_kqv", True, "it would keep the cache outside of GEAR"),
    )
    if placement.on_cpu:
        contradictions += (
            ("split_mode", llama_cpp.LLAMA_SPLIT_MODE_LAYER, "it is on the CPU"),
            ("main_gpu", 0, "it is on the CPU"),
            ("tensor_split", None, "it is on the CPU"),
        )
    for name, wanted, reason in contradictions:
        if name in given and given[name] != wanted:
            raise ConfigError(f"{name}={given[name]!r} does not go with a GEAR cache ({reason}); leave it out, or use kv_type='f16'")
    if placement.on_cpu and given.get("n_gpu_layers") and llama_cpp.llama_supports_gpu_offload():
        raise UnsupportedError(
            "this llama-cpp-python offloads layers to a GPU, and GEAR keeps its cache on the CPU; leave n_gpu_layers out, or use kv_type='f16'"
        )
    return {"flash_attn": True, "offload_kqv": True, **placement.arguments}


def _for_llama(kv: KVType, given: Mapping[str, Any]) -> dict[str, Any]:
    type_k, type_v = kv.type_numbers
    arguments = {"type_k": type_k, "type_v": type_v}
    if kv.type_v in _WITHOUT_FLASH_ATTENTION:
        return arguments
    if "flash_attn" in given and not given["flash_attn"]:
        raise ConfigError(f"flash_attn=False does not go with kv_type={kv.name!r}: llama.cpp reads a quantized V with flash attention only")
    return {**arguments, "flash_attn": True}
