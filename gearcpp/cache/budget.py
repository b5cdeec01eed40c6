"""Bits by layer and side that fit a given memory (``Llama(kv_budget=...)``).

Bits are raised in the order of `RUNGS`, V before K: with feedback the next bit counts for more in V on recorded heads, and alike in a model's output
(docs/coding-keys.md).
What is left of the budget between two rungs raises the first layers, whose errors all others inherit.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from ..config import PRESETS, GearConfig
from ..errors import ConfigError, UnsupportedError
from ..model_info import ModelInfo
from .allocation import GEAR, Allocation, allocated, cache_bytes
from .kv_type import KVType

# Bits of K and of V, from the fewest to the most.
RUNGS = ((2, 2), (2, 3), (3, 3), (3, 4), (4, 4), (4, 5), (5, 5), (6, 5))

_UNITS = " KMGT"


def parse_size(size: int | str, name: str) -> int:
    """Bytes of a size such as 4294967296, "512MiB" or "4GB"; a unit with or without i is a power of 1024, as llama.cpp's programs have them.

    Args:
        size: what the user gave.
        name: of the option, for the error.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])i?)?B?", str(size).strip(), re.IGNORECASE)
    if isinstance(size, bool) or not found or not float(found[1]):
        raise ConfigError(f"{name} wants a size such as 512MiB or 4GiB, not {size!r}")
    return int(float(found[1]) * 1024 ** _UNITS.index((found[2] or " ").upper()))


def budget_bytes(budget: int | str, n_ctx: int) -> int:
    """Bytes of ``kv_budget``: a size of the whole cache, or of a token, as in "24KiB/token"."""
    size, slash, token = str(budget).partition("/")
    if slash and token.strip() != "token":
        raise ConfigError(f"kv_budget wants a size such as 2GiB, or one of a token such as 24KiB/token, not {budget!r}")
    return parse_size(size if slash else budget, "kv_budget") * (n_ctx if slash else 1)


def within_budget(kv: KVType, budget: int | str, info: ModelInfo, allocation: Allocation) -> KVType:
    """The cache with as many bits as the budget allows, at least 2 and at most 6 (K) and 5 (V).

    Args:
        kv: a GEAR cache; its bits and clips are chosen anew, all else stays.
        budget: bytes of the whole cache with everything in it, or "SIZE/token".
        info: of the model.
        allocation: how llama.cpp is asked to make the cache.

    Raises:
        ConfigError: the cache is not GEAR's, has settings of single layers, or does not fit with 2 bits.
        UnsupportedError: nothing of it is packed.
    """
    if not kv.gear or kv.method:
        raise ConfigError(f"kv_budget chooses the bits of a GEAR cache; {kv.name} has none to choose")
    if kv.gear.layers:
        raise ConfigError("kv_budget chooses bits layer by layer: leave the settings of single layers out")
    n_bytes = budget_bytes(budget, allocation.n_ctx)
    configs = [_of_rung(kv.gear, *rung) for rung in RUNGS]
    sizes = [_layer_bytes(replace(kv, gear=config), info, allocation) for config in configs]
    total = cache_bytes(replace(kv, gear=configs[0]), info, allocation)
    if total > n_bytes:
        raise ConfigError(
            f"kv_budget {budget}: a context of {allocation.n_ctx} tokens takes {_mib(total)} with 2 bits, and {_mib(n_bytes)} are given: shorten it"
        )
    if not sizes[0]:
        raise UnsupportedError(f"kv_budget {budget}: a context of {allocation.n_ctx} tokens of this model has no layer that is packed")
    rung_of = dict.fromkeys(sorted(sizes[0]), 0)
    for rung, il in ((rung, il) for rung in range(1, len(RUNGS)) for il in rung_of):
        if rung_of[il] < rung - 1 or il not in sizes[rung]:  # with so many bits it would be f16: it gains no more
            continue
        more = sizes[rung][il] - sizes[rung - 1][il]
        if total + more > n_bytes:
            break
        rung_of[il], total = rung, total + more
    most = Counter(rung_of.values()).most_common(1)[0][0]
    main = configs[most]
    others = {il: _bits(configs[rung]) for il, rung in rung_of.items() if rung != most}
    return replace(kv, name=_name(rung_of, most), gear=main.replace(layers=others))


def _bits(config: GearConfig) -> dict[str, int | float]:
    return {name: getattr(config, name) for name in ("bits_k", "bits_v", "clip_k", "clip_v")}


def _of_rung(base: GearConfig, bits_k: int, bits_v: int) -> GearConfig:
    """Clips go with the bits, as the presets have them."""
    presets = {2: PRESETS["gear2"], 3: PRESETS["gear3"]}
    clip_k, clip_v = presets.get(bits_k, PRESETS["gear"]).clip_k, presets.get(bits_v, PRESETS["gear"]).clip_v
    return base.replace(bits_k=bits_k, bits_v=bits_v, clip_k=clip_k, clip_v=clip_v)


def _layer_bytes(kv: KVType, info: ModelInfo, allocation: Allocation) -> dict[int, int]:
    """Of the layers that are packed."""
    sides = allocated(kv, info, allocation)
    return {il: sum(side.n_bytes for side in sides if side.il == il) for il in {side.il for side in sides if side.kind == GEAR}}


def _name(rung_of: dict[int, int], most: int) -> str:
    """What was picked, as in "gear(K 3 V 3, 0-11: K 3 V 4)"."""

    def words(rung: int) -> str:
        return "K {} V {}".format(*RUNGS[rung])

    parts = [words(most)]
    for rung in sorted(set(rung_of.values()) - {most}):
        layers = sorted(il for il, of_layer in rung_of.items() if of_layer == rung)
        is_run = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
        parts.append(f"{f'{layers[0]}-{layers[-1]}' if is_run else ' '.join(map(str, layers))}: {words(rung)}")
    return f"gear({', '.join(parts)})"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
