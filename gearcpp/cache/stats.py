"""What a KV cache holds and costs, in the same form for GEAR and for llama.cpp's own types: the result of `Llama.kv_stats`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..model_info import KVLayer, ModelInfo
from .allocation import KIND_OF_CODEC, Allocation, allocated, describe, group_layers, is_lost, kind_of, state_bytes, unpackable_heads
from .kv_type import KVType
from .python_codec import CountedCodec

ERRORS = ("error", "score_error", "worst_error", "worst_head")  # of gear_store_stats; None: nothing is known
_SUMS = ("n_elements", "n_written", "n_packed", "n_exact", "n_pack", "bytes", "bytes_used", "bytes_tiles", "bytes_exact", "bytes_tables", "bytes_f16")


def gear_layers(
    stores: Iterable[dict[str, Any]],
    kv: KVType,
    info: ModelInfo,
    allocation: Allocation,
    *,
    codec: CountedCodec | None = None,
    operation: Callable[[int], str] = lambda il: "",
) -> list[dict[str, Any]]:
    """One entry for each store, from the fields of ``gear_store_stats``.

    Args:
        codec: the Python codec, if one coded the tiles.
        operation: which operation that GEAR does not cover is used on a layer's cache, "" for none.
    """
    by_il = {layer.il: layer for layer in info.layers}
    heads = {il: unpackable_heads(kv, info, layer) for il, layer in by_il.items()}
    return [
        {
            **store,
            "side": "kv"[store["side"]],
            "kind": KIND_OF_CODEC
            if codec and store["kind"] == 0
            else kind_of(store["kind"], by_il.get(il), allocation, heads.get(il, ""), operation(il) if store["kind"] == 2 else ""),
            "n_elements": store["n_cell"] * store["n_stream"] * store["n_head_kv"] * store["d_head"],
            "bytes": store["bytes_tiles"] + store["bytes_exact"] + store["bytes_tables"],
            "bytes_used": store["bytes_tiles_used"] + store["bytes_exact"] + store["bytes_tables"],
            **_errors(store),
            "stays_exact": bool(store["stays_exact"]),
            **(_codec_figures(store, codec) if codec else {}),
        }
        for store in sorted(stores, key=lambda store: (store["il"], store["side"]))
        for il in [store["il"]]
    ]


def _errors(store: dict[str, Any]) -> dict[str, Any]:
    """What packing did to a store's rows, by the fields of ERRORS."""
    if store["worst_head"] < 0:
        return dict.fromkeys(ERRORS)
    return {name: None if math.isnan(store[name]) else store[name] for name in ERRORS}


def worst(layers: Iterable[dict[str, Any]], side: str) -> dict[str, Any] | None:
    """The entry of `gear_layers` for this side whose worst head is furthest off; None: nothing is known."""
    known = [layer for layer in layers if layer["side"] == side and layer["worst_error"] is not None]
    return max(known, key=lambda layer: layer["worst_error"], default=None)


def _root_mean_square(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.sqrt(sum(value * value for value in known) / len(known)) if known else None


def _codec_figures(store: dict[str, Any], codec: CountedCodec) -> dict[str, float]:
    """What a codec in Python would store for the rows of a store that are packed now: the mean of the tiles that it coded there so far."""
    if not store["n_packed"]:
        return {"codec_bits_per_element": math.nan, "codec_bytes": 0.0}
    bits = codec.bits_per_element(store["il"], "kv"[store["side"]])
    return {"codec_bits_per_element": bits, "codec_bytes": bits / 8 * store["n_packed"] * store["n_head_kv"] * store["d_head"]}


def seen_in(stores: Iterable[dict[str, Any]]) -> tuple[ModelInfo, Allocation]:
    """A model whose metadata are not at hand, as far as its stores show it: layers with fewer cells than others have a window."""
    sides = {(store["il"], store["side"]): store for store in stores}
    n_ctx = max((store["n_cell"] for store in sides.values()), default=0)
    layers = tuple(
        KVLayer(il, k["n_head_kv"], k["d_head"], v["d_head"], window=0 if k["n_cell"] == n_ctx else k["n_cell"])
        for il in sorted({il for il, _ in sides})
        for k in [sides.get((il, 0), sides.get((il, 1), {}))]
        for v in [sides.get((il, 1), k)]
    )
    return ModelInfo(Path(), (), "", {}, len(layers), 0, n_ctx, 0, 0, layers), Allocation(n_ctx)


def llama_layers(kv: KVType, info: ModelInfo, allocation: Allocation, n_written: int) -> list[dict[str, Any]]:
    """The same for a cache of llama.cpp's own types, computed, since llama.cpp has no call for it. Assumes one stream."""
    by_il = {layer.il: layer for layer in info.layers}
    return [
        {
            "il": side.il,
            "side": side.side,
            "kind": side.kind,
            "n_head_kv": layer.n_head_kv,
            "d_head": layer.d_head_k if side.side == "k" else layer.d_head_v,
            "n_stream": 1,
            "n_cell": side.n_cell,
            "n_written": min(n_written, side.n_cell),
            "n_packed": 0,
            "n_exact": min(n_written, side.n_cell),
            "n_pack": 0,
            "n_elements": side.f16_bytes // 2,
            "bytes": side.n_bytes,
            "bytes_used": side.n_bytes,
            "bytes_tiles": 0,
            "bytes_exact": side.n_bytes,
            "bytes_tables": 0,
            "bytes_f16": side.f16_bytes,
            "bits_per_element": side.bits_per_element,
            **dict.fromkeys(ERRORS),
            "stays_exact": False,
        }
        for side in allocated(kv, info, allocation)
        for layer in [by_il[side.il]]
    ]


def summarize(kv: KVType, layers: list[dict[str, Any]], scratch_bytes: int, info: ModelInfo, allocation: Allocation) -> dict[str, Any]:
    """The whole of `Llama.kv_stats` (described there)."""
    groups = group_layers([(layer["il"], layer["kind"], layer["bytes"]) for layer in layers], info, allocation)
    total: dict[str, Any] = {name: sum(layer[name] for layer in layers) for name in _SUMS}
    n_elements = total["n_elements"] or 1
    total["bits_per_element"] = sum(layer["bits_per_element"] * layer["n_elements"] for layer in layers) / n_elements
    total["bits_per_element_all"] = total["bytes"] * 8 / n_elements
    total["packed_share"] = total["n_packed"] / max(total["n_written"], 1)
    total["scratch_bytes"] = scratch_bytes
    total["score_error"] = _root_mean_square(layer["score_error"] for layer in layers)
    total["value_error"] = _root_mean_square(layer["error"] for layer in layers if layer["side"] == "v")
    total["n_stay_exact"] = sum(layer["stays_exact"] for layer in layers)
    if any("codec_bytes" in layer for layer in layers):
        n_coded = sum(layer["n_packed"] * layer["n_head_kv"] * layer["d_head"] for layer in layers)
        total["codec_bytes"] = sum(layer["codec_bytes"] for layer in layers)
        total["codec_bits_per_element"] = 8 * total["codec_bytes"] / n_coded if n_coded else math.nan
    total["state_bytes"] = state_bytes(info, allocation) if layers else 0
    total["growth_share_lost"] = sum(group.growth_share for group in groups if is_lost(group))
    return {"kv_type": kv.name, "total": total, "groups": [group.to_dict() for group in groups], "summary": describe(groups), "layers": layers}
