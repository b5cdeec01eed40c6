"""What llama.cpp allocates for a model's memory, told from the metadata: cells of each layer, what it becomes, and what that takes.

After llama_kv_cache_iswa, llama_kv_cache and llama_memory_recurrent, as llama-cpp-python 0.3.36 has them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import native
from ..errors import UnsupportedError
from ..model_info import KVLayer, ModelInfo
from .kv_type import KVType

# Bits per number of llama.cpp's own types: block bytes * 8 / block length (ggml-common.h).
LLAMA_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5}

GEAR = "gear"
KIND_OF_CODEC = "codec in Python: tiles kept as f16, no memory saved"
SMALL_WINDOW = "f16: window too small to gain"
SMALL_CONTEXT = "f16: context too small to gain"
OTHER_USE = "f16: used by operations that GEAR does not cover"
ASKED = "f16: asked for"
RECURRENT = "recurrent state"
SHARED = "reads another layer's cache"

_UBATCH, _WINDOW_UBATCH = 512, 256  # tokens of a step: llama.cpp's default, and ours where it decides how many cells a window has
_CELL_BYTES = 40  # position, shift and set of sequences of a cell (llama-kv-cells.h)
_PADDING = 256  # of a context, and of a window's cells


@dataclass(frozen=True)
class Allocation:
    """How llama.cpp is asked to make a model's memory.

    Attributes:
        n_ctx: tokens of the context.
        n_ubatch: most tokens of one step.
        n_seq: most sequences, which share the cells.
        swa_full: sliding windows get as many cells as the context, instead of the window's and those of a step.
    """

    n_ctx: int
    n_ubatch: int = 512
    n_seq: int = 1
    swa_full: bool = False

    def cells(self, layer: KVLayer) -> int:
        """Cells of a layer's cache."""
        n_ctx = _padded(self.n_ctx)
        return _padded(min(n_ctx, layer.window * self.n_seq + self.n_ubatch)) if self.is_window(layer) else n_ctx

    def is_window(self, layer: KVLayer) -> bool:
        """Whether a longer context makes this layer's cache no longer."""
        return layer.window > 0 and not self.swa_full


def default_ubatch(info: ModelInfo, *, swa_full: bool) -> int:
    """Tokens of a step where the user does not say: fewer with sliding windows, whose cells are those of the window and of a step (docs/memory.md)."""
    return _WINDOW_UBATCH if not swa_full and any(layer.window for layer in info.cached_layers) else _UBATCH


def _padded(n: int) -> int:
    return -(-n // _PADDING) * _PADDING


@dataclass(frozen=True)
class SideAllocation:
    """K or V of a layer.

    Attributes:
        il, side: which.
        kind: "gear", a type of llama.cpp's, or why it is f16.
        n_cell: cells.
        n_bytes: memory that it takes, reserved for all cells.
        f16_bytes: what f16 would take.
        bits_per_element: bits of a number of a packed tile or a block.
    """

    il: int
    side: native.Side
    kind: str
    n_cell: int
    n_bytes: int
    f16_bytes: int
    bits_per_element: float


def allocated(kv: KVType, info: ModelInfo, allocation: Allocation) -> list[SideAllocation]:
    """K and V of all layers, as llama.cpp will make them."""
    return [side for layer in info.cached_layers for side in _sides(kv, info, layer, allocation)]


def cache_bytes(kv: KVType, info: ModelInfo, allocation: Allocation) -> int:
    """Memory of the cache of a context, llama.cpp's tables of cells and recurrent states among it."""
    tables = {allocation.is_window(layer): allocation.cells(layer) for layer in info.cached_layers}
    sides = sum(side.n_bytes for side in allocated(kv, info, allocation))
    return sides + sum(tables.values()) * _CELL_BYTES + state_bytes(info, allocation)


def state_bytes(info: ModelInfo, allocation: Allocation) -> int:
    """Memory of the recurrent states."""
    return info.state_bytes * max(allocation.n_seq, 1)


def _sides(kv: KVType, info: ModelInfo, layer: KVLayer, allocation: Allocation) -> list[SideAllocation]:
    n_cell = allocation.cells(layer)
    sides: list[tuple[native.Side, int]] = [("k", layer.d_head_k)] if layer.v_in_k else [("k", layer.d_head_k), ("v", layer.d_head_v)]
    made = []
    for side, d_head in sides:
        n_elements = n_cell * layer.n_head_kv * d_head
        f16_bytes = 2 * n_elements
        if not kv.gear:
            kind = kv.type_k if side == "k" else kv.type_v
            made.append(SideAllocation(layer.il, side, kind, n_cell, math.ceil(n_elements * LLAMA_BITS[kind] / 8), f16_bytes, LLAMA_BITS[kind]))
        elif kv.method:  # what it returns is kept as f16
            made.append(SideAllocation(layer.il, side, KIND_OF_CODEC, n_cell, f16_bytes, f16_bytes, 16.0))
        elif f16_bytes == 0:
            made.append(SideAllocation(layer.il, side, OTHER_USE, n_cell, f16_bytes, f16_bytes, 16.0))
        else:
            heads = (layer.n_head_kv, layer.d_head_k, layer.d_head_v)
            config = kv.gear.of_layer(layer.il, info.n_layer)
            n_bytes, number = native.side_bytes(config, layer.il, heads, side, n_cell, allocation.n_ubatch)
            kind = kind_of(number, layer, allocation, unpackable_heads(kv, info, layer))
            bits = native.bits_per_element(config, side, d_head) if kind == GEAR else 16.0
            made.append(SideAllocation(layer.il, side, kind, n_cell, n_bytes, f16_bytes, bits))
    return made


def kind_of(number: int, layer: KVLayer | None, allocation: Allocation, heads: str, operation: str = "") -> str:
    """What a side is, in words.

    Args:
        number: gear_store_stats.kind.
        layer: as the metadata have it; None: they do not.
        heads: why heads of these sizes cannot be packed, "" if they can.
        operation: of ggml, used on the cache and not covered; "": none.
    """
    if number == 1:
        return SMALL_WINDOW if layer and allocation.is_window(layer) else SMALL_CONTEXT
    if number == 2 and operation:
        return f"f16: used by {operation}, which GEAR does not cover"
    if number == 2 and heads:
        return f"f16: {heads}"
    return (GEAR, "", OTHER_USE, ASKED)[number]


def unpackable_heads(kv: KVType, info: ModelInfo, layer: KVLayer) -> str:
    """Why the heads of a layer cannot be packed; "" if they can."""
    if not kv.gear:
        return ""
    try:
        native.check_heads(kv.gear.of_layer(layer.il, info.n_layer), layer.d_head_k, layer.d_head_v or layer.d_head_k)
    except UnsupportedError:
        sizes = str(layer.d_head_k) if layer.d_head_k == layer.d_head_v else f"{layer.d_head_k} (K) and {layer.d_head_v} (V)"
        return f"heads of {sizes} channels cannot be packed"
    return ""


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What the layers are, in a few words
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerGroup:
    """The layers that are of one kind.

    Attributes:
        kind: "gear", a type of llama.cpp's, why they are f16, or that they have no cache of their own.
        layers: their numbers.
        n_bytes: their memory.
        growth_share: their share, 0 to 1, of what the context adds with each token, counted as f16.
    """

    kind: str
    layers: tuple[int, ...]
    n_bytes: int
    growth_share: float

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return {"kind": self.kind, "n_layer": len(self.layers), "layers": list(self.layers), "bytes": self.n_bytes, "growth_share": self.growth_share}


def group_layers(sides: Iterable[tuple[int, str, int]], info: ModelInfo, allocation: Allocation) -> list[LayerGroup]:
    """The layers of a model by what they are, GEAR first.

    Args:
        sides: layer, kind and bytes of each K and V.
    """
    kinds: dict[int, str] = {}
    n_bytes: Counter[int] = Counter()
    for il, kind, size in sides:
        kinds[il] = kind if il not in kinds or kind == GEAR else kinds[il]
        n_bytes[il] += size
    by_il = {layer.il: layer for layer in info.layers}
    growth = {il: 0 if il not in by_il or allocation.is_window(by_il[il]) else by_il[il].row_elements for il in kinds}
    all_growth = sum(growth.values()) or 1
    groups = [
        LayerGroup(kind, tuple(chosen), sum(n_bytes[il] for il in chosen), sum(growth[il] for il in chosen) / all_growth)
        for kind in sorted(set(kinds.values()), key=lambda kind: (kind != GEAR, kind))
        for chosen in [[il for il in sorted(kinds) if kinds[il] == kind]]
    ]
    if info.recurrent and kinds:
        groups.append(LayerGroup(RECURRENT, info.recurrent, state_bytes(info, allocation), 0.0))
    if info.shared and kinds:
        groups.append(LayerGroup(SHARED, tuple(sorted(info.shared)), 0, 0.0))
    return groups


def describe(groups: Sequence[LayerGroup]) -> str:
    """One line: how many layers are what, and how much of the growth is not packed."""
    parts = [f"{len(group.layers)} {_in_line(group.kind)}" for group in groups]
    lost = sum(group.growth_share for group in groups if is_lost(group))
    return ", ".join(parts) + (f"; {lost:.0%} of what the context adds stays f16" if lost else "")


def _in_line(kind: str) -> str:
    name, _, reason = kind.partition(": ")
    if reason:
        return f"{name} ({reason})"
    return {GEAR: "GEAR", RECURRENT: "with a recurrent state", SHARED: "that read another layer's cache"}.get(kind, kind)


def is_lost(group: LayerGroup) -> bool:
    """Whether what the context adds to these layers stays f16 though nobody asked for that."""
    return group.growth_share > 0 and group.kind.startswith("f16: ") and group.kind not in (ASKED, SMALL_CONTEXT)


def warning(groups: Sequence[LayerGroup]) -> str:
    """What to say at load about layers that grow and cannot be packed; "" where there are none."""
    lost = [group for group in groups if is_lost(group)]
    if not lost:
        return ""
    n_layer = sum(len(group.layers) for group in groups if group.kind not in (RECURRENT, SHARED))
    named = "; ".join(f"layers {_numbers(group.layers)} stay {_in_line(group.kind)}" for group in lost)
    n_lost, share = sum(len(group.layers) for group in lost), sum(group.growth_share for group in lost)
    return f"{n_lost} of the {n_layer} layers with a KV cache are not compressed, {share:.0%} of what the context adds: {named}"


def _numbers(layers: Sequence[int]) -> str:
    """Numbers as text, runs of them as "3-7"."""
    runs: list[list[int]] = []
    for il in layers:
        if runs and il == runs[-1][1] + 1:
            runs[-1][1] = il
        else:
            runs.append([il, il])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
