"""What is in a GGUF file, and what its KV cache would take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf

from gearcpp.cache.kv_type import KVTypeLike, normalize_kv_type
from gearcpp.cache.stats import LLAMA_BITS, cache_bytes
from gearcpp.config import PRESETS
from gearcpp.errors import DataError
from gearcpp.model_info import ModelInfo, read_model_info

_LONGEST_VALUE = 200  # characters of a text, entries of a list: what is longer is described
_UBATCH = 512  # of the exact rows, see KVNeed


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
        n_bytes: codes or blocks of all cells, and llama.cpp's table of cells.
        exact_bytes: the f16 rows that a GEAR cache keeps besides: tail, sinks and a ubatch of 512.
    """

    kv_type: str
    n_bytes: int
    exact_bytes: int


@dataclass(frozen=True)
class Inspection:
    """The content of a GGUF file.

    Attributes:
        path: the file.
        metadata: every key; long texts and lists are described, not given.
        tensors: in the order of the file.
        n_ctx: the context that `kv` is for, 0 if the file is no model with a KV cache.
        kv: one entry for each kv type.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    n_ctx: int
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


def inspect_model(path: str | os.PathLike[str], n_ctx: int | None = None) -> Inspection:
    """Read a GGUF file's metadata and tensor list.

    Args:
        path: the file.
        n_ctx: context for the sizes of the KV cache; default, what the model was trained for.

    Raises:
        DataError: the file is missing, damaged, or no GGUF.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: _described(field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        tensors = tuple(
            TensorInfo(tensor.name, tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape)), int(tensor.n_bytes))
            for tensor in reader.tensors
        )
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as GGUF: {error}") from error
    info = _model_info(Path(path), metadata)
    if info is None or not info.layers:
        return Inspection(Path(path), metadata, tensors, 0, ())
    context = n_ctx or info.n_ctx_train
    return Inspection(Path(path), metadata, tensors, context, tuple(_kv_need(info, name, context) for name in (*LLAMA_BITS, *PRESETS)))


def _model_info(path: Path, metadata: Mapping[str, Any]) -> ModelInfo | None:
    """The model's layers, or None for a file that is no model: an adapter, an importance matrix."""
    architecture = metadata.get("general.architecture")
    return read_model_info(path) if f"{architecture}.block_count" in metadata else None


def _kv_need(info: ModelInfo, kv_type: KVTypeLike, n_ctx: int) -> KVNeed:
    kv = normalize_kv_type(kv_type)
    n_bytes = cache_bytes(kv, info.layers, n_ctx)
    if not kv.gear:
        return KVNeed(kv.name, n_bytes, 0)
    n_rows = min(kv.gear.n_tail + kv.gear.n_sink + _UBATCH, n_ctx)
    return KVNeed(kv.name, n_bytes, 2 * info.kv_elements(n_rows))


def _described(value: Any) -> Any:
    if isinstance(value, list) and len(value) > _LONGEST_VALUE:
        return f"{len(value)} values"
    if isinstance(value, str) and len(value) > _LONGEST_VALUE:
        return f"{value[:_LONGEST_VALUE]} ... ({len(value)} characters)"
    return value
