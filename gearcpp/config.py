"""What a KV cache is made of: `GearConfig`, the presets by name, and the one function that understands every form of ``kv_type``.

This module needs nothing but the standard library; the native library checks a configuration again (``gear_config_check``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol, Union, runtime_checkable

from .errors import ConfigError

# llama.cpp's own cache types (common/arg.cpp, kv_cache_types) and their number in ggml.h.
LLAMA_CACHE_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}


@dataclass(frozen=True)
class GearConfig:
    """How a GEAR cache codes keys and values (GEAR, arXiv 2403.05527: X ~ D + L + S per KV head).

    Attributes:
        bits_k, bits_v: bits of a code of D, 2 to 7; 16 keeps that side as f16.
        group_k: consecutive tokens that share a scale and a zero in a channel of K; 0 means the whole tile, otherwise a multiple of 32.
        group_v: consecutive channels that share them in a token of V; 0 means the whole head, otherwise a multiple of 32.
        scale_bits: 8 (scale and zero in 8 bits each, against the extremes of their channels in the tile) or 16 (f16).
        rank_k, rank_v: rank r of L per head and tile, 0 to 16; 0 leaves L out.
        factor_bits: bits of an entry of the factors A and B, 8 or 4.
        rounds: alternating rounds D = Q(X - L), L = lowrank(X - D); 1 is the paper's order.
        rotate_k, rotate_v: a Hadamard rotation over the head's channels before coding, undone on the query side.
        center_k, center_v: take each channel's mean over the tile out before coding and keep it as f16 (M; ours, not the paper's). Not together with S.
        sparsity: s of S, the share of each vector (K: channel, V: token) kept exactly, half of it at the top and half at the bottom; 0 leaves S out.
        clip_k, clip_v: shrink each group's range about its middle to this share before coding; 1 does not clip.
        tile: T, cells of a tile: 64, 128 or 256.
        n_tail: the last rows written that stay exact (f16), at least.
        n_sink: the first cells of each stream that stay exact.
        seed: of the power iteration's start vectors.
    """

    bits_k: int = 4
    bits_v: int = 4
    group_k: int = 32
    group_v: int = 0
    scale_bits: int = 8
    rank_k: int = 0
    rank_v: int = 0
    factor_bits: int = 8
    rounds: int = 1
    rotate_k: bool = True
    rotate_v: bool = True
    center_k: bool = False
    center_v: bool = True
    sparsity: float = 0.0
    clip_k: float = 1.0
    clip_v: float = 1.0
    tile: int = 256
    n_tail: int = 128
    n_sink: int = 4
    seed: int = 1

    def replace(self, **changes: Any) -> GearConfig:
        """A copy with some fields changed; unknown fields are a ConfigError."""
        check_names(changes, [f.name for f in fields(self)], "GearConfig field")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


_PLAIN = GearConfig(rotate_k=False, rotate_v=False, center_v=False)  # D, L and S as in the paper

# Every preset by name. "gear" is the default. Chosen by measurement: see docs/.
PRESETS: dict[str, GearConfig] = {
    "gear": GearConfig(),
    "gear4": GearConfig(),
    # The fewer the codes, the more a group's extremes cost the others: below 4 bits they are clipped.
    "gear3": GearConfig(bits_k=3, bits_v=3, clip_k=0.95, clip_v=0.95),
    "gear2": GearConfig(bits_k=2, bits_v=2, clip_k=0.9, clip_v=0.8),
    "gear-hi": GearConfig(bits_k=6, bits_v=5),
    "gear-l": GearConfig(rank_k=2, rank_v=2, factor_bits=4, rounds=3),
    "gear-l3": GearConfig(bits_k=3, bits_v=3, rank_k=2, rank_v=2, factor_bits=4, rounds=3),
    "gear-l2": GearConfig(bits_k=2, bits_v=2, rank_k=4, rank_v=4, factor_bits=4, rounds=3),
    # The paper's own settings for a tile: 4 bits on KCVT, 2 bits on KIVI g = 64; s = 2 %, r = 4 (gear_facts, section 2.2).
    "gear-paper4": replace(_PLAIN, group_k=0, scale_bits=16, rank_k=4, rank_v=4, sparsity=0.02),
    "gear-paper2": replace(_PLAIN, bits_k=2, bits_v=2, group_k=64, group_v=64, scale_bits=16, rank_k=4, rank_v=4, sparsity=0.02),
}


@runtime_checkable
class TileMethod(Protocol):
    """A method that codes tiles in place of the native codec; `gearcpp.reference` has those of the literature.

    Attributes:
        name: what to call it.
        tile: tokens that it expects in a tile, 64, 128 or 256; None: any number.
    """

    @property
    def name(self) -> str: ...
    @property
    def tile(self) -> int | None: ...
    def __call__(self, side: str, x: Any, written: Any = None, positions: Any = None, *, layer: int = 0, head: int = 0) -> tuple[Any, float]:
        """Code the rows x [tile, d_head] that were written: the reconstruction, and the bytes that the method would store."""


@dataclass(frozen=True)
class KVType:
    """A ``kv_type`` understood: either a GEAR configuration or llama.cpp's own types for K and V.

    Attributes:
        name: what to call it in tables and messages.
        gear: the configuration of a GEAR cache, or None.
        type_k, type_v: llama.cpp's own types by name; "f16" both when ``gear`` is set (the nominal type of the cache tensors).
        method: what codes the tiles in place of the native codec, or None. Of ``gear`` only the tile, the tail and the sinks then have a say.
    """

    name: str
    gear: GearConfig | None
    type_k: str = "f16"
    type_v: str = "f16"
    method: TileMethod | None = field(default=None, hash=False)

    @property
    def type_numbers(self) -> tuple[int, int]:
        """ggml type numbers for ``type_k`` and ``type_v``."""
        return LLAMA_CACHE_TYPES[self.type_k], LLAMA_CACHE_TYPES[self.type_v]


KVTypeLike = Union[str, GearConfig, "KVType", TileMethod, Mapping[str, Any], tuple[str, str]]


def normalize_kv_type(kv_type: KVTypeLike, *, recorder: Any = None) -> KVType:
    """Understand every form of ``kv_type``: the only place where user input about the cache is read.

    Args:
        kv_type: a preset name ("gear", "gear3", ...), one of llama.cpp's types ("f16", "q8_0", ...), a pair of the latter for K and V,
            a `GearConfig`, a mapping of GearConfig fields, or a `KVType`; a method of `gearcpp.reference`, or its name as "sim:NAME", which codes the
            tiles in place of the native codec. A name may end in "+tailN", which keeps the last N rows exact; one of llama.cpp's types gets its tail
            through the reference method of the same name.
        recorder: what methods that are calibrated read beforehand (`gearcpp.reference.record`), or a function that gives it.

    Raises:
        ConfigError: the name is unknown (the nearest ones are suggested), a field is unknown or out of range, or the type is wrong.
        UnsupportedError: a reference method was named, and PyTorch is not installed.
    """
    if isinstance(kv_type, KVType):
        return kv_type
    if isinstance(kv_type, GearConfig):
        check_config(kv_type)
        return KVType(_name_of(kv_type), kv_type)
    if isinstance(kv_type, Mapping):
        config = GearConfig().replace(**kv_type)
        return normalize_kv_type(config)
    if isinstance(kv_type, str):
        name = kv_type.strip().lower()
        if found := re.fullmatch(r"(?P<name>.*)\+tail(?P<n_tail>\d+)", name):
            return _with_tail(found["name"], int(found["n_tail"]), recorder)
        if name.startswith("sim:"):
            from .reference import method

            return _of_method(method(name.removeprefix("sim:"), recorder))
        if name in PRESETS:
            return KVType(name, PRESETS[name])
        if name in LLAMA_CACHE_TYPES:
            return KVType(name, None, name, name)
        if name.count("/") == 1:
            first, second = name.split("/")
            return normalize_kv_type((first, second))
        known = [*PRESETS, *LLAMA_CACHE_TYPES]
        raise ConfigError(f"unknown kv_type {kv_type!r}{nearest(name, known)}; known: {', '.join(known)}")
    if isinstance(kv_type, (tuple, list)) and len(kv_type) == 2 and all(isinstance(t, str) for t in kv_type):
        type_k, type_v = (t.strip().lower() for t in kv_type)
        for t in (type_k, type_v):
            if t in PRESETS:
                raise ConfigError(f"{t!r} cannot be half of a pair: pairs are for llama.cpp's own types. For GEAR use GearConfig(bits_k=..., bits_v=...)")
            if t not in LLAMA_CACHE_TYPES:
                raise ConfigError(f"unknown cache type {t!r}{nearest(t, list(LLAMA_CACHE_TYPES))}; known: {', '.join(LLAMA_CACHE_TYPES)}")
        return KVType(type_k if type_k == type_v else f"{type_k}/{type_v}", None, type_k, type_v)
    if isinstance(kv_type, TileMethod) and not isinstance(kv_type, type):
        return _of_method(kv_type)
    hint = "; a plain function codes tiles as codec=" if callable(kv_type) else ""
    raise ConfigError(f"kv_type must be a name, a pair of names, a GearConfig, a mapping of its fields or a method, not {type(kv_type).__name__}{hint}")


TAIL_SHARE = 8  # a tail that grows with the sequences takes at most one in so many cells of the context


def for_sequences(kv: KVType, n_seq: int, n_ctx: int) -> KVType:
    """The cache for a context whose cells several sequences share: a tail of n_tail rows for each.

    The tail is the last rows written by all of them together, so n_tail rows are a few of each. It becomes n_tail * n_seq rows, but no more than
    n_ctx / 8, and never less than n_tail.

    Args:
        n_seq: most sequences decoded together.
        n_ctx: cells that they share.
    """
    if not kv.gear or n_seq <= 1:
        return kv
    n_tail = kv.gear.n_tail
    return replace(kv, gear=kv.gear.replace(n_tail=max(n_tail, min(n_tail * n_seq, n_ctx // TAIL_SHARE))))


def _of_method(method: TileMethod) -> KVType:
    config = GearConfig() if method.tile is None else GearConfig(tile=method.tile)
    check_config(config)
    return KVType(f"sim:{method.name}", config, method=method)


def _with_tail(name: str, n_tail: int, recorder: Any) -> KVType:
    kv = normalize_kv_type(name, recorder=recorder)
    if not kv.gear:
        if "/" in kv.name:
            raise ConfigError(f"{name}+tail{n_tail}: an exact tail is for one type on both sides, such as q4_0+tail{n_tail}")
        kv = normalize_kv_type(f"sim:{name}")
    assert kv.gear
    config = kv.gear.replace(n_tail=n_tail)
    check_config(config)
    return replace(kv, name=f"{name}+tail{n_tail}", gear=config)


def check_config(config: GearConfig) -> None:
    """Raise ConfigError when a field is of the wrong type or out of range (the same rules as ``gear_config_check``)."""

    def whole(name: str, low: int, high: int) -> None:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")

    def share(name: str, low_open: bool, high: float) -> None:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high or (low_open and value == 0):
            raise ConfigError(f"{name} must be a number {'above' if low_open else 'from'} 0 and at most {high}, not {value!r}")

    for name in ("bits_k", "bits_v"):
        if getattr(config, name) != 16:
            value = getattr(config, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 7:
                raise ConfigError(f"{name} must be 2, 3, 4, 5, 6 or 7 (or 16 for f16), not {value!r}")
    if config.tile not in (64, 128, 256):
        raise ConfigError(f"tile must be 64, 128 or 256, not {config.tile!r}")
    whole("group_k", 0, config.tile)
    whole("group_v", 0, 256)
    if config.group_k % 32 or (config.group_k and config.tile % config.group_k):
        raise ConfigError(f"group_k must be 0 or a multiple of 32 that divides the tile ({config.tile}), not {config.group_k}")
    if config.group_v % 32:
        raise ConfigError(f"group_v must be 0 or a multiple of 32, not {config.group_v}")
    if config.scale_bits not in (8, 16):
        raise ConfigError(f"scale_bits must be 8 or 16, not {config.scale_bits!r}")
    if config.factor_bits not in (4, 8):
        raise ConfigError(f"factor_bits must be 4 or 8, not {config.factor_bits!r}")
    whole("rank_k", 0, 16)
    whole("rank_v", 0, 16)
    whole("rounds", 1, 16)
    share("sparsity", False, 0.25)
    share("clip_k", True, 1.0)
    share("clip_v", True, 1.0)
    whole("n_tail", 0, 2**30)
    whole("n_sink", 0, 2**20)
    whole("seed", 0, 2**32 - 1)
    for name in ("rotate_k", "rotate_v", "center_k", "center_v"):
        if getattr(config, name) not in (False, True, 0, 1):
            raise ConfigError(f"{name} must be True or False, not {getattr(config, name)!r}")
    for name in ("center_k", "center_v"):
        if getattr(config, name) and config.sparsity:
            raise ConfigError(f"{name} must be False where there are outliers (sparsity={config.sparsity}): exact values and a mean do not go together")


def _name_of(config: GearConfig) -> str:
    for name, preset in PRESETS.items():
        if preset == config:
            return name
    default = GearConfig()
    changed = [f"{f.name}={getattr(config, f.name)}" for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    return f"gear({','.join(changed)})"


def check_names(given: Mapping[str, Any], known: list[str], what: str) -> None:
    """Raise ConfigError for the first name that is not known, with the nearest ones or, when none is near, all."""
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}{nearest(name, known) or '; known: ' + ', '.join(known)}")


def nearest(name: str, known: list[str]) -> str:
    """The question after an unknown name, whether a near one was meant; "" when none is near."""
    near = difflib.get_close_matches(name, known, n=2)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""
