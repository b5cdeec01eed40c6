"""KV-cache compression methods of the literature in PyTorch, and what gearcpp's own codec is held to. Needs ``pip install gearcpp[reference]``.

`gearcpp.reference.methods` has them as pure functions on tensors. The constructors here give a `Method` that codes one tile at a time, as
``gearcpp perplexity --kv sim:kivi2`` and ``Llama(kv_type=reference.decoquant(bits=4))`` use it.

Raises on import:
    UnsupportedError: PyTorch is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise UnsupportedError("gearcpp.reference needs PyTorch: pip install gearcpp[reference]") from error

from .registry import (
    Method,
    Recorder,
    TileInfo,
    cq,
    decoquant,
    exllamav3,
    gear_paper,
    gear_v1,
    kcvt,
    kivi,
    kvarn,
    kvquant,
    llama_cpp,
    method,
    names,
    native,
    needs_calibration,
    outlier_reduced,
    per_token,
    turboquant,
)

if TYPE_CHECKING:
    from ..evaluation.calibration import record

__all__ = [
    "Method",
    "Recorder",
    "TileInfo",
    "cq",
    "decoquant",
    "exllamav3",
    "gear_paper",
    "gear_v1",
    "kcvt",
    "kivi",
    "kvarn",
    "kvquant",
    "llama_cpp",
    "method",
    "names",
    "native",
    "needs_calibration",
    "outlier_reduced",
    "per_token",
    "record",
    "turboquant",
]


def __getattr__(name: str) -> Any:
    # `record` runs a model, far above the methods that it calibrates: users find it here, the methods themselves do not need it.
    if name == "record":
        from ..evaluation.calibration import record

        return record
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
