"""The native library seen from Python: loading it, its errors, and its calls on numpy arrays.

``lib`` and ``ffi`` are cffi's (the declarations come from native/include/gearcpp.h at build time). Everything that fails raises the exception of
`gearcpp.errors` that belongs to its status, with the library's own message.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .config import GearConfig
from .errors import AbiError, GearError, from_status

Side = Literal["k", "v"]
F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]
U8 = npt.NDArray[np.uint8]

_TILE_ALIGN = 64  # bytes, native/codec/tile.h
_files = ExitStack()  # keeps a library that had to be unpacked from a zip until the process ends


def library_path() -> Path:
    """The native library, which is also the plugin for ``GGML_BACKEND_PATH``.

    Found through the import system, because an editable install keeps it apart from the Python sources.

    Raises:
        AbiError: it is not there, or cut off.
    """
    name = "libgearcpp.dylib" if sys.platform == "darwin" else "libgearcpp.so"
    for folder in (resources.files("gearcpp"), *map(Path, sys.modules["gearcpp"].__path__)):
        if (folder / name).is_file():
            path = _files.enter_context(resources.as_file(folder / name))
            if _is_cut_off(path):
                raise AbiError(f"the native library {path} is cut off; install gearcpp again: pip install --force-reinstall --no-deps gearcpp")
            return path
    raise AbiError(f"the native library {name} is missing from the gearcpp package; install it again: pip install --force-reinstall --no-deps gearcpp")


def _is_cut_off(path: Path) -> bool:
    """Whether a library lacks its end. Of an ELF file that is the table of sections: the system's loader, which does not look, would die of it."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return True
    if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return False
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, n = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + size * n


def _load() -> tuple[Any, Any]:
    try:
        from ._binding import ffi
    except ImportError as error:
        raise AbiError("gearcpp was not built (gearcpp/_binding.py is missing); install it with pip install .") from error
    path = library_path()
    try:
        return ffi, ffi.dlopen(str(path))
    except OSError as error:
        raise AbiError(f"the native library {path} cannot be loaded: {error}") from error


ffi, lib = _load()


def text(pointer: Any) -> str:
    """A C string as str."""
    return ffi.string(pointer).decode("utf-8", "replace")


def last_error() -> GearError:
    """The exception for this thread's last failed call."""
    return from_status(lib.gear_last_status(), text(lib.gear_last_error()))


def check(status: int) -> None:
    """Raise the exception that belongs to a gear_status, unless it is GEAR_OK."""
    if status != lib.GEAR_OK:
        raise last_error()


def open_ggml() -> None:
    """Bind the native library to the ggml that llama-cpp-python has loaded, and have it prove that ggml's structures are as it expects.

    The handle of libllama leads to exactly that ggml; loading any file of llama_cpp/lib by its path would load a second one.

    Raises:
        AbiError: llama-cpp-python is missing, or its ggml is laid out differently.
    """
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise AbiError(f"llama-cpp-python cannot be imported: {error}") from error
    check(lib.gear_open(ffi.cast("void *", llama_cpp._lib._handle)))


def default_devices() -> tuple[str, ...]:
    """ggml's devices that a GEAR cache is put on: the CPU, or all CUDA devices where GEARCPP_CUDA=1 asks for them. Opens ggml.

    Raises:
        UnsupportedError: the library of CUDA kernels that the environment names cannot be used.
    """
    open_ggml()
    names = text(lib.gear_default_devices())
    if not names:
        raise last_error()
    return tuple(names.split(","))


def versions() -> dict[str, str]:
    """Versions of everything that takes part: gearcpp's library, llama-cpp-python, ggml and its commit. Opens ggml."""
    import llama_cpp

    open_ggml()
    return {
        "gearcpp": text(lib.gear_version()),
        "llama_cpp_python": llama_cpp.__version__,
        "ggml": text(lib.gear_ggml_version()),
        "ggml_commit": text(lib.gear_ggml_commit()),
    }


def available_memory() -> int:
    """Bytes that new allocations can have without swapping."""
    return int(lib.gear_available_memory())


def simd_levels() -> list[str]:
    """Kernel levels that this machine can run, best first."""
    levels: list[str] = []
    while (name := lib.gear_simd_name(len(levels))) != ffi.NULL:
        levels.append(text(name))
    return levels


def simd_level() -> str:
    """The kernel level in use."""
    return text(lib.gear_simd_current())


def select_simd(name: str | None) -> None:
    """Use a kernel level by name for the whole process; None: the best. ConfigError when this machine cannot run it."""
    check(lib.gear_simd_select(name.encode() if name else ffi.NULL))


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------------------------------


def config_to_c(config: GearConfig) -> Any:
    """A ``gear_config *`` with the values of ``config``, not yet checked by the library."""
    shared = {"scale_bits": config.scale_bits, "factor_bits": config.factor_bits, "rounds": config.rounds, "sparsity": config.sparsity}
    sides = {
        side: {
            "bits": getattr(config, f"bits_{side}"),
            "group": getattr(config, f"group_{side}"),
            "rank": getattr(config, f"rank_{side}"),
            "rotate": int(getattr(config, f"rotate_{side}")),
            "center": int(getattr(config, f"center_{side}")),
            "clip": getattr(config, f"clip_{side}"),
            **shared,
        }
        for side in ("k", "v")
    }
    return ffi.new("gear_config *", {**sides, "tile": config.tile, "n_tail": config.n_tail, "n_sink": config.n_sink, "seed": config.seed})


def check_config(config: GearConfig) -> None:
    """Raise ConfigError when the library would not take this configuration."""
    check(lib.gear_config_check(config_to_c(config)))


def check_heads(config: GearConfig, d_head_k: int, d_head_v: int) -> None:
    """Raise UnsupportedError when heads of these sizes cannot be packed."""
    check(lib.gear_head_check(config_to_c(config), d_head_k, d_head_v))


def _side_number(side: Side) -> int:
    return {"k": lib.GEAR_SIDE_K, "v": lib.GEAR_SIDE_V}[side]


def struct_to_dict(struct: Any) -> dict[str, Any]:
    """The fields of a C struct by name; arrays become lists."""
    return {name: list(value) if isinstance(value := getattr(struct, name), ffi.CData) else value for name, _ in ffi.typeof(struct).fields}


def _pointer(array: npt.NDArray[Any] | None, c_type: str) -> Any:
    return ffi.NULL if array is None else ffi.cast(c_type, array.ctypes.data)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The codec: one tile of one head
# ---------------------------------------------------------------------------------------------------------------------------------------------


def _layout(config: GearConfig, side: Side, d_head: int) -> Any:
    layout = ffi.new("gear_tile_layout *")
    check(lib.gear_tile_describe(config_to_c(config), _side_number(side), d_head, layout))
    return layout[0]


def tile_describe(config: GearConfig, side: Side, d_head: int) -> dict[str, Any]:
    """Where the parts of a packed tile lie and how many there are: the fields of ``gear_tile_layout``.

    Raises:
        ConfigError: the configuration is out of range.
        UnsupportedError: the head size is.
    """
    return struct_to_dict(_layout(config, side, d_head))


def bits_per_element(config: GearConfig, side: Side, d_head: int) -> float:
    """Bits that a packed tile takes for each of its numbers, everything in it counted; 16 for a side kept as f16."""
    if getattr(config, f"bits_{side}") == 16:
        return 16.0
    return _layout(config, side, d_head).bytes * 8 / (config.tile * d_head)


def _empty_tile(n_bytes: int) -> U8:
    memory = np.zeros(n_bytes + _TILE_ALIGN, np.uint8)
    start = -memory.ctypes.data % _TILE_ALIGN
    return memory[start : start + n_bytes]


def _aligned(tile: U8, n_bytes: int) -> U8:
    if tile.size != n_bytes:
        raise from_status(lib.GEAR_ERROR_DATA, f"this tile has {tile.size} bytes; with this configuration and head size it should have {n_bytes}")
    if tile.ctypes.data % _TILE_ALIGN == 0 and tile.flags.c_contiguous and tile.dtype == np.uint8:
        return tile
    copy = _empty_tile(n_bytes)
    copy[:] = tile
    return copy


def tile_pack(config: GearConfig, side: Side, x: npt.ArrayLike, written: npt.ArrayLike | None = None) -> U8:
    """Pack the rows of one head.

    Args:
        x: [T, d_head], any float type; T is ``config.tile``.
        written: [T], true where the cell has a row; None: everywhere.

    Returns:
        The tile's bytes, u8 [``gear_tile_layout.bytes``], 64-byte aligned.
    """
    rows = np.ascontiguousarray(x, np.float32)
    if rows.ndim != 2 or rows.shape[0] != config.tile:
        raise from_status(lib.GEAR_ERROR_INVALID, f"x must be [{config.tile}, d_head], not {list(rows.shape)}")
    mask = None if written is None else np.ascontiguousarray(np.asarray(written) != 0, np.uint8)
    if mask is not None and mask.shape != (config.tile,):
        raise from_status(lib.GEAR_ERROR_INVALID, f"written must be [{config.tile}], not {list(mask.shape)}")
    d_head = rows.shape[1]
    tile = _empty_tile(_layout(config, side, d_head).bytes)
    check(
        lib.gear_tile_pack(
            config_to_c(config), _side_number(side), d_head, _pointer(rows, "float *"), _pointer(mask, "uint8_t *"), _pointer(tile, "void *")
        )
    )
    return tile


def tile_unpack(config: GearConfig, side: Side, d_head: int, tile: U8) -> F32:
    """X^ = M + D + L with S restored exactly: f32 [T, d_head]."""
    tile = _aligned(tile, _layout(config, side, d_head).bytes)
    x = np.empty((config.tile, d_head), np.float32)
    check(lib.gear_tile_unpack(config_to_c(config), _side_number(side), d_head, _pointer(tile, "void *"), _pointer(x, "float *")))
    return x


@dataclass(frozen=True)
class TileParts:
    """The parts of a packed tile as plain numbers.

    Attributes:
        codes: u8 [T, d].
        scale, zero: f32 [n_group]; index of a group: K: token // group * d + channel, V: channel // group * T + token.
        a: f32 [T, r], with the scale of each column in it.
        b: f32 [d, r].
        mean: f32 [d], zeros without ``center``.
        outlier_value: f32 [n_vector, n_outlier]; vectors are the channels of K and the tokens of V.
        outlier_index: i32 [n_vector, n_outlier], place within the vector.
    """

    codes: U8
    scale: F32
    zero: F32
    a: F32
    b: F32
    mean: F32
    outlier_value: F32
    outlier_index: npt.NDArray[np.int32]


def tile_parts(config: GearConfig, side: Side, d_head: int, tile: U8) -> TileParts:
    """Take a packed tile apart (for tests and the torch reference)."""
    layout = _layout(config, side, d_head)
    tile = _aligned(tile, layout.bytes)
    rank = getattr(config, f"rank_{side}")
    parts = TileParts(
        codes=np.zeros((config.tile, d_head), np.uint8),
        scale=np.zeros(layout.n_group, np.float32),
        zero=np.zeros(layout.n_group, np.float32),
        a=np.zeros((config.tile, rank), np.float32),
        b=np.zeros((d_head, rank), np.float32),
        mean=np.zeros(d_head, np.float32),
        outlier_value=np.zeros((layout.n_vector, layout.n_outlier), np.float32),
        outlier_index=np.zeros((layout.n_vector, layout.n_outlier), np.int32),
    )
    check(
        lib.gear_tile_parts(
            config_to_c(config),
            _side_number(side),
            d_head,
            _pointer(tile, "void *"),
            _pointer(parts.codes, "uint8_t *"),
            _pointer(parts.scale, "float *"),
            _pointer(parts.zero, "float *"),
            _pointer(parts.a, "float *"),
            _pointer(parts.b, "float *"),
            _pointer(parts.mean, "float *"),
            _pointer(parts.outlier_value, "float *"),
            _pointer(parts.outlier_index, "int32_t *"),
        )
    )
    return parts


# ---------------------------------------------------------------------------------------------------------------------------------------------
# One layer's cache
# ---------------------------------------------------------------------------------------------------------------------------------------------


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
        places = np.ascontiguousarray(cells, np.int64)
        data = np.ascontiguousarray(rows, np.float32)
        if data.shape != (len(places), self._n_embd(side)):
            raise from_status(lib.GEAR_ERROR_INVALID, f"rows must be [{len(places)}, {self._n_embd(side)}], not {list(data.shape)}")
        check(lib.gear_cache_write(self._cache, _side_number(side), len(places), _pointer(places, "int64_t *"), _pointer(data, "float *"), n_threads))

    def read(self, side: Side, cell: int = 0, n: int | None = None) -> F16:
        """Rows of n consecutive cells (default: all from ``cell`` on) as f16 [n, n_head_kv * d_head]; cells never written are zero."""
        n = self.n_cell * self.n_stream - cell if n is None else n
        rows = np.empty((n, self._n_embd(side)), np.float16)
        check(lib.gear_cache_read(self._cache, _side_number(side), cell, n, _pointer(rows, "uint16_t *")))
        return rows

    def copy_stream(self, side: Side, source: int, target: int) -> None:
        """Copy all cells of one stream to another, tiles bit for bit."""
        check(lib.gear_cache_copy_stream(self._cache, _side_number(side), source, target))

    def erase(self, side: Side, cell: int, n: int) -> None:
        """Make n consecutive cells unwritten."""
        check(lib.gear_cache_erase(self._cache, _side_number(side), cell, n))

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

        check(lib.gear_cache_update(self._cache, _side_number(side), _pointer(chosen, "uint8_t *"), change, ffi.NULL))
        if failures:
            raise failures[0]

    def flush(self, side: Side, n_threads: int = 1) -> None:
        """Pack everything outside tail and sinks."""
        check(lib.gear_cache_flush(self._cache, _side_number(side), n_threads))

    def clear(self) -> None:
        """Forget all cells."""
        check(lib.gear_cache_clear(self._cache))

    def stats(self, side: Side) -> dict[str, Any]:
        """The fields of ``gear_store_stats``."""
        stats = ffi.new("gear_store_stats *")
        check(lib.gear_cache_stats(self._cache, _side_number(side), stats))
        return struct_to_dict(stats[0])

    def save(self, side: Side) -> bytes:
        """One side as sessions hold it, its tiles as they are."""
        pieces: list[bytes] = []

        @ffi.callback("gear_session_write", error=1)  # type: ignore[untyped-decorator]
        def write(_: Any, data: Any, n: int) -> int:
            pieces.append(bytes(ffi.buffer(data, n)))
            return 0

        check(lib.gear_cache_save(self._cache, _side_number(side), write, ffi.NULL))
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
        places = None if to is None else np.ascontiguousarray(to, np.int64)
        if places is not None and places.shape != (self.n_cell * self.n_stream,):
            raise from_status(lib.GEAR_ERROR_INVALID, f"to must be [{self.n_cell * self.n_stream}], not {list(places.shape)}")

        @ffi.callback("gear_session_read", error=1)  # type: ignore[untyped-decorator]
        def read(_: Any, offset: int, data: Any, n: int) -> int:
            ffi.memmove(data, saved[offset : offset + n], n)
            return 0

        n_changed = ffi.new("int64_t *")
        check(lib.gear_cache_load(self._cache, _side_number(side), len(saved), read, ffi.NULL, _pointer(places, "int64_t *"), n_changed))
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
                "q": _pointer(queries, "float *"),
                "q_stride": strides(queries, (2, 1, 0)),
                "mask": _pointer(bias, "uint16_t *"),
                "mask_stride": strides(bias, (2, 1, 0)),
                "mask_n_head": 1 if bias is None else bias.shape[1],
                "mask_n_stream": 1 if bias is None else bias.shape[0],
                "sinks": _pointer(sink, "float *"),
                "scale": d_head_k**-0.5 if scale is None else scale,
                "max_bias": max_bias,
                "softcap": softcap,
                "out": _pointer(out, "float *"),
                "out_stride": strides(out, (2, 1, 0)),
            },
        )
        check(lib.gear_cache_attend(self._cache, params, n_threads))
        return out if given.ndim == 4 else out[0]
