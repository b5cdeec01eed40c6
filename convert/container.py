"""A GGUF file written tensor by tensor, block by block, under a temporary name until it is complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from gearcpp.errors import DataError

from .metadata import Value
from .rows import Encoded, Rows

Progress = Callable[[str, int], None]  # name of the tensor, bytes written since the last call


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the file to be written."""

    name: str
    rows: Rows
    type: Type

    @property
    def n_bytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.rows.n_rows * self.rows.n_columns // block * block_bytes

    def encoded_blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The tensor's bytes, a block of rows at a time."""
        for start, stop in self.rows.spans():
            yield self.rows.read_encoded(start, stop) if isinstance(self.rows, Encoded) else gguf.quantize(self.rows.read(start, stop), self.type)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if all goes well and vanishes if not.

    Raises:
        DataError: the folder cannot be written, or the disk is full.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_gguf(path: Path, architecture: str, metadata: Mapping[str, Value], tensors: list[OutputTensor], progress: Progress | None = None) -> None:
    """Write a complete GGUF file; the memory it takes is that of one block of rows."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_key_value(key, value, *_value_type(value))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.rows.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    try:
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            for encoded in tensor.encoded_blocks():
                file.write(np.ascontiguousarray(encoded).data)
                if progress:
                    progress(tensor.name, encoded.nbytes)
        writer.write_padding(file, file.tell())
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def _value_type(value: Value) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]:
    if isinstance(value, list):
        return gguf.GGUFValueType.ARRAY, None
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32, None
    return gguf.GGUFValueType.get_type(value), None
