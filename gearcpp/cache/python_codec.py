"""Python codecs that replace the native one: reference methods in the form in which a device calls them, and the bytes that they would store.

The device keeps what such a codec returns as f16, so no memory is saved.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .kv_type import KVType, TileMethod

F32 = npt.NDArray[np.float32]

# A codec in Python, given a tile of one head when it is packed:
#   (il, side "k" or "v", head, x f32 [n_token, d_head], written bool [n_token], cells i64 [n_token]) -> (reconstruction [n_token, d_head], bytes it takes)
Codec = Callable[[int, str, int, npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.int64]], tuple[npt.ArrayLike, float]]


def codec_of(kv: KVType, codec: Codec | None = None) -> Codec | None:
    """What codes the tiles of a cache in Python: the function given, or the method in ``kv``; None: the native codec.

    Raises:
        ConfigError: a function was given, and the cache has no tiles or a method already.
    """
    if codec and not kv.gear:
        raise ConfigError(f"codec codes the tiles of a GEAR cache; it has no place in kv_type={kv.name!r}")
    if codec and kv.method:
        raise ConfigError(f"kv_type={kv.name!r} codes the tiles by itself; leave codec out, or give it with a preset")
    return MethodCodec(kv.method) if kv.method else codec


class MethodCodec:
    """A method in the form of a `Codec`. Cells are taken for positions: right for one sequence that was never shifted."""

    def __init__(self, method: TileMethod) -> None:
        self.method = method

    def __call__(self, il: int, side: str, head: int, x: F32, written: npt.NDArray[np.bool_], cells: npt.NDArray[np.int64]) -> tuple[npt.ArrayLike, float]:
        """Code a tile of one head, x [T, d_head]."""
        return self.method(side, x, written, cells, layer=il, head=head)


class CountedCodec:
    """A codec that counts the bytes it would store. A tile that is packed again counts again."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._counts: dict[tuple[int, str], tuple[float, int]] = {}  # bytes and numbers of each side of each layer

    def __call__(self, il: int, side: str, head: int, x: F32, written: npt.NDArray[np.bool_], cells: npt.NDArray[np.int64]) -> tuple[npt.ArrayLike, float]:
        """Code a tile."""
        restored, n_bytes = self.codec(il, side, head, x, written, cells)
        counted, n_elements = self._counts.get((il, side), (0.0, 0))
        self._counts[il, side] = counted + float(n_bytes), n_elements + int(written.sum()) * x.shape[1]
        return restored, n_bytes

    def bits_per_element(self, il: int | None = None, side: str | None = None) -> float:
        """Stored bits for each number coded so far, on one side of one layer or everywhere; NaN before the first tile."""
        counts = self._counts.values() if il is None or side is None else [self._counts.get((il, side), (0.0, 0))]
        n_elements = sum(n for _, n in counts)
        return 8 * sum(n_bytes for n_bytes, _ in counts) / n_elements if n_elements else float("nan")
