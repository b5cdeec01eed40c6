"""What a KV cache is made of: `KVType`, and the one function that understands every form of ``kv_type``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Union, runtime_checkable

from ..config import PRESETS, GearConfig, check_config, suggest
from ..errors import ConfigError

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
            tiles in place of the native codec. A preset may be changed in parentheses, "gear2(rotate_k=False, n_tail=256)", also in one layer alone,
            "gear2(0.bits_k=4, -1.bits_k=4)". A name may end in "+tailN",
            which keeps the last N rows exact; one of llama.cpp's types gets its tail through the reference method of the same name.
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
        if found := re.fullmatch(r"(?P<preset>[^()]+)\((?P<changes>[^()]*)\)", name):
            return _changed(found["preset"].strip(), found["changes"])
        if name.startswith("sim:"):
            from ..reference import method

            return _of_method(method(name.removeprefix("sim:"), recorder))
        if name in PRESETS:
            return KVType(name, PRESETS[name])
        if name in LLAMA_CACHE_TYPES:
            return KVType(name, None, name, name)
        if name.count("/") == 1:
            first, second = name.split("/")
            return normalize_kv_type((first, second))
        known = [*PRESETS, *LLAMA_CACHE_TYPES]
        raise ConfigError(f"unknown kv_type {kv_type!r}{suggest(name, known)}; known: {', '.join(known)}")
    if isinstance(kv_type, (tuple, list)) and len(kv_type) == 2 and all(isinstance(t, str) for t in kv_type):
        type_k, type_v = (t.strip().lower() for t in kv_type)
        for t in (type_k, type_v):
            if t in PRESETS:
                raise ConfigError(f"{t!r} cannot be half of a pair: pairs are for llama.cpp's own types. For GEAR use GearConfig(bits_k=..., bits_v=...)")
            if t not in LLAMA_CACHE_TYPES:
                raise ConfigError(f"unknown cache type {t!r}{suggest(t, list(LLAMA_CACHE_TYPES))}; known: {', '.join(LLAMA_CACHE_TYPES)}")
        return KVType(type_k if type_k == type_v else f"{type_k}/{type_v}", None, type_k, type_v)
    if isinstance(kv_type, TileMethod) and not isinstance(kv_type, type):
        return _of_method(kv_type)
    hint = "; a plain function codes tiles as codec=" if callable(kv_type) else ""
    raise ConfigError(f"kv_type must be a name, a pair of names, a GearConfig, a mapping of its fields or a method, not {type(kv_type).__name__}{hint}")


def split_kv_types(text: str) -> list[str]:
    """The names of a comma-separated list; a comma between parentheses belongs to its name."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]


def _changed(preset: str, changes: str) -> KVType:
    """A preset with some of its fields changed, as the name of such a configuration says it."""
    base = normalize_kv_type(preset).gear
    if not base:
        raise ConfigError(f"{preset!r} has no fields to change: {preset}(...) is for GEAR's presets, {', '.join(PRESETS)}")
    fields: dict[str, Any] = {}
    layers = {il: dict(some) for il, some in base.layers}
    for part in filter(None, (part.strip() for part in changes.split(","))):
        field, equal, value = (text.strip() for text in part.partition("="))
        if not equal:
            raise ConfigError(f"{preset}({changes}): write fields as in {preset}(rotate_k=False, n_tail=256)")
        words = {"true": True, "false": False, "auto": "auto"}
        il, point, name = field.partition(".")
        if point and not re.fullmatch(r"-?\d+", il):
            raise ConfigError(f"{preset}({changes}): {il!r} is not the number of a layer; write one as in {preset}(0.bits_k=6)")
        target, field = (layers.setdefault(int(il), {}), name) if point else (fields, field)
        try:
            target[field] = words[value] if value in words else float(value) if "." in value else int(value)
        except ValueError:
            raise ConfigError(f"{preset}({changes}): {value!r} is neither a number nor True, False or auto") from None
    config = base.replace(**fields, **({"layers": layers} if layers else {}))
    check_config(config)
    return KVType(f"{preset}({','.join([*_pairs(fields), *_layer_pairs(config)])})", config)


def _pairs(fields: Mapping[str, Any], before: str = "") -> list[str]:
    return [f"{before}{name}={value}" for name, value in fields.items()]


def _layer_pairs(config: GearConfig) -> list[str]:
    return [pair for il, some in config.layers for pair in _pairs(dict(some), f"{il}.")]


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


def _name_of(config: GearConfig) -> str:
    for name, preset in PRESETS.items():
        if preset == config:
            return name
    default = GearConfig()
    names = [f.name for f in fields(config) if f.name != "layers" and getattr(config, f.name) != getattr(default, f.name)]
    return f"gear({','.join([*_pairs({name: getattr(config, name) for name in names}), *_layer_pairs(config)])})"
