"""Weights quantized by llama.cpp itself (llama_model_quantize), so that every type it has can be had."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from gearcpp.errors import ConfigError, DataError, UnsupportedError

from .container import replacing
from .imatrix import Importance, read_imatrix

_PREFIX = "LLAMA_FTYPE_MOSTLY_"


def quantization_types() -> dict[str, int]:
    """The types of the installed llama.cpp by name (Q4_K_M, IQ3_XS ...), with their numbers."""
    from llama_cpp import llama_cpp

    types = {name.removeprefix(_PREFIX): number for name, number in vars(llama_cpp).items() if name.startswith(_PREFIX) and isinstance(number, int)}
    return {**types, "F32": int(llama_cpp.LLAMA_FTYPE_ALL_F32)}


def check_type(name: str) -> int:
    """The number of a type.

    Raises:
        ConfigError: llama.cpp has no such type.
    """
    types = quantization_types()
    if name.upper() not in types:
        raise ConfigError(f"unknown quantization {name!r}: choose one of {', '.join(sorted(types))}")
    return types[name.upper()]


def quantize_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    quantization: str,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    pure: bool = False,
) -> Path:
    """Quantize a GGUF file of f32, f16 or bf16 weights.

    Args:
        source: the GGUF file.
        output: the file to write; it appears when it is complete.
        quantization: a type by llama-quantize's name, such as ``"Q4_K_M"``.
        imatrix: an importance matrix made by llama-imatrix; the smallest types need one.
        n_threads: default, all cores.
        pure: every matrix in the one type, without llama.cpp's mixtures.

    Returns:
        The output's path.

    Raises:
        ConfigError: no such type.
        DataError: a file is missing, damaged or cannot be written, or llama.cpp refused (its reason is in the message).
        UnsupportedError: this llama-cpp-python is too old for an importance matrix.
    """
    from llama_cpp import llama_cpp

    path, number = Path(output), check_type(quantization)
    if not Path(source).is_file():
        raise DataError(f"there is no file {source} to quantize")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = number, n_threads or os.cpu_count() or 1, pure
    kept_alive = _set_importance(params, read_imatrix(Path(imatrix))) if imatrix else None
    with replacing(path) as temporary:
        _quantize(os.fspath(source), temporary, params)
    del kept_alive
    return path


def _quantize(source: str, target: Path, params: Any) -> None:
    from llama_cpp import llama_cpp

    from gearcpp.runtime.llama_log import LlamaLog

    with LlamaLog() as log:
        status = llama_cpp.llama_model_quantize(source.encode(), os.fsencode(target), ctypes.byref(params))
    if status:
        raise DataError(f"llama.cpp cannot quantize {source}: {log.reason or 'no reason given'}")


def _set_importance(params: Any, importance: Importance) -> list[Any]:
    """Point `params` at the matrix; what is returned must live as long as they do."""
    from llama_cpp import llama_cpp

    if not hasattr(llama_cpp, "llama_model_imatrix_data"):
        raise UnsupportedError("this llama-cpp-python cannot take an importance matrix from Python: install a newer one")
    arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in importance.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one, empty, ends the list
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = entries
    return [entries, arrays]
