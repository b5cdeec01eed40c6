"""The weights of a model folder: safetensors read as raw byte ranges, PyTorch pickles only through weights-only loading."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gearcpp.errors import DataError, UnsupportedError

from .mxfp4 import Mxfp4
from .rows import Block, Rows

# numpy knows no bfloat16: its bits are the upper half of a float32's.
_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_READABLE = {**_STORED, "U8": np.uint8}  # bytes of quantized weights, for those who know what is in them
_HEADER_LIMIT = 100_000_000  # of the safetensors format


@dataclass(frozen=True)
class StoredTensor(Rows):
    """A tensor in a safetensors file, read when asked: with read(), because mapped pages would count as this process's memory."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int, stop: int) -> Block:
        stored, count = np.dtype(_READABLE[self.dtype]), (stop - start) * self.n_columns
        try:
            values = np.fromfile(self.path, stored, count, offset=self.offset + start * self.n_columns * stored.itemsize)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        if values.size < count:
            raise DataError(f"{self.path} ended while it was read: has it been replaced?")
        if self.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False).reshape(stop - start, self.n_columns)


class PickledTensor(Rows):
    """A tensor of a pytorch_model.bin, mapped by torch."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}.get(
            str(tensor.dtype), str(tensor.dtype)
        )

    def read(self, start: int, stop: int) -> Block:
        values: Block = self._tensor.reshape(self.n_rows, self.n_columns)[start:stop].float().numpy()
        return values


Checkpoint = dict[str, StoredTensor | PickledTensor | Mxfp4]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Every tensor of the folder by its name, none of them loaded.

    Raises:
        DataError: no weights, a damaged or truncated file, a tensor in two files, or files that contradict the index.
        UnsupportedError: a pytorch_model.bin without torch installed.
    """
    if index := _read_index(folder / "model.safetensors.index.json"):
        return _merge({shard: _read_safetensors(folder / shard) for shard in sorted(set(index.values()))}, index)
    if shards := sorted(folder.glob("model*.safetensors")):
        return _merge({shard.name: _read_safetensors(shard) for shard in shards})
    if index := _read_index(folder / "pytorch_model.bin.index.json"):
        return _merge({shard: _read_pickle(folder / shard) for shard in sorted(set(index.values()))}, index)
    if shards := sorted(folder.glob("pytorch_model*.bin")):
        return _merge({shard.name: _read_pickle(shard) for shard in shards})
    raise DataError(f"{folder} holds no weights: expected model*.safetensors or pytorch_model*.bin")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: no weight_map ({error})") from error
    if not isinstance(index, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in index.values()):
        raise DataError(f"{path} is damaged: weight_map must give a file of this folder for each tensor")
    return index


def _merge(shards: dict[str, Checkpoint], index: dict[str, str] | None = None) -> Checkpoint:
    merged: Checkpoint = {}
    found_in: dict[str, str] = {}
    for shard, tensors in shards.items():
        for name, tensor in tensors.items():
            if name in merged:
                raise DataError(f"tensor {name} is in two files, {found_in[name]} and {shard}: remove the stale one")
            merged[name] = tensor
            found_in[name] = shard
    for name, shard in (index or {}).items():
        if found_in.get(name) != shard:
            raise DataError(f"the index says that tensor {name} is in {shard}, but it is {'in ' + found_in[name] if name in found_in else 'missing'}")
    return merged


def _read_safetensors(path: Path) -> Checkpoint:
    if not path.is_file():
        raise DataError(f"{path.name} is missing from {path.parent}: the download is incomplete")
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, _HEADER_LIMIT):
            raise DataError(f"{path} is truncated or no safetensors file: its header would have {header_size} bytes, the file has {size}")
        text = file.read(header_size)
    try:
        header = json.loads(text, object_pairs_hook=_refusing_duplicates)
        header.pop("__metadata__", None)
        return {name: _stored_tensor(path, name, entry, 8 + header_size, size) for name, entry in header.items()}
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has a damaged header: {error}") from error


def _refusing_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"a safetensors header names {next(name for name in names if names.count(name) > 1)} twice")
    return entries


def _stored_tensor(path: Path, name: str, entry: dict[str, Any], data_start: int, file_size: int) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if data_start + end > file_size:
        raise DataError(f"{path} is truncated: tensor {name} ends at byte {data_start + end}, the file has {file_size}")
    if dtype in _READABLE and end - begin != math.prod(shape) * np.dtype(_READABLE[dtype]).itemsize:
        raise DataError(f"{path} is damaged: tensor {name} of shape {list(shape)} and type {dtype} cannot have {end - begin} bytes")
    return StoredTensor(path, dtype, shape, data_start + begin)


def _read_pickle(path: Path) -> Checkpoint:
    if not path.is_file():
        raise DataError(f"{path.name} is missing from {path.parent}: the download is incomplete")
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(f"{path.name} is a PyTorch pickle: install torch to read it, or get the model as safetensors") from error
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise DataError(f"{path} cannot be loaded as plain weights: {error}") from error
    return {name: PickledTensor(tensor) for name, tensor in tensors.items()}


def with_mxfp4(checkpoint: Checkpoint) -> Checkpoint:
    """Blocks and scales joined to one tensor of MXFP4, under the name before ``_blocks`` and ``_scales``.

    Raises:
        DataError: one is there without the other, or their shapes do not fit.
    """
    joined: Checkpoint = {}
    for name, tensor in checkpoint.items():
        stem = name.removesuffix("_blocks").removesuffix("_scales")
        if stem == name:
            joined[name] = tensor
        elif {f"{stem}_blocks", f"{stem}_scales"} <= checkpoint.keys():
            joined[stem] = Mxfp4(stem, checkpoint[f"{stem}_blocks"], checkpoint[f"{stem}_scales"])
        else:
            raise DataError(f"the checkpoint has {name} alone: blocks of MXFP4 need their scales, and scales their blocks")
    return joined


def require_numeric(name: str, tensor: StoredTensor | PickledTensor | Mxfp4) -> None:
    """Refuse integer and 8-bit checkpoints, which need scales that this converter does not read."""
    if tensor.dtype not in _STORED and not isinstance(tensor, Mxfp4):
        raise UnsupportedError(f"tensor {name} has type {tensor.dtype}: only {', '.join(_STORED)} can be converted; get the unquantized model")
