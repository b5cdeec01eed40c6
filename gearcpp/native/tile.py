"""The codec on numpy arrays: a `GearConfig` as the library has it, and one tile of one head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Choice, GearConfig
from ..errors import from_status
from .library import F32, U8, Side, check, ffi, last_error, lib, pointer, side_number, struct_to_dict

_TILE_ALIGN = 64  # bytes, native/codec/tile.h

# ---------------------------------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------------------------------


def choice_number(choice: Choice) -> int:
    """The native library's number for GearConfig's ``rotate_k``, ``rotate_v`` and ``feedback_k``."""
    return 2 if choice == "auto" else int(choice)


def config_to_c(config: GearConfig) -> Any:
    """A ``gear_config *`` with the values of ``config``, not yet checked by the library."""
    shared = {"scale_bits": config.scale_bits, "factor_bits": config.factor_bits, "rounds": config.rounds, "sparsity": config.sparsity}
    sides = {
        side: {
            "bits": getattr(config, f"bits_{side}"),
            "group": getattr(config, f"group_{side}"),
            "rank": getattr(config, f"rank_{side}"),
            "rotate": choice_number(getattr(config, f"rotate_{side}")),
            "center": int(getattr(config, f"center_{side}")),
            "clip": getattr(config, f"clip_{side}"),
            "feedback": choice_number(config.feedback_k) if side == "k" else 0,
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


def side_bytes(config: GearConfig, il: int, heads: tuple[int, int, int], side: Side, n_cell: int, n_ubatch: int, n_stream: int = 1) -> tuple[int, int]:
    """What a side of a layer takes when llama.cpp makes it with so many cells, and what it becomes (gear_store_stats.kind). Nothing is made.

    Args:
        il: layer.
        heads: KV heads, channels of K's and of V's.
        n_ubatch: most rows of one write.
    """
    layer, kind = ffi.new("gear_layer *", (il, *heads)), ffi.new("int32_t *")
    n_bytes = lib.gear_side_bytes(config_to_c(config), layer, side_number(side), n_cell, n_stream, n_ubatch, kind)
    if n_bytes < 0:
        raise last_error()
    return int(n_bytes), int(kind[0])


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The codec: one tile of one head
# ---------------------------------------------------------------------------------------------------------------------------------------------


def _layout(config: GearConfig, side: Side, d_head: int) -> Any:
    layout = ffi.new("gear_tile_layout *")
    check(lib.gear_tile_describe(config_to_c(config), side_number(side), d_head, layout))
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


def tile_pack(
    config: GearConfig,
    side: Side,
    x: npt.ArrayLike,
    written: npt.ArrayLike | None = None,
    basis: npt.ArrayLike | None = None,
    query_moment: npt.ArrayLike | None = None,
) -> U8:
    """Pack the rows of one head.

    Args:
        x: [T, d_head], any float type; T is ``config.tile``.
        written: [T], true where the cell has a row; None: everywhere.
        basis: [d_head / 2] from `choose_basis`, with rotate "auto"; None: chosen by x.
        query_moment: [d_head, d_head], the mean of q q^T over queries of the head: keys are rounded for the error of scores. None: to the nearest code.

    Returns:
        The tile's bytes, u8 [``gear_tile_layout.bytes``], 64-byte aligned.
    """
    rows, mask = _rows_and_mask(config, x, written)
    d_head = rows.shape[1]
    tile = _empty_tile(_layout(config, side, d_head).bytes)
    arguments = (config_to_c(config), side_number(side), d_head, pointer(rows, "float *"), pointer(mask, "uint8_t *"))
    if query_moment is not None:
        weights = None if basis is None else _vector(basis, np.uint8, d_head // 2, "basis")
        moment = np.ascontiguousarray(query_moment, np.float64)
        if moment.shape != (d_head, d_head):
            raise from_status(lib.GEAR_ERROR_INVALID, f"query_moment must be [{d_head}, {d_head}], not {list(moment.shape)}")
        check(lib.gear_tile_pack_for_queries(*arguments, pointer(weights, "uint8_t *"), pointer(moment, "double *"), pointer(tile, "void *")))
    elif basis is None:
        check(lib.gear_tile_pack(*arguments, pointer(tile, "void *")))
    else:
        weights = _vector(basis, np.uint8, d_head // 2, "basis")
        check(lib.gear_tile_pack_in_basis(*arguments, pointer(weights, "uint8_t *"), pointer(tile, "void *")))
    return tile


def choose_basis(config: GearConfig, side: Side, x: npt.ArrayLike, written: npt.ArrayLike | None = None, query_square: npt.ArrayLike | None = None) -> U8:
    """The channels' weights that rotate "auto" gives to a head of such rows.

    Args:
        x, written: as `tile_pack` takes them.
        query_square: [d_head], the mean square of each channel of the head's queries; None: not known.

    Returns:
        u8 [d_head / 2], 4 bits a channel (native/codec/basis.h).
    """
    rows, mask = _rows_and_mask(config, x, written)
    d_head = rows.shape[1]
    square = None if query_square is None else _vector(query_square, np.float64, d_head, "query_square")
    basis = np.zeros(max(1, d_head // 2), np.uint8)
    arguments = (config_to_c(config), side_number(side), d_head, pointer(rows, "float *"), pointer(mask, "uint8_t *"))
    check(lib.gear_basis_choose(*arguments, pointer(square, "double *"), pointer(basis, "uint8_t *")))
    return basis


def _vector(values: npt.ArrayLike, dtype: type, n: int, name: str) -> npt.NDArray[Any]:
    vector: npt.NDArray[Any] = np.ascontiguousarray(values, dtype)
    if vector.shape != (n,):
        raise from_status(lib.GEAR_ERROR_INVALID, f"{name} must be [{n}], not {list(vector.shape)}")
    return vector


def _rows_and_mask(config: GearConfig, x: npt.ArrayLike, written: npt.ArrayLike | None) -> tuple[F32, U8 | None]:
    rows = np.ascontiguousarray(x, np.float32)
    if rows.ndim != 2 or rows.shape[0] != config.tile:
        raise from_status(lib.GEAR_ERROR_INVALID, f"x must be [{config.tile}, d_head], not {list(rows.shape)}")
    mask = None if written is None else np.ascontiguousarray(np.asarray(written) != 0, np.uint8)
    if mask is not None and mask.shape != (config.tile,):
        raise from_status(lib.GEAR_ERROR_INVALID, f"written must be [{config.tile}], not {list(mask.shape)}")
    return rows, mask


def tile_unpack(config: GearConfig, side: Side, d_head: int, tile: U8) -> F32:
    """X^ = M + D + L with S restored exactly: f32 [T, d_head]."""
    tile = _aligned(tile, _layout(config, side, d_head).bytes)
    x = np.empty((config.tile, d_head), np.float32)
    check(lib.gear_tile_unpack(config_to_c(config), side_number(side), d_head, pointer(tile, "void *"), pointer(x, "float *")))
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
        outlier_index: i32 [n_vector, n_outlier], index within the vector.
        basis: u8 [d / 2], the channels' weights with rotate "auto", else [0].
    """

    codes: U8
    scale: F32
    zero: F32
    a: F32
    b: F32
    mean: F32
    outlier_value: F32
    outlier_index: npt.NDArray[np.int32]
    basis: U8


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
        basis=tile[layout.basis : layout.basis + d_head // 2].copy() if layout.basis >= 0 else np.zeros(0, np.uint8),
    )
    check(
        lib.gear_tile_parts(
            config_to_c(config),
            side_number(side),
            d_head,
            pointer(tile, "void *"),
            pointer(parts.codes, "uint8_t *"),
            pointer(parts.scale, "float *"),
            pointer(parts.zero, "float *"),
            pointer(parts.a, "float *"),
            pointer(parts.b, "float *"),
            pointer(parts.mean, "float *"),
            pointer(parts.outlier_value, "float *"),
            pointer(parts.outlier_index, "int32_t *"),
        )
    )
    return parts
