"""GEAR as published: X ~ D + L + S (Kang et al., arXiv 2403.05527; PMLR 262:305-321).

v4 (September 2024) quantizes in groups (per-token, KCVT or KIVI), keeps a share s of every vector exactly (S) and models the residual of each head
with rank r (L). v1 (March 2024) does all of it on the whole matrix. Where the released code departs from the paper, the paper is followed; the
docstrings say where that matters. Our own codec, which differs in how things are stored, is `gearcpp.reference.methods.gear_tile`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from .quantizers import kcvt, kivi, per_token, round_to_nearest
from .tensors import HALF_BYTES, Coded, as_tile, check_bits, half, side_axis

BACKBONES = ("per-token", "kcvt", "kivi")
FILLS = ("mean", "middle", "zero")


def outliers_per_side(sparsity: float, length: int) -> int:
    """round(s/2 * length): how many of a vector's largest entries are kept exactly, and as many of its smallest."""
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity must be from 0 to below 1, not {sparsity!r}")
    return math.floor(sparsity / 2 * length + 0.5)


def outlier_mask(x: Tensor, sparsity: float, axis: int) -> Tensor:
    """Filter_s of equation 4: true at the s/2 largest and the s/2 smallest entries (signed, not by magnitude) of each vector along an axis.

    The count comes from the length of that axis. The released v4 code takes it from the hidden size for K too, which keeps far more
    than s of a short chunk.

    Args:
        x: [..., n, d].
        axis: -2: vectors are channels (K); -1: vectors are tokens (V).

    Returns:
        bool, the shape of x.
    """
    count = outliers_per_side(sparsity, x.shape[axis])
    mask = torch.zeros_like(x, dtype=torch.bool)
    if count:
        mask.scatter_(axis, x.topk(count, axis, largest=True).indices, True)
        mask.scatter_(axis, x.topk(count, axis, largest=False).indices, True)
    return mask


def fill_outliers(x: Tensor, mask: Tensor, axis: int, fill: str = "mean") -> Tensor:
    """X - S with the removed places filled, so that they do not widen a group.

    Args:
        fill: "mean" of the vector (the v4 code), its "middle" (max + min) / 2, or "zero" (the v1 code); all over the entries that stay.
    """
    if fill not in FILLS:
        raise ConfigError(f"fill must be one of {', '.join(FILLS)}, not {fill!r}")
    if fill == "zero":
        return x.masked_fill(mask, 0.0)
    if fill == "mean":
        value = x.masked_fill(mask, 0.0).sum(axis, keepdim=True) / (~mask).sum(axis, keepdim=True).clamp_min(1)
    else:
        highest = x.masked_fill(mask, -math.inf).amax(axis, keepdim=True)
        lowest = x.masked_fill(mask, math.inf).amin(axis, keepdim=True)
        value = (highest + lowest) / 2
    return torch.where(mask, value, x)


def outlier_bytes(n_outlier: int, length: int) -> int:
    """S stored as f16 values and places within their vectors of ``length`` entries: one byte each up to 256, two up to 65536, four beyond.

    The paper speaks of a value vector and two index vectors; counts per vector are fixed here, so that one index is enough.
    """
    index_bytes = 1 if length <= 2**8 else 2 if length <= 2**16 else 4
    return n_outlier * (HALF_BYTES + index_bytes)


class LowRank(NamedTuple):
    """L = A B^T: A [..., n, r], B [..., d, r]."""

    a: Tensor
    b: Tensor

    @property
    def product(self) -> Tensor:
        """[..., n, d]"""
        return self.a @ self.b.transpose(-1, -2)


def low_rank(residual: Tensor, rank: int, loops: int = 3, seed: int = 1) -> LowRank:
    """SVDSolver_r, algorithm 2 of appendix 8 (a power iteration as in PowerSGD), for every matrix of the batch on its own.

    For each loop: on the last one B is made orthonormal; A = R B; on the last one A is made orthonormal; B = R^T A. So A is orthonormal and
    B carries the scale. The released code starts from uniform numbers without a seed; here B starts from normal ones with a fixed seed.

    Args:
        residual: R, [..., n, d].
        rank: r, at most min(n, d).
    """
    n, d = residual.shape[-2:]
    if not 0 <= rank <= min(n, d):
        raise ConfigError(f"rank must be from 0 to {min(n, d)} for a {n} x {d} matrix, not {rank}")
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(d, rank, generator=generator).to(residual).expand(*residual.shape[:-2], d, rank)
    a = residual.new_zeros(*residual.shape[:-2], n, rank)
    for loop in range(loops if rank else 0):
        last = loop == loops - 1
        b = torch.linalg.qr(b).Q if last else b
        a = residual @ b
        a = torch.linalg.qr(a).Q if last else a
        b = residual.transpose(-1, -2) @ a
    return LowRank(a, b)


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """[..., n, n_head * d_head] as [..., n_head, n, d_head]."""
    if x.shape[-1] % n_head:
        raise ConfigError(f"{x.shape[-1]} channels cannot be split into {n_head} heads")
    return x.unflatten(-1, (n_head, -1)).transpose(-2, -3)


def join_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return x.transpose(-2, -3).flatten(-2)


def _backbone(x: Tensor, side: str, bits: int, backbone: str, group: int) -> Coded:
    if backbone == "per-token":
        return per_token(x, bits, group)
    if backbone == "kcvt":
        return kcvt(x, side, bits)
    if backbone == "kivi":
        return kivi(x, side, bits, group)
    raise ConfigError(f"backbone must be one of {', '.join(BACKBONES)}, not {backbone!r}")


def gear(
    x: Tensor,
    side: str,
    bits: int,
    *,
    backbone: str | None = None,
    group: int = 64,
    rank: int = 4,
    sparsity: float = 0.02,
    n_head: int = 1,
    fill: str = "mean",
    rounds: int = 1,
    seed: int = 1,
) -> Coded:
    """GEAR v4, section 3: S = Filter_s(X), D = Quant_b(X - S), R = X - (D + S), L_h = A_h B_h^T of each head's R.

    The paper's settings: s = 2 %, r = 4 for a prompt and 2 for a chunk of decoded tokens; KCVT at 4 bits, KIVI with g = 64 at 2 bits.

    Args:
        x: X, [..., n, n_head * d_head].
        backbone: "per-token", "kcvt" or "kivi"; None: the paper's choice for these bits (KIVI below 4 bits, KCVT from 4 on).
        rank: r of each head; 0 leaves L out.
        sparsity: s; 0 leaves S out (GEAR-L).
        rounds: alternating rounds D = Quant_b(X - S - L), L = lowrank(X - S - D), section 3's objective; 1 is GEAR. Offered by the v1 code.

    Returns:
        D + L with the outliers restored exactly (to f16). Bytes: the backbone's, f16 factors r (n + d_head) of each head, and S.
    """
    tile = as_tile(x)
    axis = side_axis(side)
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, not {rounds}")
    backbone = backbone or ("kivi" if bits < 4 else "kcvt")
    mask = outlier_mask(tile, sparsity, axis)
    filled = fill_outliers(tile, mask, axis, fill) if sparsity else tile
    model = torch.zeros_like(tile)
    for _ in range(rounds):
        coded = _backbone(filled - model, side, bits, backbone, group)
        if rank == 0:
            break
        residual = (filled - coded.xhat).masked_fill(mask, 0.0)
        factors = low_rank(split_heads(residual, n_head), rank, seed=seed)
        model = join_heads(LowRank(half(factors.a), half(factors.b)).product)
    n_matrix = math.prod(tile.shape[:-2]) * n_head
    factor_bytes = HALF_BYTES * rank * (tile.shape[-2] + tile.shape[-1] // n_head) * n_matrix
    n_bytes = coded.n_bytes + factor_bytes + outlier_bytes(int(mask.sum()), tile.shape[axis])
    return Coded(torch.where(mask, half(tile), coded.xhat + model), n_bytes)


def gear_l(x: Tensor, side: str, bits: int, **settings: object) -> Coded:
    """GEAR-L: `gear` without S."""
    return gear(x, side, bits, sparsity=0.0, **settings)  # type: ignore[arg-type]


def outlier_reduced(x: Tensor, bits: int, sparsity: float = 0.02) -> Coded:
    """Outlier-reduced quantization (GEAR v1, arXiv 2403.05527v1, section 3): one Delta and one min for the whole matrix after its outliers were removed.

    The s/2 largest and s/2 smallest entries of the flattened matrix are kept, and zeros stand in their places when the range is taken.
    x: [..., n, d].
    """
    return gear_v1(x, bits, sparsity=sparsity, rank_share=0.0)


def gear_v1(x: Tensor, bits: int, *, sparsity: float = 0.02, rank_share: float = 0.02, seed: int = 1) -> Coded:
    """GEAR v1: outlier-reduced quantization of the whole matrix and a low-rank model of its residual, not split into heads.

    Args:
        x: X, [..., n, d].
        rank_share: r = int(share * min(n, d)), at least 1 unless the share is 0.

    Returns:
        Bytes: codes, two f16 for each matrix, f16 factors r (n + d), S with indices into the flattened matrix.
    """
    tile = as_tile(x)
    check_bits(bits)
    if not 0 <= rank_share <= 1:
        raise ConfigError(f"rank_share must be from 0 to 1, not {rank_share!r}")
    n, d = tile.shape[-2:]
    flat = tile.flatten(-2).unsqueeze(-2)  # [..., 1, n * d]
    mask = outlier_mask(flat, sparsity, -1)
    coded = round_to_nearest(fill_outliers(flat, mask, -1, "zero"), bits, -1)
    dense = coded.xhat.reshape(tile.shape)
    mask = mask.reshape(tile.shape)
    rank = max(1, int(rank_share * min(n, d))) if rank_share else 0
    factors = low_rank((tile - dense).masked_fill(mask, 0.0), rank, seed=seed)
    model = LowRank(half(factors.a), half(factors.b)).product
    factor_bytes = HALF_BYTES * rank * (n + d) * math.prod(tile.shape[:-2])
    n_bytes = coded.n_bytes + factor_bytes + outlier_bytes(int(mask.sum()), n * d)
    return Coded(torch.where(mask, half(tile), dense + model), n_bytes)
