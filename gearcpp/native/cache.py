"""One layer's cache without llama.cpp: `Cache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import GearConfig
from ..errors import from_status
from .library import F16, F32, Side, check, ffi, last_error, lib, pointer, side_number, struct_to_dict
from .tile import config_to_c


class Cache:
    """One layer's K and V store with its attention, without llama.cpp: for tests and micro-benchmarks.

    Cells are global: ``stream * n_cell + cell``. Close it, or use it in a ``with`` statement.
    """

    def __init__(
        self,
        config: GearConfig,
        *,
        n_head_kv: int,
        d_head_k: int,
        d_head_v: int | None = None,
        n_cell: int,
        n_stream: int = 1,
        n_ubatch: int = 512,
        il: int = 0,
    ) -> None:
        self.n_head_kv, self.n_cell, self.n_stream = n_head_kv, n_cell, n_stream
        self._d_head: dict[Side, int] = {"k": d_head_k, "v": d_head_k if d_head_v is None else d_head_v}
        params = ffi.new(
            "gear_cache_params *",
            {
                "config": config_to_c(config)[0],
                "layer": {"il": il, "n_head_kv": n_head_kv, "d_head_k": self._d_head["k"], "d_head_v": self._d_head["v"]},
                "n_cell": n_cell,
                "n_stream": n_stream,
                "n_ubatch": n_ubatch,
            },
        )
        self._cache = lib.gear_cache_new(params)
        if self._cache == ffi.NULL:
            raise last_error()

    def close(self) -> None:
        """Free the cache. May be called twice."""
        if self._cache != ffi.NULL:
            lib.gear_cache_free(self._cache)
            self._cache = ffi.NULL

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _n_embd(self, side: Side) -> int:
        return self.n_head_kv * self._d_head[side]

    def write(self, side: Side, cells: npt.ArrayLike, rows: npt.ArrayLike, n_threads: int = 1) -> None:
        """Write rows [n, n_head_kv * d_head] into cells [n]."""
        cell_ids = np.ascontiguousarray(cells, np.int64)
        data = np.ascontiguousarray(rows, np.float32)
        if data.shape != (len(cell_ids), self._n_embd(side)):
            raise from_status(lib.GEAR_ERROR_INVALID, f"rows must be [{len(cell_ids)}, {self._n_embd(side)}], not {list(data.shape)}")
        check(lib.gear_cache_write(self._cache, side_number(side), len(cell_ids), pointer(cell_ids, "int64_t *"), pointer(data, "float *"), n_threads))

    def read(self, side: Side, cell: int = 0, n: int | None = None) -> F16:
        """Rows of n consecutive cells (default: all from ``cell`` on) as f16 [n, n_head_kv * d_head]; cells never written are zero."""
        n = self.n_cell * self.n_stream - cell if n is None else n
        rows = np.empty((n, self._n_embd(side)), np.float16)
        check(lib.gear_cache_read(self._cache, side_number(side), cell, n, pointer(rows, "uint16_t *")))
        return rows

    def copy_stream(self, side: Side, source: int, target: int) -> None:
        """Copy all cells of one stream to another, tiles bit for bit."""
        check(lib.gear_cache_copy_stream(self._cache, side_number(side), source, target))

    def erase(self, side: Side, cell: int, n: int) -> None:
        """Make n consecutive cells unwritten."""
        check(lib.gear_cache_erase(self._cache, side_number(side), cell, n))

    def update(self, side: Side, marked: npt.ArrayLike, f: Callable[[F16, npt.NDArray[np.bool_]], npt.ArrayLike]) -> None:
        """Change rows in place, as a K-shift does.

        Args:
            marked: [n_stream * n_cell], true for the cells to change.
            f: given the rows of one tile, f16 [n_token, n_head_kv * d_head], and which are marked, bool [n_token]; returns them with those changed.
        """
        chosen = np.ascontiguousarray(np.asarray(marked) != 0, np.uint8)
        if chosen.shape != (self.n_cell * self.n_stream,):
            raise from_status(lib.GEAR_ERROR_INVALID, f"marked must be [{self.n_cell * self.n_stream}], not {list(chosen.shape)}")
        failures: list[BaseException] = []

        @ffi.callback("gear_rows_callback", onerror=lambda _, failure, __: failures.append(failure))  # type: ignore[untyped-decorator]
        def change(_: Any, cell: int, n_token: int, data: Any) -> None:
            n_embd = self._n_embd(side)
            rows = np.frombuffer(ffi.buffer(data, n_token * n_embd * 2), np.float16).reshape(n_token, n_embd)
            rows[:] = f(rows.copy(), chosen[cell : cell + n_token] != 0)

        check(lib.gear_cache_update(self._cache, side_number(side), pointer(chosen, "uint8_t *"), change, ffi.NULL))
        if failures:
            raise failures[0]

    def flush(self, side: Side, n_threads: int = 1) -> None:
        """Pack everything outside tail and sinks."""
        check(lib.gear_cache_flush(self._cache, side_number(side), n_threads))

    def clear(self) -> None:
        """Forget all cells."""
        check(lib.gear_cache_clear(self._cache))

    def stats(self, side: Side) -> dict[str, Any]:
        """The fields of ``gear_store_stats``."""
        stats = ffi.new("gear_store_stats *")
        check(lib.gear_cache_stats(self._cache, side_number(side), stats))
        return struct_to_dict(stats[0])

    def save(self, side: Side) -> bytes:
        """One side as sessions hold it, its tiles as they are."""
        pieces: list[bytes] = []

        @ffi.callback("gear_session_write", error=1)  # type: ignore[untyped-decorator]
        def write(_: Any, data: Any, n: int) -> int:
            pieces.append(bytes(ffi.buffer(data, n)))
            return 0

        check(lib.gear_cache_save(self._cache, side_number(side), write, ffi.NULL))
        return b"".join(pieces)

    def load(self, side: Side, saved: bytes, to: npt.ArrayLike | None = None) -> int:
        """Fill an empty side with what `save` gave.

        Args:
            to: [n_stream * n_cell] where each cell goes; None: where it was, bit for bit.

        Returns:
            Rows out of tiles that were coded again.

        Raises:
            DataError: ``saved`` is damaged, or of another cache.
            ConfigError: the cache is not empty, or two cells go to one.
        """
        targets = None if to is None else np.ascontiguousarray(to, np.int64)
        if targets is not None and targets.shape != (self.n_cell * self.n_stream,):
            raise from_status(lib.GEAR_ERROR_INVALID, f"to must be [{self.n_cell * self.n_stream}], not {list(targets.shape)}")

        @ffi.callback("gear_session_read", error=1)  # type: ignore[untyped-decorator]
        def read(_: Any, offset: int, data: Any, n: int) -> int:
            ffi.memmove(data, saved[offset : offset + n], n)
            return 0

        n_changed = ffi.new("int64_t *")
        check(lib.gear_cache_load(self._cache, side_number(side), len(saved), read, ffi.NULL, pointer(targets, "int64_t *"), n_changed))
        return int(n_changed[0])

    def attend(
        self,
        q: npt.ArrayLike,
        *,
        n_kv: int | None = None,
        mask: npt.ArrayLike | None = None,
        sinks: npt.ArrayLike | None = None,
        scale: float | None = None,
        max_bias: float = 0.0,
        softcap: float = 0.0,
        stream0: int = 0,
        n_threads: int = 1,
    ) -> F32:
        """softmax(softcap(q.K^T scale) + slope mask) V, as ggml's FLASH_ATTN_EXT defines it.

        Args:
            q: [n_stream, n_head, n_query, d_head_k] or, for one stream, [n_head, n_query, d_head_k]; n_head a multiple of n_head_kv.
            n_kv: cells looked at, from 0 (default: all).
            mask: [m_stream, m_head, n_query, n_kv] or fewer leading axes, added to the scores; None: everything is visible.
            sinks: [n_head].
            scale: default 1 / sqrt(d_head_k).

        Returns:
            f32 [n_stream, n_query, n_head, d_head_v], without the stream axis if q had none.
        """
        given = np.ascontiguousarray(q, np.float32)
        queries = given if given.ndim == 4 else given[None]
        n_stream, n_head, n_query, d_head_k = queries.shape
        n_kv = self.n_cell if n_kv is None else n_kv
        bias = None if mask is None else np.array(mask, np.float16, order="C", ndmin=4)
        if bias is not None and bias.shape[2:] != (n_query, n_kv):
            raise from_status(lib.GEAR_ERROR_INVALID, f"mask must end in [{n_query}, {n_kv}], not {list(bias.shape[2:])}")
        sink = None if sinks is None else np.ascontiguousarray(sinks, np.float32)
        out = np.empty((n_stream, n_query, n_head, self._d_head["v"]), np.float32)

        def strides(array: npt.NDArray[Any] | None, axes: Sequence[int]) -> list[int]:
            return [0] * len(axes) if array is None else [array.strides[axis] for axis in axes]

        params = ffi.new(
            "gear_attention_params *",
            {
                "n_query": n_query,
                "n_head": n_head,
                "n_kv": n_kv,
                "stream0": stream0,
                "n_stream": n_stream,
                "q": pointer(queries, "float *"),
                "q_stride": strides(queries, (2, 1, 0)),
                "mask": pointer(bias, "uint16_t *"),
                "mask_stride": strides(bias, (2, 1, 0)),
                "mask_n_head": 1 if bias is None else bias.shape[1],
                "mask_n_stream": 1 if bias is None else bias.shape[0],
                "sinks": pointer(sink, "float *"),
                "scale": d_head_k**-0.5 if scale is None else scale,
                "max_bias": max_bias,
                "softcap": softcap,
                "out": pointer(out, "float *"),
                "out_stride": strides(out, (2, 1, 0)),
            },
        )
        check(lib.gear_cache_attend(self._cache, params, n_threads))
        return out if given.ndim == 4 else out[0]
