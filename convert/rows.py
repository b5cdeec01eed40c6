"""Matrices that are read a block of rows at a time, so that converting never holds a whole one.

A tensor of any rank is seen as rows of its last dimension: ``[experts, feed_forward, model]`` has ``experts * feed_forward`` rows of ``model`` numbers,
and a vector is one row. Quantization blocks never cross rows, hence converting block by block gives the same bytes as converting at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import gguf
import numpy as np
import numpy.typing as npt

Block = npt.NDArray[np.float32]

# 16 MiB of float32: long enough to read at full speed, short enough that a dozen temporaries of the quantizers are nothing.
BLOCK_ELEMENTS = 1 << 22


class Rows(ABC):
    """A tensor whose rows can be read as float32."""

    shape: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def n_columns(self) -> int:
        return self.shape[-1]

    @abstractmethod
    def read(self, start: int, stop: int) -> Block:
        """Rows ``start`` to ``stop``: float32 ``[stop - start, n_columns]``."""

    def spans(self) -> Iterator[tuple[int, int]]:
        """All rows in order, at most `BLOCK_ELEMENTS` numbers (or one row) at a time, by their first and the one after their last."""
        step = max(1, BLOCK_ELEMENTS // self.n_columns)
        for start in range(0, self.n_rows, step):
            yield start, min(start + step, self.n_rows)

    def blocks(self) -> Iterator[Block]:
        """The rows of each of the spans."""
        for start, stop in self.spans():
            yield self.read(start, stop)


class Encoded(Rows):
    """A tensor that is in one of ggml's types already, and is written as it is."""

    type: ClassVar[gguf.GGMLQuantizationType]

    @abstractmethod
    def read_encoded(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows ``start`` to ``stop``: uint8 ``[stop - start, bytes of a row]``."""

    def read(self, start: int, stop: int) -> Block:
        return np.asarray(gguf.dequantize(self.read_encoded(start, stop), self.type), dtype=np.float32)


class Computed(Rows):
    """A small tensor that the converter makes itself, such as RoPE factors."""

    def __init__(self, values: npt.ArrayLike) -> None:
        self._values = np.asarray(values, dtype=np.float32)
        self.shape = self._values.shape

    def read(self, start: int, stop: int) -> Block:
        return self._values.reshape(self.n_rows, self.n_columns)[start:stop]


class RotaryPairs(Rows):
    """A query or key projection (or its bias) reordered for llama.cpp's RoPE.

    transformers rotates channel i with channel i + d_head / 2, llama.cpp's "normal" RoPE rotates neighbours: within each head, output row 2 i + half is
    input row half * d_head / 2 + i.
    """

    def __init__(self, source: Rows, d_head: int) -> None:
        self._source = source
        self._d_head = d_head
        self.shape = source.shape
        self._within_head = np.arange(d_head).reshape(2, d_head // 2).T.ravel()  # [d_head]

    def read(self, start: int, stop: int) -> Block:
        if len(self.shape) == 1:
            bias = self._source.read(start, stop).reshape(-1, self._d_head)  # [n_head, d_head]
            return bias[:, self._within_head].reshape(1, -1)
        first, last = start // self._d_head, -(-stop // self._d_head)
        stored = self._source.read(first * self._d_head, last * self._d_head)
        heads = stored.reshape(last - first, self._d_head, self.n_columns)
        ordered = heads[:, self._within_head].reshape(-1, self.n_columns)
        return ordered[start - first * self._d_head : stop - first * self._d_head]


class Shifted(Rows):
    """A tensor plus a constant: Gemma stores its norm weights minus one."""

    def __init__(self, source: Rows, offset: float) -> None:
        self._source = source
        self._offset = np.float32(offset)
        self.shape = source.shape

    def read(self, start: int, stop: int) -> Block:
        return self._source.read(start, stop) + self._offset


class Mapped(Rows):
    """A tensor with a function of each number in its place."""

    def __init__(self, source: Rows, function: Callable[[Block], Block]) -> None:
        self._source = source
        self._function = function
        self.shape = source.shape

    def read(self, start: int, stop: int) -> Block:
        return self._function(self._source.read(start, stop))


class ScaledRows(Rows):
    """A matrix, each row times a number of its own."""

    def __init__(self, source: Rows, factors: npt.ArrayLike) -> None:
        self._source = source
        self._factors = np.asarray(factors, dtype=np.float32)
        self.shape = source.shape

    def read(self, start: int, stop: int) -> Block:
        return self._source.read(start, stop) * self._factors[start:stop, None]


class Selected(Rows):
    """Some rows of a matrix in an order of their own, or some numbers of a vector: channels of heads that llama.cpp sorts in another way."""

    def __init__(self, source: Rows, indices: npt.ArrayLike) -> None:
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)
        self.shape = (len(self._indices), *source.shape[1:])

    def read(self, start: int, stop: int) -> Block:
        if len(self.shape) == 1:
            return self._source.read(start, stop)[:, self._indices]
        rows = self._indices[start:stop]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)  # of rows that follow each other
        return np.concatenate([self._source.read(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)])


class SelectedColumns(Rows):
    """The columns of a matrix in another order."""

    def __init__(self, source: Rows, indices: npt.ArrayLike) -> None:
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)
        self.shape = (*source.shape[:-1], len(self._indices))

    def read(self, start: int, stop: int) -> Block:
        return self._source.read(start, stop)[:, self._indices]


class Transposed(Rows):
    """A matrix stored the other way round: GPT-2's projections are [in, out]."""

    def __init__(self, source: Rows) -> None:
        self._source = source
        self.shape = (source.shape[1], source.shape[0])

    def read(self, start: int, stop: int) -> Block:
        return np.concatenate([block[:, start:stop].T for block in self._source.blocks()], axis=1)


class Reshaped(Rows):
    """A tensor under another shape, its rows as they are."""

    def __init__(self, source: Rows, shape: tuple[int, ...]) -> None:
        assert math.prod(shape) == math.prod(source.shape)
        assert shape[-1] == source.shape[-1]
        self._source = source
        self.shape = shape

    def read(self, start: int, stop: int) -> Block:
        return self._source.read(start, stop)


class Folded(Rows):
    """A vector as a small matrix."""

    def __init__(self, source: Rows, shape: tuple[int, int]) -> None:
        assert source.shape == (math.prod(shape),)
        self._source = source
        self.shape = shape

    def read(self, start: int, stop: int) -> Block:
        return self._source.read(0, 1).reshape(self.shape)[start:stop]


class Stacked(Rows):
    """Matrices of equal shape as one tensor with a leading dimension: the experts of a layer."""

    def __init__(self, sources: Sequence[Rows]) -> None:
        self._sources = sources
        self.shape = (len(sources), *sources[0].shape)

    def read(self, start: int, stop: int) -> Block:
        rows_each = self._sources[0].n_rows
        blocks = []
        for index in range(start // rows_each, -(-stop // rows_each)):
            base = index * rows_each
            blocks.append(self._sources[index].read(max(start - base, 0), min(stop - base, rows_each)))
        return np.concatenate(blocks)


class RowsOfEach(Rows):
    """The same rows of every matrix of a stack: one half of experts whose gate and up projections are fused."""

    def __init__(self, source: Rows, first: int, last: int) -> None:
        self._source = source
        self._first = first
        self.shape = (source.shape[0], last - first, source.shape[2])

    def read(self, start: int, stop: int) -> Block:
        rows_each, stored_each = self.shape[1], self._source.shape[1]
        blocks = []
        for index in range(start // rows_each, -(-stop // rows_each)):
            base, stored = index * rows_each, index * stored_each + self._first
            blocks.append(self._source.read(stored + max(start - base, 0), stored + min(stop - base, rows_each)))
        return np.concatenate(blocks)


class ColumnsOfEach(Rows):
    """Every step-th column of each matrix of a stack, as rows: experts that are stored [in, out], gate and up in turns."""

    def __init__(self, source: Rows, first: int = 0, step: int = 1) -> None:
        self._source = source
        self._columns = range(source.shape[2])[first::step]
        self.shape = (source.shape[0], len(self._columns), source.shape[1])

    def read(self, start: int, stop: int) -> Block:
        rows_each, stored_each = self.shape[1], self._source.shape[1]
        at_once = max(1, BLOCK_ELEMENTS // self._source.n_columns)
        blocks = []
        for index in range(start // rows_each, -(-stop // rows_each)):
            columns = self._columns[max(start - index * rows_each, 0) : stop - index * rows_each]
            first, last = index * stored_each, (index + 1) * stored_each
            pieces = (self._source.read(at, min(at + at_once, last))[:, columns.start : columns.stop : columns.step] for at in range(first, last, at_once))
            blocks.append(np.concatenate([piece.T for piece in pieces], axis=1))
        return np.concatenate(blocks)
