"""gearcpp's own codec in PyTorch: GEAR on one tile of one KV head as native/codec does it, number for number.

    X ~ D + L + S        S = Filter_s(X)      D = Quant_b(X - S)      R = X - D - S      L = A B^T = PowerIteration_r(R)

and, with ``center``, X ~ M + D + L: M is the mean of each channel over the tile, and X - M takes the place of X. With rotate "auto", H (w o x) takes the
place of each row x (native/codec/basis.h).

The native code is compared with this: codes, scales, zeros, factors and outliers are equal to what it stores (native/codec/tile.h), because every step is
float32, rounds in the same places and adds up in the same order. Where it differs from GEAR as published (`gearcpp.reference.methods.gear`): T tokens of
one head at a time, scales and zeros in 8 bits against the extremes of their set and rounded outwards, factors in 8 or 4 bits, a fixed count of outliers
whose gaps take no part in the ranges.

One file of more than 500 lines, as codec.cpp is: the two are read side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import Choice, GearConfig, check_config
from ...errors import ConfigError, UnsupportedError
from .gear import outliers_per_side
from .tensors import Coded, as_tile, hadamard, side_axis

HALF_MAX = 65504.0
MAX_HEAD = 576  # channels
N_PASS = 3  # of the power iteration
N_PARTIAL = 16  # partial sums of a product of vectors
PART_ALIGN, TILE_ALIGN = 16, 64  # bytes


class SideConfig(NamedTuple):
    """What a `GearConfig` says about one side, for a head of d channels."""

    side: str
    n_token: int
    d_head: int
    bits: int
    group: int
    scale_bits: int
    rank: int
    factor_bits: int
    rounds: int
    rotate: Choice
    has_feedback: bool  # of K: the weights are other ones then; tiles of `pack` know no queries
    center: bool
    clip: float
    n_outlier: int  # of each vector, both ends together
    seed: int

    @property
    def levels(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def is_k(self) -> bool:
        """Groups run along tokens, not along channels."""
        return self.side == "k"

    @property
    def group_axis(self) -> int:
        """The axis of [token group, channel] (K) or [channel group, token] (V) along which the groups of a set lie."""
        return -2 if self.is_k else -1


class Parts(NamedTuple):
    """The parts of a packed tile, as ``gearcpp.native.tile_parts`` gives them.

    codes [..., T, d]; scale and zero [..., n_group]; a [..., T, r] with sigma in it; b [..., d, r]; mean [..., d], zeros without ``center``;
    outlier_value and outlier_index [..., n_vector, n_outlier], vectors being the channels of K and the tokens of V; basis u8 [..., d / 2] with rotate
    "auto", else [..., 0].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    a: Tensor
    b: Tensor
    mean: Tensor
    outlier_value: Tensor
    outlier_index: Tensor
    basis: Tensor


def side_config(config: GearConfig, side: str, d_head: int) -> SideConfig:
    """The settings of one side.

    Raises:
        ConfigError: the configuration is out of range, or this side is kept as f16.
        UnsupportedError: the head size is not a multiple of 16 from 32 to 576.
    """
    check_config(config)
    side_axis(side)
    if d_head % 16 or not 32 <= d_head <= MAX_HEAD:
        raise UnsupportedError(f"heads must have a multiple of 16 channels from 32 to {MAX_HEAD}, not {d_head}")
    bits = getattr(config, f"bits_{side}")
    if bits == 16:
        raise ConfigError(f"{side.upper()} is kept as f16 (bits_{side}=16): it has no packed tiles")
    length = config.tile if side == "k" else d_head
    return SideConfig(
        side=side,
        n_token=config.tile,
        d_head=d_head,
        bits=bits,
        group=min(getattr(config, f"group_{side}") or length, length),
        scale_bits=config.scale_bits,
        rank=getattr(config, f"rank_{side}"),
        factor_bits=config.factor_bits,
        rounds=config.rounds,
        rotate=getattr(config, f"rotate_{side}"),
        has_feedback=side == "k" and config.has_feedback(d_head),
        center=bool(getattr(config, f"center_{side}")),
        clip=getattr(config, f"clip_{side}"),
        n_outlier=2 * outliers_per_side(config.sparsity, length),
        seed=config.seed,
    )


def tile_bytes(side: SideConfig) -> int:
    """Bytes of a packed tile: each part begins at a multiple of 16, the whole is a multiple of 64."""
    n_token, d = side.n_token, side.d_head
    n_set = d if side.is_k else math.ceil(d / side.group)
    n_group = n_token // side.group * d if side.is_k else n_set * n_token
    n_lane, n_depth, n_vector = (n_token, d, d) if side.is_k else (math.ceil(d / 32) * 32, n_token, n_token)
    planes = [n_lane * n_depth * width // 8 for width in (4, 2, 1) if side.bits & width]
    scales = [n_group * side.scale_bits // 8] * 2
    extremes = [2 * n_set] * 2 if side.scale_bits == 8 else []
    factors = [4 * side.rank, side.rank * n_token * side.factor_bits // 8, side.rank * d * side.factor_bits // 8]
    means = [2 * d] if side.center else []
    weights = [d // 2] if side.rotate == "auto" else []
    index_bytes = 1 if (n_token if side.is_k else d) <= 256 else 2
    outliers = [2 * n_vector * side.n_outlier, index_bytes * n_vector * side.n_outlier]
    return _aligned(sum(_aligned(part, PART_ALIGN) for part in planes + scales + extremes + factors + means + weights + outliers), TILE_ALIGN)


def gear_tile(x: Tensor, side: str, config: GearConfig, written: Tensor | None = None) -> Coded:
    """The reconstruction of tiles, and their bytes.

    Args:
        x: [..., T, d_head], T = ``config.tile``.
        side: "k" or "v".
        written: bool [T], for all tiles of the batch; cells with False do not influence the others. None: all written.
    """
    settings = side_config(config, side, x.shape[-1])
    parts = pack(x, settings, written)
    return Coded(unpack(parts, settings), tile_bytes(settings) * math.prod(x.shape[:-2]))


def pack(x: Tensor, side: SideConfig, written: Tensor | None = None, query_square: Tensor | None = None) -> Parts:
    """X [..., T, d] in parts; see `gear_tile`.

    Args:
        query_square: f64 [..., d], the mean square of each channel of the queries, by which rotate "auto" weighs it; None: not known.
    """
    if x.shape[-2:] != (side.n_token, side.d_head):
        raise ConfigError(f"x must be [..., {side.n_token}, {side.d_head}], not {list(x.shape)}")
    x = as_tile(x).clamp(-HALF_MAX, HALF_MAX)
    basis = torch.zeros(*x.shape[:-2], 0, dtype=torch.uint8)
    if side.rotate == "auto":
        basis = choose_basis(x, side, written, query_square)
        x = x * _weights(basis).unsqueeze(-2)
    if side.rotate:
        x = _rotated(x).clamp(-HALF_MAX, HALF_MAX)
    if written is not None:
        x = x.masked_fill(~written.unsqueeze(-1), math.nan)  # NaN marks an entry that D and L need not describe
    mean = _mean_of_rows(x).half().float() if side.center else torch.zeros_like(x[..., 0, :])
    x = (x - mean.unsqueeze(-2)).clamp(-HALF_MAX, HALF_MAX)
    value, index, rest = _filter_outliers(x, side, written)
    dense = _quantize(rest, side)
    a, b = x.new_zeros(*x.shape[:-2], side.rank, side.n_token), x.new_zeros(*x.shape[:-2], side.rank, side.d_head)
    if side.rank:
        dense, a, b = _add_low_rank(rest, dense, side)
    if side.center:  # the mean of what D and L lose: attention averages over tokens, where it would stay
        lost = rest - (_decode(dense, side) + _product(a, b))
        mean = (mean + _mean_of_rows(lost)).clamp(-HALF_MAX, HALF_MAX).half().float()
    return Parts(
        codes=_from_groups(dense.codes, side),
        scale=dense.scale.flatten(-2),
        zero=dense.zero.flatten(-2),
        a=a.transpose(-1, -2),
        b=b.transpose(-1, -2),
        mean=mean,
        outlier_value=value,
        outlier_index=index,
        basis=basis,
    )


def unpack(parts: Parts, side: SideConfig) -> Tensor:
    """X^ = M + D + L with S restored exactly, [..., T, d]."""
    shape = (-1, side.d_head) if side.is_k else (-1, side.n_token)
    dense = _Dense(_to_groups(parts.codes, side), parts.scale.unflatten(-1, shape), parts.zero.unflatten(-1, shape))
    x = _decode(dense, side) + _product(parts.a.transpose(-1, -2), parts.b.transpose(-1, -2))
    if side.n_outlier:
        vectors = x.transpose(-1, -2) if side.is_k else x
        vectors = vectors.scatter(-1, parts.outlier_index, parts.outlier_value)
        x = vectors.transpose(-1, -2) if side.is_k else vectors
    x = x + parts.mean.unsqueeze(-2)
    x = _rotated(x) if side.rotate else x
    x = x / _weights(parts.basis).unsqueeze(-2) if side.rotate == "auto" else x
    return x.clamp(-HALF_MAX, HALF_MAX).contiguous()


def _rotated(x: Tensor) -> Tensor:
    """H: up to 256 channels in blocks of the largest power of two that divides their number; more of them as powers of two, the largest first."""
    d = x.shape[-1]
    runs = [d] if d <= 256 else [1 << bit for bit in reversed(range(d.bit_length())) if d >> bit & 1]
    return torch.cat([hadamard(run) for run in x.split(runs, dim=-1)], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# w, the weights of the channels
# ---------------------------------------------------------------------------------------------------------------------------------------------


def choose_basis(x: Tensor, side: SideConfig, written: Tensor | None = None, query_square: Tensor | None = None) -> Tensor:
    """Exponents e of w = 2^((e - 8) / 2) ~ sqrt(q / s), with feedback s^-0.7, about their median, two to a byte: u8 [..., d / 2].

    s^2 [..., d] is the mean square of what the rows x [..., T, d] of a group lie off their mean, q^2 = query_square (1 / s^2 where it is not known).
    """
    rows = x.double()
    counts = torch.ones(side.n_token, dtype=torch.float64) if written is None else written.double()
    length = side.group if side.is_k else side.n_token
    groups = (rows * counts.unsqueeze(-1)).unflatten(-2, (-1, length))  # [..., n, length, d]
    n = counts.unflatten(0, (-1, length)).sum(-1).unsqueeze(-1)  # [n, 1]
    power = groups.square().sum(-2) - groups.sum(-2).square() / n.clamp_min(1)
    s2 = _lifted(power.clamp_min(0).sum(-2) / n.sum().clamp_min(1))
    q2 = _lifted(1 / s2 if query_square is None else query_square.double())
    ratio = -0.7 * s2.log2() if side.has_feedback else 0.5 * (q2 / s2).log2()
    median = ratio.sort(-1).values[..., side.d_head // 2].unsqueeze(-1)
    exponent = (8 + (ratio - median).round()).clamp(0, 15).to(torch.uint8)
    low, high = exponent.chunk(2, dim=-1)
    return low | high << 4


def _lifted(square: Tensor) -> Tensor:
    return torch.maximum(square, square.amax(-1, keepdim=True) * 1e-9 + 1e-30)


def _weights(basis: Tensor) -> Tensor:
    """w [..., d] of basis [..., d / 2]."""
    exponent = torch.cat([basis & 15, basis >> 4], dim=-1).int() - 8
    root = torch.where(exponent % 2 == 0, 1.0, 2**0.5).float()
    return torch.ldexp(root, torch.div(exponent, 2, rounding_mode="floor"))


# ---------------------------------------------------------------------------------------------------------------------------------------------
# M
# ---------------------------------------------------------------------------------------------------------------------------------------------


def _mean_of_rows(x: Tensor) -> Tensor:
    """[..., d]: the mean over the rows of x [..., T, d] that are not NaN, added up from the first to the last; 0 where there are none."""
    total = torch.zeros_like(x[..., 0, :])
    for row in x.nan_to_num(nan=0.0).unbind(-2):
        total = total + row
    return total / (~x.isnan()).sum(-2).clamp_min(1)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# S
# ---------------------------------------------------------------------------------------------------------------------------------------------


def _filter_outliers(x: Tensor, side: SideConfig, written: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values and places of the lowest and the highest entries of each vector, and x with NaN in their places.

    Of equal entries, the lowest are those that come first and the highest those that come last. Slots that a vector cannot fill hold 0 and point at
    the first cell that was not written.
    """
    vectors = x.transpose(-1, -2) if side.is_k else x  # [..., n_vector, length]
    present = ~vectors.isnan()
    n_present = present.sum(-1, keepdim=True)
    order = vectors.nan_to_num(nan=math.inf).argsort(dim=-1, stable=True)
    slot = torch.arange(side.n_outlier)
    n_low = ((n_present + 1) // 2).clamp_max(side.n_outlier // 2)
    n_high = (n_present // 2).clamp_max(side.n_outlier // 2)
    is_filled = slot < n_low + n_high
    rank = torch.where(slot < n_low, slot, n_present - 1 - (slot - n_low))
    unfilled = int((~written).nonzero()[0]) if side.is_k and written is not None and not written.all() else 0
    index = torch.where(is_filled, order.gather(-1, rank.clamp_min(0)), unfilled)
    value = torch.where(is_filled, vectors.gather(-1, index), 0.0).half().float()
    # A slot that is not filled points at an entry that is NaN already.
    rest = vectors.scatter(-1, index, math.nan) if side.n_outlier else vectors
    return value, index, rest.transpose(-1, -2) if side.is_k else rest


# ---------------------------------------------------------------------------------------------------------------------------------------------
# D
# ---------------------------------------------------------------------------------------------------------------------------------------------


class _Dense(NamedTuple):
    """codes [..., i, j, group] with scale and zero [..., i, j]: i is the token group and j the channel (K), or the channel group and the token (V)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def _to_groups(y: Tensor, side: SideConfig) -> Tensor:
    """[..., T, d] as [..., T / group, d, group] (K) or [..., n_set, T, group] (V, filled up with NaN)."""
    if side.is_k:
        return y.unflatten(-2, (-1, side.group)).transpose(-1, -2)
    missing = -side.d_head % side.group
    y = torch.nn.functional.pad(y, (0, missing), value=math.nan) if missing else y
    return y.unflatten(-1, (-1, side.group)).transpose(-2, -3)


def _from_groups(groups: Tensor, side: SideConfig) -> Tensor:
    """The inverse of `_to_groups`."""
    if side.is_k:
        return groups.transpose(-1, -2).flatten(-3, -2)
    return groups.transpose(-2, -3).flatten(-2)[..., : side.d_head]


def _decode(dense: _Dense, side: SideConfig) -> Tensor:
    """D [..., T, d]"""
    return _from_groups(dense.zero.unsqueeze(-1) + dense.scale.unsqueeze(-1) * dense.codes, side)


def _quantize(y: Tensor, side: SideConfig) -> _Dense:
    """D = Quant_b(Y): the lowest value of a group takes the last code not above it, the highest one the first code not below it."""
    groups = _to_groups(y, side)
    lowest = groups.nan_to_num(nan=math.inf).amin(-1)
    highest = groups.nan_to_num(nan=-math.inf).amax(-1)
    if side.clip < 1:
        lowest, highest = _clip(lowest, highest, side.clip)
    code_ranges = _code_ranges_8 if side.scale_bits == 8 else _code_ranges_16
    scale, zero, low, high = code_ranges(lowest, highest, side)
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)

    def value(code: Tensor) -> Tensor:
        return zero + scale * code

    top = torch.full_like(scale, side.levels).long()
    first = _first_true(torch.zeros_like(top), top, lambda code: value(code + 1) > low)
    last = _first_true(first, top, lambda code: value(code) >= high)
    first, last = (torch.where(scale > 0, code, 0).unsqueeze(-1) for code in (first, last))
    codes = ((groups - zero.unsqueeze(-1)) * inverse.unsqueeze(-1)).round().clamp_max(side.levels)
    codes = torch.where(groups >= highest.unsqueeze(-1), last, codes)
    codes = torch.where(groups <= lowest.unsqueeze(-1), first, codes)
    return _Dense(codes.nan_to_num(nan=0.0), scale, zero)


def _clip(lowest: Tensor, highest: Tensor, share: float) -> tuple[Tensor, Tensor]:
    middle, reach = 0.5 * (lowest + highest), 0.5 * (highest - lowest)
    has_spread = lowest < highest
    return torch.where(has_spread, middle - reach * share, lowest), torch.where(has_spread, middle + reach * share, highest)


def _code_ranges_16(lowest: Tensor, highest: Tensor, side: SideConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zero rounded down to f16; scale the least f16 with which the highest code reaches the highest value."""
    zero = torch.where(lowest < highest, _half_of_bits(_half_bits_down(lowest)), lowest.half().float())
    zero = torch.where(lowest <= highest, zero, 0.0)  # a group without values
    finest = _half_bits_up(zero.abs() * 2**-20).clamp_min(1)  # finer steps could not be told apart after adding zero
    most = torch.full_like(finest, _half_bits(torch.tensor(HALF_MAX)).item())
    bits = _first_true(finest, most, lambda n: zero + _half_of_bits(n) * side.levels >= highest)
    return torch.where(lowest < highest, _half_of_bits(bits), 0.0), zero, lowest, highest


def _code_ranges_8(lowest: Tensor, highest: Tensor, side: SideConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and zero in 8 bits each against the f16 extremes lo and hi of the group's set: zero rounded down, scale up."""
    set_low, set_high = lowest.amin(side.group_axis, keepdim=True), highest.amax(side.group_axis, keepdim=True)
    lo, hi, fewest = _set_range(set_low, set_high, side.levels)
    span = hi - lo

    def zero_of(z: Tensor) -> Tensor:
        return lo + span * z / 255.0

    def scale_of(s: Tensor) -> Tensor:
        return span * s / float(255 * side.levels)

    def snapped(value: Tensor) -> Tensor:
        """The set's own extremes are taken as what is stored for them."""
        return torch.where(value == set_low, lo, torch.where(value == set_high, hi, value))

    is_empty = lowest > highest
    low, high = (torch.where(is_empty, lo, snapped(value)) for value in (lowest, highest))
    nothing = torch.zeros_like(low).long()
    most_z = torch.where(low < high, 255 - fewest, 255)
    z = torch.where(span > 0, _first_true(nothing, most_z, lambda n: zero_of(n + 1) > low), 0)
    zero = zero_of(z)
    s = _first_true(fewest.expand_as(z), 255 - z, lambda n: zero + scale_of(n) * side.levels >= high)
    scale = scale_of(torch.where((span > 0) & (low < high), s, 0))
    return scale, zero, low, high


def _set_range(lowest: Tensor, highest: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """lo and hi, whole multiples of the f16 spacing at the larger of them, and the least s that makes a difference to zero."""
    forgiven = highest - torch.maximum(lowest.abs(), highest.abs()) * 2**-20  # a decoded hi may be a few roundings too high
    larger = torch.maximum(_half_of_bits(_half_bits_down(lowest)).abs(), _half_of_bits(_half_bits_up(forgiven)).abs())
    exponent = torch.frexp(larger).exponent - 1
    spacing = ((exponent - 10).clamp_min(-24) + 127 << 23).to(torch.int32).view(torch.float32)  # two to that power
    has_spread = lowest < highest
    only = torch.where(lowest == highest, lowest, 0.0).half().float()
    lo = torch.where(has_spread, (lowest / spacing).floor() * spacing, only)
    hi = torch.where(has_spread, (forgiven / spacing).ceil() * spacing, only)
    finest = (float(255 * levels) * spacing / (1024.0 * (hi - lo))).ceil()
    return lo, hi, torch.where(lo < hi, finest, 1.0).clamp_min(1).long()


def _first_true(first: Tensor, last: Tensor, predicate: Callable[[Tensor], Tensor]) -> Tensor:
    """The least whole n from first to last for which a predicate that stays true is true, or last; last where first is beyond it."""
    first = torch.minimum(first, last)
    for _ in range(16):  # ranges have fewer than 2^16 entries
        middle = (first + last) // 2
        is_true = predicate(middle)
        first, last = torch.where(is_true, first, torch.minimum(middle + 1, last)), torch.where(is_true, middle, last)
    return last


def _half_bits(x: Tensor) -> Tensor:
    """The bits of x rounded to f16, as whole numbers; negative for a negative sign."""
    return x.half().view(torch.int16).long()


def _half_of_bits(bits: Tensor) -> Tensor:
    """The f16 of these bits, as float32."""
    return bits.to(torch.int16).view(torch.float16).float()


def _half_bits_down(x: Tensor) -> Tensor:
    """The nearest f16 that is not above x."""
    bits = _half_bits(x)
    below = torch.where(bits < 0, bits + 1, torch.where(bits == 0, -(2**15) + 1, bits - 1))
    return torch.where(_half_of_bits(bits) > x, below, bits)


def _half_bits_up(x: Tensor) -> Tensor:
    """The nearest f16 that is not below x."""
    return (_half_bits_down(-x).to(torch.int16) ^ -(2**15)).long()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# L
# ---------------------------------------------------------------------------------------------------------------------------------------------


def _add_low_rank(x: Tensor, dense: _Dense, side: SideConfig) -> tuple[_Dense, Tensor, Tensor]:
    """L for the D at hand, then in each further round a D that leaves to L what L holds, and a new L. A tile that L does not improve keeps none."""
    plain, y = dense, x
    for number in range(side.rounds):
        dense = dense if number == 0 else _quantize(y, side)
        decoded = _decode(dense, side)
        a, b = _stored_factors(*_power_iteration((x - decoded).nan_to_num(nan=0.0), side), side)
        y = (x - _product(a, b)).clamp(-HALF_MAX, HALF_MAX)
    is_better = _squared_error(y, decoded) < _squared_error(x, _decode(plain, side))  # [..., 1, 1]
    chosen = _Dense(
        *(torch.where(is_better if part.ndim == x.ndim else is_better.unsqueeze(-1), part, kept) for part, kept in zip(dense, plain, strict=True))
    )
    return chosen, torch.where(is_better, a, 0.0), torch.where(is_better, b, 0.0)


def _squared_error(y: Tensor, decoded: Tensor) -> Tensor:
    return (y.double() - decoded.double()).square().nansum((-1, -2), keepdim=True)


def _power_iteration(residual: Tensor, side: SideConfig) -> tuple[Tensor, Tensor]:
    """A [..., r, T] and B [..., r, d] of residual [..., T, d]: algorithm 2, with both orthonormal in every pass, which spans the same spaces."""
    b = _random_start(side.seed, side.rank, side.d_head).expand(*residual.shape[:-2], side.rank, side.d_head)
    for _ in range(N_PASS):
        b = _orthonormalize(b)
        a = _orthonormalize(_dot(residual.unsqueeze(-3), b.unsqueeze(-2)))
        b = torch.zeros_like(b)
        for t in range(side.n_token):
            b = b + a[..., t : t + 1] * residual[..., t : t + 1, :]
    return a, b


def _random_start(seed: int, rank: int, d: int) -> Tensor:
    """Sums of four uniform numbers of 16 bits, from splitmix64."""
    mask = 2**64 - 1
    state, numbers = seed, []
    for _ in range(rank * d):
        state = bits = state + 0x9E3779B97F4A7C15 & mask
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
        bits ^= bits >> 31
        numbers.append((sum(bits >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 2 * 0xFFFF) / 65536)
    return torch.tensor(numbers, dtype=torch.float32).reshape(rank, d)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x y over the last axis, in 16 partial sums that are then halved."""
    products = (x * y).unflatten(-1, (-1, N_PARTIAL))
    partial = products[..., 0, :]
    for i in range(1, products.shape[-2]):
        partial = partial + products[..., i, :]
    while partial.shape[-1] > 1:
        first, second = partial.chunk(2, dim=-1)
        partial = first + second
    return partial.squeeze(-1)


def _orthonormalize(m: Tensor) -> Tensor:
    """The rows of m [..., r, n] by Gram-Schmidt, two passes each; a row that adds nothing to those before becomes zero."""
    done: list[Tensor] = []
    for row in m.unbind(-2):
        before = _dot(row, row)
        for _ in range(2):
            for other in done:
                row = row - _dot(row, other).unsqueeze(-1) * other
        after = _dot(row, row)
        norm = after.double().sqrt().float()  # torch's float32 square root is not always the nearest number
        factor = torch.where((after > 1e-10 * before) & (after > 1e-30), norm.reciprocal(), 0.0)
        done.append(row * factor.unsqueeze(-1))
    return torch.stack(done, dim=-2)


def _stored_factors(a: Tensor, b: Tensor, side: SideConfig) -> tuple[Tensor, Tensor]:
    """A with the columns' scale in it and B as they are read back: whole numbers up to 127 or 7."""
    limit = 127.0 if side.factor_bits == 8 else 7.0
    largest_a, largest_b = (m.abs().amax(-1, keepdim=True) for m in (a, b))
    sigma = largest_a / limit * (largest_b / limit)
    whole_a, whole_b = (torch.where(top > 0, m / top * limit, 0.0).round() for m, top in ((a, largest_a), (b, largest_b)))
    return sigma * whole_a, whole_b


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A B^T [..., T, d] of a [..., r, T] and b [..., r, d], one rank after the other."""
    product = a.new_zeros(*a.shape[:-2], a.shape[-1], b.shape[-1])
    for k in range(a.shape[-2]):
        product = product + a[..., k, :].unsqueeze(-1) * b[..., k, :].unsqueeze(-2)
    return product


def _aligned(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
