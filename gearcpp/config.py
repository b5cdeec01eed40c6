"""How a GEAR cache codes keys and values: `GearConfig`, and the presets by name.

This module needs nothing but the standard library; the native library checks a configuration again (``gear_config_check``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .errors import ConfigError

Choice = bool | Literal["auto"]
_MOST_AUTO_FEEDBACK = 256  # most_auto_feedback of native/codec/feedback.h
LayerFields = tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]
_OF_ALL_LAYERS = ("tile", "n_tail", "n_sink", "seed", "layers")


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
        rotate_k, rotate_v: how a head's channels are mixed before coding, undone on the query side. False: not at all; True: a Hadamard rotation;
            "auto": the same after channels are weighed for each head, by what its queries look at and how far its keys stray (native/codec/basis.h).
        center_k, center_v: take each channel's mean over the tile out before coding and keep it as f16 (M; ours, not the paper's). Not together with S.
        sparsity: s of S, the share of each vector (K: channel, V: token) kept exactly, half of it at the top and half at the bottom; 0 leaves S out.
        clip_k, clip_v: shrink each group's range about its middle to this share before coding; 1 does not clip.
        feedback_k: round K for the error of scores rather than of keys, as the queries met say (native/codec/feedback.h). True: not together with L, S or
            M of K, nor on a GPU; "auto": where it can be, in heads of up to 256 channels.
        tile: T, cells of a tile: 64, 128 or 256.
        n_tail: the last rows written that stay exact (f16), at least.
        n_sink: the first cells of each stream that stay exact.
        seed: of the power iteration's start vectors.
        layers: what is otherwise in some layers, fields by layer: ``{0: {"bits_k": 6}, -1: {"bits_k": 6, "bits_v": 5}}``. Negative numbers count from the
            last layer. All fields but tile, n_tail, n_sink and seed can be. Kept as sorted pairs.
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
    rotate_k: Choice = "auto"
    rotate_v: Choice = True
    center_k: bool = False
    center_v: bool = True
    sparsity: float = 0.0
    clip_k: float = 1.0
    clip_v: float = 1.0
    feedback_k: Choice = "auto"
    tile: int = 256
    n_tail: int = 128
    n_sink: int = 4
    seed: int = 1
    layers: LayerFields | Mapping[Any, Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _sorted_layers(self.layers))

    def replace(self, **changes: Any) -> GearConfig:
        """A copy with some fields changed; unknown fields are a ConfigError."""
        check_names(changes, [f.name for f in fields(self)], "GearConfig field")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name; ``layers`` only where there are some, by their numbers as text, as JSON has them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        return values | ({"layers": {str(il): dict(changes) for il, changes in self.layers}} if self.layers else {})

    def has_feedback(self, d_head: int) -> bool:
        """Whether a CPU's cache rounds the K of heads of so many channels for the error of scores."""
        can = d_head <= _MOST_AUTO_FEEDBACK and not (self.rank_k or self.sparsity or self.center_k or self.bits_k == 16)
        return can if self.feedback_k == "auto" else bool(self.feedback_k)

    def of_layer(self, il: int, n_layer: int) -> GearConfig:
        """The configuration of one layer, without exceptions.

        Args:
            il: its number, from 0.
            n_layer: layers of the model.
        """
        changes = {name: value for number, some in self.layers if number % n_layer == il for name, value in some}
        return replace(self, layers=(), **changes)

    def check_layers(self, n_layer: int, cached: Sequence[int]) -> None:
        """Raise ConfigError for settings of a layer that a model does not have, or that has no KV cache, and for those of one under two numbers.

        Args:
            n_layer: layers of the model.
            cached: those with a KV cache of their own.
        """
        seen: dict[int, int] = {}
        for il, _ in self.layers:
            if not -n_layer <= il < n_layer:
                raise ConfigError(f"layer {il} has settings of its own, but the model has layers 0 to {n_layer - 1}")
            if il % n_layer not in cached:
                numbers = ", ".join(map(str, cached))
                raise ConfigError(f"layer {il} has settings of its own, but no KV cache of its own; those that have one: {numbers}")
            if il % n_layer in seen:
                raise ConfigError(f"layer {il} is layer {seen[il % n_layer]}, too: put its settings together")
            seen[il % n_layer] = il

    def to_text(self) -> str:
        """All fields as GEARCPP_KV has them.

        Raises:
            ConfigError: a layer is counted from the last one.
        """

        def pairs(values: Mapping[str, Any], before: str = "") -> list[str]:
            return [f"{before}{name}={int(value) if isinstance(value, bool) else value}" for name, value in values.items()]

        last = [il for il, _ in self.layers if il < 0]
        if last:
            raise ConfigError(f"layer {last[0]}: a program that loads the plugin does not know the last layer yet; count from 0")
        return ",".join(pairs(replace(self, layers=()).to_dict()) + [pair for il, some in self.layers for pair in pairs(dict(some), f"{il}.")])


def _sorted_layers(layers: Any) -> LayerFields:
    pairs = list(layers.items()) if isinstance(layers, Mapping) else list(layers) if isinstance(layers, (tuple, list)) else None
    if pairs is None:
        raise ConfigError(f"layers must be a mapping of layers to their fields, such as {{0: {{'bits_k': 6}}}}, not {layers!r}")
    known = [f.name for f in fields(GearConfig) if f.name not in _OF_ALL_LAYERS]
    made: dict[int, tuple[tuple[str, Any], ...]] = {}
    for il, changes in pairs:
        if isinstance(il, bool) or not re.fullmatch(r"-?\d+", str(il)):
            raise ConfigError(f"layers: {il!r} is not the number of a layer")
        if not isinstance(changes, (Mapping, tuple, list)):
            raise ConfigError(f"layer {il}: its settings must be fields by name, such as {{'bits_k': 6}}, not {changes!r}")
        some = dict(changes)
        for name in some:
            if name in _OF_ALL_LAYERS:
                raise ConfigError(f"layer {il}: {name} is the same for all layers")
        check_names(some, known, f"field of layer {il}:")
        if int(il) in made:
            raise ConfigError(f"layer {il} has settings of its own twice: put them together")
        made[int(il)] = tuple(sorted(some.items()))
    return tuple(sorted((il, some) for il, some in made.items() if some))


_PLAIN = GearConfig(rotate_k=False, rotate_v=False, center_v=False, feedback_k=False)  # D, L and S as in the paper


# Every preset by name. "gear" is the default. Chosen by measurement: see docs/.
PRESETS: dict[str, GearConfig] = {
    "gear": GearConfig(),
    "gear4": GearConfig(),
    # The fewer the codes, the more a group's extremes cost the others: below 4 bits they are clipped.
    "gear3": GearConfig(bits_k=3, bits_v=3, clip_k=0.95, clip_v=0.95),
    "gear2": GearConfig(bits_k=2, bits_v=2, clip_k=0.8, clip_v=0.8),
    "gear-hi": GearConfig(bits_k=6, bits_v=5),
    "gear-l": GearConfig(rank_k=2, rank_v=2, factor_bits=4, rounds=3),
    "gear-l3": GearConfig(bits_k=3, bits_v=3, clip_k=0.95, clip_v=0.95, rank_k=2, rank_v=2, factor_bits=4, rounds=3),
    "gear-l2": GearConfig(bits_k=2, bits_v=2, clip_k=0.85, clip_v=0.8, rank_k=4, rank_v=4, factor_bits=4, rounds=3),
    # The paper's own settings for a tile: 4 bits on KCVT, 2 bits on KIVI g = 64; s = 2 %, r = 4.
    "gear-paper4": replace(_PLAIN, group_k=0, scale_bits=16, rank_k=4, rank_v=4, sparsity=0.02),
    "gear-paper2": replace(_PLAIN, bits_k=2, bits_v=2, group_k=64, group_v=64, scale_bits=16, rank_k=4, rank_v=4, sparsity=0.02),
}


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
    whole("group_v", 0, 576)
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
    for name in ("rotate_k", "rotate_v", "feedback_k"):
        if getattr(config, name) not in (False, True, "auto"):
            raise ConfigError(f"{name} must be True, False or 'auto', not {getattr(config, name)!r}")
    for name in ("center_k", "center_v"):
        if getattr(config, name) not in (False, True):
            raise ConfigError(f"{name} must be True or False, not {getattr(config, name)!r}")
    for name in ("center_k", "center_v"):
        if getattr(config, name) and config.sparsity:
            raise ConfigError(f"{name} must be False where there are outliers (sparsity={config.sparsity}): exact values and a mean do not go together")
    if config.feedback_k not in (False, "auto") and (config.rank_k or config.sparsity or config.center_k):
        raise ConfigError("feedback_k is for keys without a low rank, outliers and a mean: it must be False or 'auto' with rank_k, sparsity or center_k")
    for il, changes in config.layers:
        try:
            check_config(replace(config, layers=(), **dict(changes)))
        except ConfigError as error:
            raise ConfigError(f"layer {il}: {error}") from None


def check_names(given: Mapping[str, Any], known: list[str], what: str) -> None:
    """Raise ConfigError for the first name that is not known, with the nearest ones or, when none is near, all."""
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}{suggest(name, known) or '; known: ' + ', '.join(known)}")


def suggest(name: str, known: list[str]) -> str:
    """The nearest known names, as an error message ends; "" when none is near."""
    near = difflib.get_close_matches(name, known, n=2)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""
