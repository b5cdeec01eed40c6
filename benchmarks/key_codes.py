"""Which code for keys and values makes attention err least, at equal bits: the tables of docs/coding-keys.md.

    python benchmarks/key_codes.py record MODEL.gguf TEXT_FILE ROWS.npz [--tokens 3072] [--layers 12]
    python benchmarks/key_codes.py table QUESTION ROWS.npz ... [--every 5]

`record` keeps the queries and keys (after RoPE) and the values of the first layers, as llama.cpp computes them. `table` codes every head of every so many
layers and prints what each code does to attention; QUESTION is a name in QUESTIONS, or "all". The codes learn from what a cache has seen when it packs.
They are judged by queries from token 1024 on, which see what a cache would have packed by then: whole tiles of 256 tokens, but for the first 4 and the
last 128 or more. Two figures, means over the heads:

    KL      Kullback-Leibler divergence of a query's attention weights, in 1e-6 nats
    output  squared error of attention's output in 1e-6 of its square

The codes are written out in numpy; scales and zeros have 8 bits against the extremes of their channel in the tile, as native/codec/ranges.h rounds them,
but for the codes of a group's ends.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

TILE, N_TAIL, N_SINK = 256, 128, 4
UBATCH = 512
STRETCH = 128  # tokens whose queries are summed up together
FIRST_JUDGED, STEP_JUDGED = 1024, 64


# ---------------------------------------------------------------------------------------------------------------------------------------------
# record
# ---------------------------------------------------------------------------------------------------------------------------------------------


class GgmlTensor(ctypes.Structure):
    """The head of ``struct ggml_tensor`` (ggml 0.9 to 0.26), as far as its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


def rows_of(tensor: GgmlTensor) -> npt.NDArray[np.float16]:
    """A copy of an f32 tensor of up to three dimensions, the slowest first."""
    n_bytes = sum((n - 1) * stride for n, stride in zip(tensor.ne[:3], tensor.nb[:3], strict=True)) + 4
    numbers = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float)), (n_bytes // 4,))
    return np.lib.stride_tricks.as_strided(numbers, tensor.ne[2::-1], tensor.nb[2::-1]).astype(np.float16)


def record(model_path: Path, text: Path, out: Path, n_token: int, n_layer: int) -> None:
    """Write q0, k0, v0, q1, ...: f16 [n_token, n_head, d_head] of the first layers."""
    import llama_cpp

    found: dict[str, npt.NDArray[np.float16]] = {}
    parts: dict[str, list[npt.NDArray[np.float16]]] = {}

    def look(address: int, is_question: bool, _: object) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(GgmlTensor)).contents
        match = re.fullmatch(r"([QKV])cur-(\d+)", tensor.name.decode())
        if match and int(match[2]) >= n_layer:
            return is_question  # no more is computed
        if match and not is_question:
            found[match[1].lower() + match[2]] = rows_of(tensor)  # several steps share a name; the last of them is what attention gets
        return bool(match) or not is_question

    fields = llama_cpp.llama_context_default_params()
    fields.n_ctx, fields.n_batch, fields.n_ubatch, fields.flash_attn_type = n_token, UBATCH, UBATCH, 1
    callback = llama_cpp.ggml_backend_sched_eval_callback(look)  # lives as long as the context
    fields.cb_eval = callback
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(model_path).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, fields)
    written = text.read_bytes()[: 8 * n_token]
    tokens = (llama_cpp.llama_token * len(written))()
    n_found = llama_cpp.llama_tokenize(llama_cpp.llama_model_get_vocab(model), written, len(written), tokens, len(tokens), True, False)
    if n_found < n_token or n_token % UBATCH:
        raise SystemExit(f"--tokens must be a multiple of {UBATCH}, and the text must have as many (found: {n_found})")
    for first in range(0, n_token, UBATCH):
        batch = (llama_cpp.llama_token * UBATCH)(*tokens[first : first + UBATCH])
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(batch, UBATCH)):
            raise SystemExit("llama_decode failed")
        for name, rows in found.items():
            parts.setdefault(name, []).append(rows)
        print(f"{first + UBATCH} of {n_token} tokens", file=sys.stderr, flush=True)
    whole = {name: np.concatenate(some) for name, some in parts.items()}
    for name in [name for name in whole if name[0] == "v"]:
        whole[name] = whole[name].reshape(whole["k" + name[1:]].shape)
    np.savez(out, **whole)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Heads, and what a code does to their attention
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Head:
    """A KV head and the queries that share it.

    Attributes:
        k, v: [n, d], without the tokens behind the last whole tile.
        moments: [n / STRETCH, d, d], mean of q q^T / d over the queries of a stretch of tokens.
        queries: [n, n_share, d], all of them.
        judged: [m, d] some later ones / sqrt(d).
        seen, packed: [m, n], keys that each of them sees, and those of them that are packed by then.
        log_p: [m, n] logarithms of its attention weights.
        out: [m, d] attention's output.
    """

    layer: int
    k: F32
    v: F32
    moments: F64
    queries: F32
    judged: F32
    seen: Bools
    packed: Bools
    log_p: F32
    out: F32

    @property
    def d(self) -> int:
        return self.k.shape[1]


def log_softmax(scores: F32) -> F32:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float32)


def load_heads(path: Path, every: int) -> list[Head]:
    """The heads of every so many layers. Gemma's names say which of its layers have windows of 512."""
    file = np.load(path)
    heads = []
    for layer in range(1 if every > 1 else 0, sum(name[0] == "k" for name in file.files), every):
        q, k, v = (file[f"{side}{layer}"].astype(np.float32) for side in "qkv")
        n, n_head, d = k.shape
        n_share, window = q.shape[1] // n_head, 512 if "gemma" in path.name and layer % 6 < 5 else n
        tokens = np.arange(FIRST_JUDGED + layer % STEP_JUDGED, n, STEP_JUDGED)
        last, cells = np.repeat(tokens, n_share)[:, None], np.arange(n)[None]
        seen = (cells <= last) & (cells > last - window)
        packed = (cells < (last - N_TAIL) // TILE * TILE) & (cells >= N_SINK)
        for head in range(n_head):
            queries = q[:, head * n_share : (head + 1) * n_share]
            parts = queries.reshape(n // STRETCH, -1, d)
            moments = np.stack([part.T @ part for part in parts]).astype(np.float64) / (STRETCH * n_share * d)
            judged = (queries[tokens] / np.sqrt(d)).reshape(-1, d)
            log_p = log_softmax(np.where(seen, judged @ k[:, head].T, -1e30).astype(np.float32))
            heads.append(Head(layer, k[:, head], v[:, head], moments, queries, judged, seen, packed, log_p, np.exp(log_p) @ v[:, head]))
    return heads


def harm(head: Head, k: F32 | None = None, v: F32 | None = None) -> tuple[float, float]:
    """KL and output error in 1e-6 when keys and values become k and v [n, d]; None: they stay."""
    log_p = head.log_p
    if k is not None:
        scores = np.where(head.packed, head.judged @ k.T, head.judged @ head.k.T)
        log_p = log_softmax(np.where(head.seen, scores, -1e30).astype(np.float32))
    p = np.exp(log_p)
    out = p @ head.v if v is None else p @ head.v + np.where(head.packed, p, 0) @ (v - head.v)
    kl = np.where(head.seen, np.exp(head.log_p) * (head.log_p - log_p), 0).sum(axis=1).mean()
    return 1e6 * float(kl), 1e6 * float(np.square(out - head.out).sum() / np.square(head.out).sum())


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Codes
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """How the keys of a head are coded.

    Attributes:
        bits: of a code; with ``by_block`` on average.
        clip: groups are shrunk to this share of their range; 0: chosen per head on its first tile by the squared error of scores.
        group: consecutive tokens that share scale and zero.
        basis: what is coded, y = B k. "none", "H": a Hadamard rotation; "Hw": the same of weighed channels; "metric": H after a root of the queries'
            moment; "eigen": eigenvectors in that metric, each block of 16 rotated within.
        of_query, of_spread: "Hw" weighs channel c with q_c^of_query / s_c^of_spread (native/codec/basis.h has 0.5 and 0.5).
        by_block: with "eigen": bits 0 to 6 for each block of 16, where they lessen the error most.
        exact: with "eigen": so many of the first directions have 8 bits.
        feedback: the error of a channel is taken into account when the next ones are rounded.
        moment: queries that feedback knows: "first" 512 tokens', "running": all until the tile is packed, "later": those it is judged by (nothing can
            know them).
        shrink: share of the moment's diagonal in what is taken for it.
        damp: what is added to the metric's diagonal, in shares of its mean.
        sweeps: of `quantize_with_feedback`.
        n_fit: of `Grid`.
    """

    bits: float = 2
    clip: float = 0.85
    group: int = 32
    scale_bits: int = 8
    basis: str = "Hw"
    of_query: float = 0.5
    of_spread: float = 0.5
    by_block: bool = False
    exact: int = 0
    feedback: bool = False
    moment: str = "running"
    shrink: float = 0.3
    damp: float = 0.05
    sweeps: int = 0
    n_fit: int = 0

    def grid(self, bits: int, clip: float) -> Grid:
        return Grid(bits, clip, self.group, self.scale_bits, TILE // self.group, self.n_fit)

    def bits_per_element(self, d: int) -> float:
        """Everything counted; matrices of a basis, f16, at a context of 8192."""
        whole = {"none": 0.0, "H": 0.0, "Hw": 4 / TILE, "metric": 16 * d / 8192, "eigen": 16 * d / 8192}[self.basis]
        sides = 2 * self.scale_bits / self.group + (32 / TILE if self.scale_bits == 8 else 0)
        return self.bits + (8 - self.bits) * self.exact / d + sides + whole


def of_bits(bits: float) -> Code:
    """Keys as the presets gear, gear3 and gear2 have them."""
    return Code(bits, {4: 1.0, 3: 0.95, 2: 0.85}[int(bits)])


@dataclass(frozen=True)
class Grid:
    """What the groups along the last axis are rounded to: zero + scale * (0 ... 2^bits - 1).

    Attributes:
        bits: of a code.
        clip: groups are shrunk to this share of their range.
        group: numbers that share scale and zero.
        scale_bits: 8, against the extremes of a set, or 16 (taken as exact).
        n_set: groups of a set.
        n_fit: how often zero and scale are fitted to the codes that they gave, by least squares.
    """

    bits: int
    clip: float
    group: int
    scale_bits: int = 8
    n_set: int = TILE // 32
    n_fit: int = 0

    def ranges(self, y: F32) -> tuple[F32, F32]:
        """Zero and scale of y [..., n]: [..., n / (n_set * group), n_set, 1]."""
        groups = y.reshape(*y.shape[:-1], -1, self.n_set, self.group)
        if self.bits == 0:
            return groups.mean(-1, keepdims=True), np.ones_like(groups[..., :1])
        levels = 2**self.bits - 1
        lowest, highest = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        middle, half = (lowest + highest) / 2, (highest - lowest) / 2 * self.clip
        low, high = middle - half, middle + half
        for _ in range(self.n_fit):
            scale = np.maximum(high - low, 1e-12) / levels
            codes = np.clip(np.rint((groups - low) / scale), 0, levels)
            of_codes, of_groups = codes.mean(-1, keepdims=True), groups.mean(-1, keepdims=True)
            spread = ((codes - of_codes) ** 2).mean(-1, keepdims=True)
            slope = ((codes - of_codes) * (groups - of_groups)).mean(-1, keepdims=True) / np.maximum(spread, 1e-9)
            scale = np.where(spread > 1e-9, np.maximum(slope, 1e-12), scale)
            low = of_groups - scale * of_codes
            high = low + levels * scale
        if self.scale_bits != 8:
            return low, np.maximum(high - low, 1e-12) / levels
        lo = low.min(-2, keepdims=True)
        span = np.maximum(high.max(-2, keepdims=True) - lo, 1e-12)
        zero = lo + span * np.floor((low - lo) / span * 255 + 1e-4) / 255
        return zero, span * np.clip(np.ceil((high - zero) / span * 255 - 1e-4), 1, 255) / (255 * levels)

    def rounded(self, y: F32, ranges: tuple[F32, F32]) -> F32:
        zero, scale = ranges
        codes = np.clip(np.rint((y.reshape(*y.shape[:-1], -1, self.n_set, self.group) - zero) / scale), 0, 2**self.bits - 1)
        return np.asarray((zero + scale * codes).reshape(y.shape), np.float32)

    def quantized(self, y: F32) -> F32:
        return self.rounded(y, self.ranges(y))


def feedback_matrix(metric: F64, damp: float) -> F32:
    """M [d, d], lower triangular with ones, of metric = M^T P M with P diagonal.

    The error e of a row costs e^T metric e = sum_c p_c (e_c + sum_{j < c} M_cj e_j)^2. So channel c is rounded as if it were y_c + sum_{j < c} M_cj e_j,
    with e_j = y_j - D_j: what is left is that rounding, times p_c, and the product of all p is the metric's determinant, whatever the order.
    """
    d = len(metric)
    damped = metric + damp * np.trace(metric) / d * np.eye(d)
    root = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1].T  # damped = root^T root
    return np.asarray(root / np.diag(root)[:, None], np.float32)


def quantize_with_feedback(y: F32, metric: F64, damp: float, grid: Grid, sweeps: int) -> F32:
    """D of y [d, n], row by row (`feedback_matrix`). Each sweep then rounds every row again for the errors of all others, in the ranges that it has."""
    matrix, damped = feedback_matrix(metric, damp), metric + damp * np.trace(metric) / len(metric) * np.eye(len(metric))
    coded, error, ranges = np.empty_like(y), np.zeros_like(y), []
    for c in range(len(y)):
        wanted = y[c] + matrix[c, :c] @ error[:c]
        ranges.append(grid.ranges(wanted))
        coded[c] = grid.rounded(wanted, ranges[c])
        error[c] = y[c] - coded[c]
    others = np.asarray(damped / np.diag(damped)[:, None] - np.eye(len(y)), np.float32)
    for _ in range(sweeps):
        for c in range(len(y)):
            coded[c] = grid.rounded(y[c] + others[c] @ error, ranges[c])
            error[c] = y[c] - coded[c]
    return coded


def hadamard(d: int) -> F64:
    h = np.ones((1, 1))
    while len(h) < d:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(d)


def within_groups(x: F32, group: int) -> F64:
    """Covariance of rows x [TILE, d] about the means of their groups."""
    parts = x.reshape(-1, group, x.shape[1]).astype(np.float64)
    rows = (parts - parts.mean(axis=1, keepdims=True)).reshape(x.shape)
    return np.asarray(rows.T @ rows / len(rows))


def moment_of(head: Head, code: Code, n_token: int) -> F64:
    """The queries' second moment, as known when a tile is packed after n_token tokens."""
    n = {"first": 512 // STRETCH, "running": max(n_token, 512) // STRETCH, "later": 0}[code.moment]
    moment = head.moments[:n].mean(axis=0) if n else head.moments[FIRST_JUDGED // STRETCH :].mean(axis=0)
    return np.asarray((1 - code.shrink) * moment + code.shrink * np.diag(np.diag(moment)))


def basis_of(head: Head, code: Code) -> tuple[F64, F64]:
    """B [d, d], and its eigenvalues if it has some. Learned from the first tile and the first 512 tokens' queries."""
    d, moment = head.d, head.moments[: 512 // STRETCH].mean(axis=0)
    if code.basis in ("none", "H"):
        return (np.eye(d) if code.basis == "none" else hadamard(d)), np.ones(d)
    if code.basis == "Hw":
        q, s = np.diag(moment), np.diag(within_groups(head.k[:TILE], code.group))
        exponent = (code.of_query * np.log2(np.maximum(q, q.max() * 1e-9)) - code.of_spread * np.log2(np.maximum(s, s.max() * 1e-9))) / 2
        return hadamard(d) * 2.0 ** (np.clip(np.rint(2 * (exponent - np.median(exponent))), -8, 7) / 2), np.ones(d)
    shrunk = (1 - code.shrink) * moment + code.shrink * np.diag(np.diag(moment))
    values, vectors = np.linalg.eigh(shrunk + code.damp * np.trace(shrunk) / d * np.eye(d))
    root = vectors * np.sqrt(values) @ vectors.T
    if code.basis == "metric":
        return hadamard(d) @ root, np.ones(d)
    values, vectors = np.linalg.eigh(root @ within_groups(head.k[:TILE], code.group) @ root)
    blocks = np.kron(np.eye(d // 16), hadamard(16))
    if code.exact:  # these are not mixed with others
        blocks[:16] = np.eye(d)[:16]
    return blocks @ vectors[:, ::-1].T @ root, values[::-1]


def bits_by_block(values: F64, bits: float) -> list[int]:
    """Bits of each block of 16 channels, given one by one to the block whose error they lessen most."""
    power = values.reshape(-1, 16).mean(axis=1)
    given = np.zeros(len(power), int)
    for _ in range(round(bits * len(power))):
        given[int(np.argmax(np.where(given < 6, power * 4.0**-given, -1)))] += 1
    return [int(n) for n in given]


def code_keys(head: Head, code: Code) -> F32:
    """The keys as they come out of the code, [n, d]."""
    whole = len(head.k) // TILE * TILE
    basis, values = basis_of(head, code)
    back = np.linalg.inv(basis)
    y = np.ascontiguousarray((basis @ head.k[:whole].T).astype(np.float32))
    clip = code.clip or best_clip(head, code)
    grid = code.grid(int(code.bits), clip)
    if code.feedback:
        coded = np.empty_like(y)
        for first in range(0, whole, TILE):
            metric = back.T @ moment_of(head, code, min(first + TILE + N_TAIL, len(head.k))) @ back
            coded[:, first : first + TILE] = quantize_with_feedback(y[:, first : first + TILE], metric, code.damp, grid, code.sweeps)
    elif code.by_block:
        widths = np.repeat(bits_by_block(values, code.bits), 16)
        coded = np.stack([code.grid(int(width), clip).quantized(row) for row, width in zip(y, widths, strict=True)])
    else:
        coded = grid.quantized(y)
    if code.exact:
        coded[: code.exact] = code.grid(8, 1).quantized(y[: code.exact])
    keys = head.k.copy()
    keys[:whole] = (back @ coded).T
    return keys


def best_clip(head: Head, code: Code) -> float:
    """The clip with the least squared error of scores on the first tile, by the queries' moment."""
    first = replace(head, k=head.k[:TILE])

    def error(clip: float) -> float:
        lost = code_keys(first, replace(code, clip=clip, moment="first")) - first.k
        return float(np.einsum("ti,ij,tj->", lost, head.moments[: 512 // STRETCH].mean(axis=0), lost))

    return min((0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0), key=error)


@dataclass(frozen=True)
class ValueCode:
    """How the values of a head are coded: rotated, less their mean in the tile, one scale and zero a token.

    Attributes:
        feedback: "": values are rounded to the nearest; the error of a token is taken into account when the next ones are rounded, by the second moment of
            the attention weights that queries give to the tokens of a tile. "known": the queries of the 128 tokens behind the tile; "later": those it is
            judged by; "near": none, but neighbours are taken to get like weights, half of it e^(-distance / 8).
        n_fit: of `Grid`.
    """

    bits: int = 2
    clip: float = 0.8
    feedback: str = ""
    damp: float = 0.3
    n_fit: int = 0

    def bits_per_element(self, d: int) -> float:
        return self.bits + 16 / d + 16 / TILE + 32 / TILE / d


def attention_moment(head: Head, first: int, which: str) -> F64:
    """Mean of p p^T over queries, p their weights of the tile's tokens: [TILE, TILE]."""
    cells = slice(first, first + TILE)
    if which == "near":
        tokens = np.arange(TILE)
        return 0.5 * np.eye(TILE) + 0.5 * np.exp(-np.abs(tokens[:, None] - tokens[None]) / 8)
    if which == "later":
        use = head.packed[:, first + TILE - 1] & head.seen[:, first]
        p = np.exp(head.log_p[use][:, cells]) if use.any() else np.eye(TILE, dtype=np.float32)
    else:
        end = first + TILE + N_TAIL
        queries = head.queries[first + TILE : end].reshape(-1, head.d) / np.sqrt(head.d)
        scores = queries @ head.k[:end].T
        causal = np.arange(end)[None] <= np.repeat(np.arange(first + TILE, end), head.queries.shape[1])[:, None]
        p = np.exp(log_softmax(np.where(causal, scores, -1e30).astype(np.float32)))[:, cells]
    p = p.astype(np.float64) / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-6)  # of like weight each
    return np.asarray(p.T @ p / len(p))


def code_values(head: Head, code: ValueCode) -> F32:
    """The values as they come out of the code, [n, d]."""
    d, h, values = head.d, hadamard(head.d), head.v.copy()
    for first in range(0, len(values) // TILE * TILE, TILE):
        y = (head.v[first : first + TILE] @ h).astype(np.float32)
        mean = y.mean(axis=0)
        if code.feedback and first + TILE + N_TAIL <= len(values):
            metric = attention_moment(head, first, code.feedback)
            coded = quantize_with_feedback(y - mean, metric, code.damp, Grid(code.bits, code.clip, d, 16, 1), 0)
        else:
            coded = Grid(code.bits, code.clip, d, 8, TILE, code.n_fit).quantized((y - mean).reshape(-1)).reshape(y.shape)
        coded += mean + (y - mean - coded).mean(axis=0)
        values[first : first + TILE] = coded @ h
    return values


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------------------------------

KV = tuple[Code | None, ValueCode | None]


def keys(bits: float = 2, **changes: object) -> KV:
    return replace(of_bits(bits), **changes), None  # type: ignore[arg-type]


def fed(bits: float = 2, **changes: object) -> KV:
    """Feedback, and the weights that suit it."""
    return keys(bits, **{"feedback": True, "of_query": 0.0, "of_spread": 0.7, **changes})


def both(bits_k: int, bits_v: int, *, feedback: bool = False) -> KV:
    return (fed if feedback else keys)(bits_k)[0], ValueCode(bits_v, {4: 1.0, 3: 0.95, 2: 0.8}[bits_v])


QUESTIONS: dict[str, dict[str, KV]] = {
    "known": {f"{name}, {bits} bits": keys(bits, basis=basis) for bits in (4, 3, 2) for name, basis in (("none", "none"), ("H", "H"), ("H w", "Hw"))},
    "feedback": {
        f"{bits} bits, {name}": code
        for bits in (4, 3, 2)
        for name, code in {
            "nearest": keys(bits),
            "feedback, first 512 queries": keys(bits, feedback=True, moment="first"),
            "feedback, all queries until packed": keys(bits, feedback=True),
            "the same, w = s^-0.7": fed(bits),
            "the same, queries of later tokens": fed(bits, moment="later"),
        }.items()
    },
    "settings": {
        "w = (q / s)^0.5": fed(of_query=0.5, of_spread=0.5),
        "w = q^0.25 s^-0.6": fed(of_query=0.25, of_spread=0.6),
        "w = s^-0.7": fed(),
        "w = 1 / s": fed(of_spread=1.0),
        "no rotation": fed(basis="none"),
        "shrink 0": fed(shrink=0.0),
        "shrink 0.5": fed(shrink=0.5),
        "damp 0.01": fed(damp=0.01),
        "damp 0.2": fed(damp=0.2),
    },
    "clip": {
        **{f"nearest, clip {clip}": keys(clip=clip) for clip in (0.75, 0.85, 0.95)},
        "nearest, clip per head": keys(clip=0.0),
        **{f"feedback, clip {clip}": fed(clip=clip) for clip in (0.75, 0.85, 0.95)},
        "feedback, clip per head": fed(clip=0.0),
    },
    "sweeps": {
        f"{bits} bits, clip {clip}, sweeps {sweeps}": fed(bits, clip=clip, sweeps=sweeps)
        for bits, clip, sweeps in ((2, 0.8, 0), (2, 0.8, 1), (2, 0.8, 2), (2, 0.7, 2), (3, 0.95, 0), (3, 0.95, 2), (3, 0.9, 2))
    },
    "basis": {
        "H w": keys(),
        "root of the moment, H": keys(basis="metric"),
        "the same, shrink 0.7": keys(basis="metric", shrink=0.7),
        "eigenvectors, 2 bits": keys(basis="eigen"),
        "eigenvectors, bits by block": keys(basis="eigen", by_block=True),
        "bits by block, shrink 0.7": keys(basis="eigen", by_block=True, shrink=0.7),
        "4 directions at 8 bits": keys(basis="eigen", exact=4),
        "H w, feedback": fed(),
    },
    "groups": {f"{name}, groups of {group}": make(group=group) for name, make in (("nearest", keys), ("feedback", fed)) for group in (16, 32, 64)},
    "sides": {
        "K 2, V 2": both(2, 2),
        "K 3, V 2": both(3, 2),
        "K 2, V 3": both(2, 3),
        "K 2 with feedback, V 2": both(2, 2, feedback=True),
        "K 3 with feedback, V 2": both(3, 2, feedback=True),
        "K 2 with feedback, V 3": both(2, 3, feedback=True),
        "K 3 with feedback, V 3": both(3, 3, feedback=True),
    },
    "fits": {
        **{f"K {bits} with feedback, {n} fits": fed(bits, clip=clip, n_fit=n) for bits, clip in ((3, 0.95), (2, 0.8)) for n in (0, 1, 2, 4)},
        **{f"V {bits}, {n} fits": (None, ValueCode(bits, clip, n_fit=n)) for bits, clip in ((3, 0.95), (2, 0.8)) for n in (0, 1, 2, 4)},
    },
    "values": {
        **{f"nearest, clip {clip}": (None, ValueCode(clip=clip)) for clip in (0.7, 0.8, 0.9)},
        "feedback, neighbours alike": (None, ValueCode(feedback="near", damp=0.0)),
        "feedback, queries of the next 128 tokens": (None, ValueCode(feedback="known")),
        "feedback, queries of later tokens": (None, ValueCode(feedback="later")),
    },
}


def table(question: str, models: dict[str, list[Head]]) -> None:
    """Print a question's table in Markdown, row by row."""
    some = next(iter(models.values()))[0]
    print(f"\n## {question}\n\n| code | b/e (d = {some.d}) | " + " | ".join(f"{name}: KL | output" for name in models) + " |")
    print("|---|---:|" + "---:|---:|" * len(models))
    for name, (code_k, code_v) in QUESTIONS[question].items():
        sides = [code.bits_per_element(some.d) for code in (code_k, code_v) if code]
        cells = [name, f"{sum(sides) / len(sides):.2f}"]
        for heads in models.values():
            harms = [harm(head, code_keys(head, code_k) if code_k else None, code_values(head, code_v) if code_v else None) for head in heads]
            cells += [f"{mean:,.0f}" for mean in np.mean(harms, axis=0)]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("model", type=Path)
    recording.add_argument("text", type=Path)
    recording.add_argument("rows", type=Path)
    recording.add_argument("--tokens", type=int, default=3072)
    recording.add_argument("--layers", type=int, default=1000)
    asking = commands.add_parser("table")
    asking.add_argument("question", choices=[*QUESTIONS, "all"])
    asking.add_argument("rows", type=Path, nargs="+")
    asking.add_argument("--every", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.model, arguments.text, arguments.rows, arguments.tokens, arguments.layers)
        return
    models = {path.stem: load_heads(path, arguments.every) for path in arguments.rows}
    for question in QUESTIONS if arguments.question == "all" else [arguments.question]:
        table(question, models)


if __name__ == "__main__":
    main()
