"""The native library seen from Python.

Everything that fails raises the exception of `gearcpp.errors` that belongs to its status, with the library's own message.
"""

from __future__ import annotations

from .cache import Cache
from .library import (
    F16,
    F32,
    U8,
    Side,
    available_memory,
    check,
    default_devices,
    ffi,
    last_error,
    lib,
    library_path,
    open_ggml,
    select_simd,
    simd_level,
    simd_levels,
    struct_to_dict,
    text,
    versions,
)
from .tile import (
    TileParts,
    bits_per_element,
    check_config,
    check_heads,
    choose_basis,
    config_to_c,
    side_bytes,
    tile_describe,
    tile_pack,
    tile_parts,
    tile_unpack,
)

__all__ = [
    "F16",
    "F32",
    "U8",
    "Cache",
    "Side",
    "TileParts",
    "available_memory",
    "bits_per_element",
    "check",
    "check_config",
    "check_heads",
    "choose_basis",
    "config_to_c",
    "default_devices",
    "ffi",
    "last_error",
    "lib",
    "library_path",
    "open_ggml",
    "select_simd",
    "side_bytes",
    "simd_level",
    "simd_levels",
    "struct_to_dict",
    "text",
    "tile_describe",
    "tile_pack",
    "tile_parts",
    "tile_unpack",
    "versions",
]
