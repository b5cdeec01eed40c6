"""What is in a GGUF file, and what its KV cache would take."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf

from gearcpp.cache.allocation import LLAMA_BITS, Allocation, LayerGroup, allocated, cache_bytes, default_ubatch, describe, group_layers
from gearcpp.cache.kv_type import KVTypeLike, normalize_kv_type
from gearcpp.config import PRESETS
from gearcpp.errors import DataError
from gearcpp.model_info import LongArray, ModelInfo, TensorHeader, read_header, read_model_info

_LONGEST_VALUE = 200  # characters of a text, entries of a list: what is longer is described


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: shape with rows first, as numpy has it."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True)
class KVNeed:
    """What one kv type takes at a context.

    Attributes:
        n_bytes: all that llama.cpp allocates for one sequence: cells of all layers, its tables of cells, and recurrent states.
        layers: the layers by what they become.
    """

    kv_type: str
    n_bytes: int
    layers: tuple[LayerGroup, ...]

    @property
    def summary(self) -> str:
        """The layers in one line."""
        return describe(self.layers)


@dataclass(frozen=True)
class Inspection:
    """The content of a GGUF file.

    Attributes:
        path: the file.
        metadata: every key; long texts and lists are described, not given.
        tensors: in the order of the file.
        n_ctx: the context that `kv` is for, 0 if the file is no model with a KV cache.
        swa_full: whether sliding windows get as many cells as that, as with --swa-full.
        n_window: layers with a sliding window.
        kv: one entry for each kv type.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    n_ctx: int
    swa_full: bool
    n_window: int
    kv: tuple[KVNeed, ...]

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(count for count, _ in self.by_type().values())

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Tensor type -> numbers, bytes; the largest first."""
        sums: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors:
            count, n_bytes = sums.get(tensor.type, (0, 0))
            elements = 1
            for size in tensor.shape:
                elements *= size
            sums[tensor.type] = count + elements, n_bytes + tensor.n_bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1][1]))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        by_type = {name: {"n_parameters": count, "bytes": n_bytes} for name, (count, n_bytes) in self.by_type().items()}
        return {**asdict(self), "path": str(self.path), "n_parameters": self.n_parameters, "by_type": by_type}


def inspect_model(path: str | os.PathLike[str], n_ctx: int | None = None, *, swa_full: bool = False) -> Inspection:
    """Read a GGUF file's metadata and tensor list.

    Args:
        path: the file.
        n_ctx: context for the sizes of the KV cache; default, what the model was trained for.
        swa_full: sliding windows get as many cells as that.

    Raises:
        DataError: the file is missing, damaged, or no GGUF.
    """
    keys, headers = read_header(path)
    metadata = {key: _described(value) for key, value in keys.items()}
    tensors = tuple(_tensor(path, header) for header in headers)
    info = _model_info(Path(path), metadata)
    if info is None or not info.layers:
        return Inspection(Path(path), metadata, tensors, 0, swa_full, 0, ())
    context = n_ctx or info.n_ctx_train
    n_ubatch = min(default_ubatch(info, swa_full=swa_full), context)
    needs = tuple(_kv_need(info, name, Allocation(context, n_ubatch, swa_full=swa_full)) for name in (*LLAMA_BITS, *PRESETS))
    return Inspection(Path(path), metadata, tensors, context, swa_full, sum(layer.window > 0 for layer in info.cached_layers), needs)


def _tensor(path: str | os.PathLike[str], header: TensorHeader) -> TensorInfo:
    try:
        kind = gguf.GGMLQuantizationType(header.type)
    except ValueError:
        raise DataError(f"{path}: its tensor {header.name!r} is of type {header.type}, which the installed gguf does not know") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return TensorInfo(header.name, kind.name, header.shape, math.prod(header.shape) // block * block_bytes)


def _model_info(path: Path, metadata: Mapping[str, Any]) -> ModelInfo | None:
    """The model's layers, or None for a file that is no model: an adapter, an importance matrix."""
    architecture = metadata.get("general.architecture")
    return read_model_info(path) if f"{architecture}.block_count" in metadata else None


def _kv_need(info: ModelInfo, kv_type: KVTypeLike, allocation: Allocation) -> KVNeed:
    kv = normalize_kv_type(kv_type)
    sides = [(side.il, side.kind, side.n_bytes) for side in allocated(kv, info, allocation)]
    return KVNeed(kv.name, cache_bytes(kv, info, allocation), tuple(group_layers(sides, info, allocation)))


def _described(value: Any) -> Any:
    if isinstance(value, LongArray):
        return f"{value.length} values"
    if isinstance(value, list) and len(value) > _LONGEST_VALUE:
        return f"{len(value)} values"
    if isinstance(value, str) and len(value) > _LONGEST_VALUE:
        return f"{value[:_LONGEST_VALUE]} ... ({len(value)} characters)"
    return value
