"""OpenAI's MXFP4: numbers of four bits, 32 of them with one scale. llama.cpp has the same type, so that no bit of them is lost."""

from __future__ import annotations

import math

import gguf
import numpy as np
import numpy.typing as npt

from gearcpp.errors import DataError

from .rows import Encoded, Rows

_IN_BLOCK = 32
_NO_NUMBER = 255  # a scale of E8M0 that means NaN


class Mxfp4(Encoded):
    """Matrices ``[experts, rows, columns]`` from blocks ``[experts, rows, columns / 32, 16]`` of bytes and scales ``[experts, rows, columns / 32]``.

    A checkpoint's byte holds two neighbours, ggml's the i-th number of either half of a block; ggml's block begins with its scale.
    """

    type = gguf.GGMLQuantizationType.MXFP4
    dtype = "MXFP4"

    def __init__(self, name: str, blocks: Rows, scales: Rows, first: int = 0, step: int = 1) -> None:
        if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, _IN_BLOCK // 2):
            raise DataError(f"{name}: blocks of shape {list(blocks.shape)} and scales of shape {list(scales.shape)} are no MXFP4")
        self._name, self._blocks, self._scales, self._first, self._step = name, blocks, scales, first, step
        n_experts, n_stored, n_blocks = scales.shape
        self.shape = (n_experts, len(range(first, n_stored, step)), n_blocks * _IN_BLOCK)

    def rows_of_each(self, first: int, step: int) -> Mxfp4:
        """Every step-th row of each matrix."""
        return Mxfp4(self._name, self._blocks, self._scales, first, step)

    def read_encoded(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows ``start`` to ``stop``: uint8 ``[stop - start, columns / 32 * 17]``.

        Raises:
            DataError: a scale is no number.
        """
        rows_each, n_stored = self.shape[1], self._scales.shape[1]
        parts = []
        for index in range(start // rows_each, -(-stop // rows_each)):
            chosen = range(n_stored)[self._first :: self._step][max(start - index * rows_each, 0) : stop - index * rows_each]
            parts.append(self._stored(index * n_stored + chosen[0], index * n_stored + chosen[-1] + 1))
        return np.concatenate(parts)

    def _stored(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Of the stored rows from `start` on, every step-th."""
        n_blocks = self._scales.shape[2]
        scales = self._scales.read(start, stop)[:: self._step].astype(np.uint8)
        if (scales == _NO_NUMBER).any():
            raise DataError(f"{self._name} has a scale that is no number: the checkpoint is damaged")
        packed = self._blocks.read(start * n_blocks, stop * n_blocks).astype(np.uint8)
        packed = packed.reshape(stop - start, n_blocks, _IN_BLOCK // 2)[:: self._step]
        numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, 2, _IN_BLOCK // 2)
        encoded = np.concatenate([scales[..., None], numbers[..., 0, :] | numbers[..., 1, :] << 4], axis=-1)
        return encoded.reshape(len(scales), math.prod(encoded.shape[1:]))
