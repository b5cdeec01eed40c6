"""What a KV cache holds and costs, in the same form for GEAR and for llama.cpp's own types: the result of `Llama.kv_stats`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .. import native
from ..errors import UnsupportedError
from ..model_info import KVLayer
from .kv_type import KVType
from .python_codec import CountedCodec

# gear_store_stats.kind
KIND_OF_CODEC = "codec in Python: tiles kept as f16, no memory saved"
KINDS = ("gear", "f16: window too small to gain", "f16: used by operations that GEAR does not cover", "f16: asked for")
# Bits per number of llama.cpp's own types: block bytes * 8 / block length (ggml-common.h).
LLAMA_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5}

_CELL_BYTES = 40  # position, shift and set of sequences of a cell (llama-kv-cells.h)
_SUMS = ("n_elements", "n_written", "n_packed", "n_exact", "n_pack", "bytes", "bytes_used", "bytes_tiles", "bytes_exact", "bytes_tables", "bytes_f16")


def gear_layers(stores: Iterable[dict[str, Any]], codec: CountedCodec | None = None) -> list[dict[str, Any]]:
    """One entry for each store, from the fields of ``gear_store_stats``; ``codec``: the Python codec, if one coded the tiles."""
    return [
        {
            **store,
            "side": "kv"[store["side"]],
            "kind": KIND_OF_CODEC if codec and store["kind"] == 0 else KINDS[store["kind"]],
            "n_elements": store["n_cell"] * store["n_stream"] * store["n_head_kv"] * store["d_head"],
            "bytes": store["bytes_tiles"] + store["bytes_exact"] + store["bytes_tables"],
            "bytes_used": store["bytes_tiles_used"] + store["bytes_exact"] + store["bytes_tables"],
            **(_codec_figures(store, codec) if codec else {}),
        }
        for store in stores
    ]


def _codec_figures(store: dict[str, Any], codec: CountedCodec) -> dict[str, float]:
    """What a codec in Python would store for the rows of a store that are packed now: the mean of the tiles that it coded there so far."""
    if not store["n_packed"]:
        return {"codec_bits_per_element": math.nan, "codec_bytes": 0.0}
    bits = codec.bits_per_element(store["il"], "kv"[store["side"]])
    return {"codec_bits_per_element": bits, "codec_bytes": bits / 8 * store["n_packed"] * store["n_head_kv"] * store["d_head"]}


def llama_layers(kv: KVType, layers: Sequence[KVLayer], n_cell: int, n_written: int) -> list[dict[str, Any]]:
    """The same for a cache of llama.cpp's own types, computed, since llama.cpp has no call for it. Assumes a full-size cache of one stream."""
    return [
        {
            "il": layer.il,
            "side": side,
            "kind": cache_type,
            "n_head_kv": layer.n_head_kv,
            "d_head": d_head,
            "n_stream": 1,
            "n_cell": n_cell,
            "n_written": n_written,
            "n_packed": 0,
            "n_exact": n_written,
            "n_pack": 0,
            "n_elements": n_elements,
            "bytes": n_bytes,
            "bytes_used": n_bytes,
            "bytes_tiles": 0,
            "bytes_exact": n_bytes,
            "bytes_tables": 0,
            "bytes_f16": n_elements * 2,
            "bits_per_element": LLAMA_BITS[cache_type],
        }
        for layer in layers
        for side, d_head, cache_type in (("k", layer.d_head_k, kv.type_k), ("v", layer.d_head_v, kv.type_v))
        if d_head
        for n_elements in [n_cell * layer.n_head_kv * d_head]
        for n_bytes in [int(n_elements * LLAMA_BITS[cache_type] / 8)]
    ]


def cache_bytes(kv: KVType, layers: Sequence[KVLayer], n_ctx: int) -> int:
    """Memory that a cache for ``n_ctx`` tokens takes at least: codes or blocks, and llama.cpp's own table of cells."""
    bits_per_cell = sum(
        layer.n_head_kv * (layer.d_head_k * _bits(kv, "k", layer.d_head_k) + layer.d_head_v * _bits(kv, "v", layer.d_head_v)) for layer in layers
    )
    return n_ctx * (_CELL_BYTES + math.ceil(bits_per_cell / 8))


def _bits(kv: KVType, side: native.Side, d_head: int) -> float:
    if kv.method:
        return 16.0  # what it returns is kept as f16
    if not kv.gear:
        return LLAMA_BITS[kv.type_k if side == "k" else kv.type_v]
    try:
        return native.bits_per_element(kv.gear, side, d_head)
    except UnsupportedError:
        return 16.0  # heads that cannot be packed stay f16


def summarize(kv: KVType, layers: list[dict[str, Any]], scratch_bytes: int) -> dict[str, Any]:
    """The whole of `Llama.kv_stats` (described there)."""
    total: dict[str, Any] = {name: sum(layer[name] for layer in layers) for name in _SUMS}
    n_elements = total["n_elements"] or 1
    total["bits_per_element"] = sum(layer["bits_per_element"] * layer["n_elements"] for layer in layers) / n_elements
    total["bits_per_element_all"] = total["bytes"] * 8 / n_elements
    total["packed_share"] = total["n_packed"] / max(total["n_written"], 1)
    total["scratch_bytes"] = scratch_bytes
    if any("codec_bytes" in layer for layer in layers):
        n_coded = sum(layer["n_packed"] * layer["n_head_kv"] * layer["d_head"] for layer in layers)
        total["codec_bytes"] = sum(layer["codec_bytes"] for layer in layers)
        total["codec_bits_per_element"] = 8 * total["codec_bytes"] / n_coded if n_coded else math.nan
    return {"kv_type": kv.name, "total": total, "layers": layers}
