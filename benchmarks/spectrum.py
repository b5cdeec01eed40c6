"""What a low-rank term has to work with: singular values of what quantization loses of K and V, and the ranges of the groups it quantizes.

    python benchmarks/spectrum.py MODEL TEXT_FILE --plots FOLDER [--contexts 8] [--n-ctx 2048] [-t N]

MODEL is a Hugging Face folder, a GGUF file, or the name of a model such as smollm2-135m-f16 (gearcpp/model_files.py). It reads contexts spread over the
text without a compressed cache: the folder in float32, with transformers; the file in llama.cpp. Keys after RoPE and values are rounded to f16 and cut
into tiles of 256 tokens of one head, without the first tile of a context, whose first rows are attention sinks that a cache keeps exact. The presets weigh
the channels of K here without knowing the queries, which are not recorded.
Prints tables in Markdown and draws spectrum-energy.png, spectrum-heads.png and spectrum-ranges.png: what docs/spectrum.md has.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gearcpp import PRESETS, GearConfig, Llama
from gearcpp.model_files import model_argument
from gearcpp.reference.methods import gear, quantizers
from gearcpp.reference.methods.gear_tile import gear_tile
from gearcpp.reference.methods.tensors import Coded, hadamard, half

TILE = 256
RANKS = (1, 2, 4, 8)
SIDES = ("k", "v")
Rows = dict[str, Tensor]  # [n_layer, n_head, n_tile, TILE, d] of each side


def ours(name: str, **changes: object) -> Callable[[str, Tensor], Coded]:
    """A preset's D (and M), with other terms if asked for."""
    config = replace(PRESETS[name], **{"rank_k": 0, "rank_v": 0, **changes})
    return lambda side, x: gear_tile(x, side, config)


BACKBONES: dict[str, Callable[[str, Tensor], Coded]] = {
    "KCVT, 4 bits": lambda side, x: quantizers.kcvt(x, side, 4),
    "KCVT, 4 bits, 2 % outliers out": lambda side, x: gear.gear(x, side, 4, rank=0),
    "KIVI g = 64, 2 bits": lambda side, x: quantizers.kivi(x, side, 2, 64),
    "KIVI g = 64, 2 bits, 2 % outliers out": lambda side, x: gear.gear(x, side, 2, rank=0),
    "gear (4 bits)": ours("gear"),
    "gear3 (3 bits)": ours("gear3"),
    "gear2 (2 bits)": ours("gear2"),
}
DRAWN = ("KCVT, 4 bits", "KIVI g = 64, 2 bits", "gear (4 bits)", "gear2 (2 bits)")


def read_rows(folder: Path, text: Path, n_ctx: int, n_context: int) -> Rows:
    """Keys and values of a Hugging Face model on contexts spread over a text."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    found: dict[int, list[list[Tensor]]] = {}

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        for kept, x in zip(found.setdefault(module.layer_idx, [[], []]), (key, value), strict=True):
            kept.append(half(x[0]).unflatten(1, (-1, TILE))[:, 1:])  # [n_head, n_tile, TILE, d]
        n_group = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(n_group, 1), value.repeat_interleave(n_group, 1), is_causal=True, scale=scaling
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("recorded", attention)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="recorded").eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    with torch.no_grad():
        for start in starts(len(tokens), n_ctx, n_context):
            model.model(tokens[None, start : start + n_ctx], use_cache=False)
    return {side: torch.stack([torch.cat(found[layer][i], 1) for layer in sorted(found)]) for i, side in enumerate(SIDES)}


def starts(n_token: int, n_ctx: int, n_context: int) -> list[int]:
    """Where the contexts begin."""
    if n_ctx % TILE or n_ctx <= TILE or n_token < n_ctx * n_context:
        raise SystemExit(f"--n-ctx must be a multiple of {TILE} above it, and the text ({n_token} tokens) must have --contexts times as many")
    return [i * (n_token // n_context) for i in range(n_context)]


def read_gguf_rows(path: Path, text: Path, n_ctx: int, n_context: int, n_threads: int | None) -> Rows:
    """The same of a GGUF file: a codec that changes nothing sees every tile that the cache would pack, of layers with a sliding window, too."""
    found: dict[tuple[str, int], dict[int, dict[int, Tensor]]] = {}  # side, layer; head; first cell

    def remember(il: int, side: str, head: int, x: np.ndarray, written: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, float]:
        if cells[0] >= TILE:
            found.setdefault((side, il), {}).setdefault(head, {})[n_ctx * n_read + int(cells[0])] = half(torch.from_numpy(x.copy()))
        return x, 2.0 * x.size

    n_read = 0
    every_tile = GearConfig(tile=TILE, n_tail=0, n_sink=0)
    arguments = {"n_threads": n_threads, "n_threads_batch": n_threads, "flash_attn": True, "swa_full": True, "verbose": False}
    # One more ubatch than is wanted: the last tile is packed when something is written behind it.
    llm = Llama(str(path), kv_type=every_tile, codec=remember, n_ctx=n_ctx + TILE, n_batch=TILE, n_ubatch=TILE, **arguments)
    tokens = llm.tokenize(text.read_bytes())
    for n_read, start in enumerate(starts(len(tokens), n_ctx + TILE, n_context)):  # noqa: B007
        llm.reset()
        llm._ctx.kv_cache_clear()
        llm.eval(tokens[start : start + n_ctx + TILE])
    llm.close()
    widths = {next(iter(next(iter(heads.values())).values())).shape for heads in found.values()}
    if len(widths) > 1:
        raise SystemExit(f"{path.name}: heads of several sizes ({widths}) do not go into one table")
    n_tile = min(len(tiles) for heads in found.values() for tiles in heads.values())
    return {
        side: torch.stack(
            [
                torch.stack([torch.stack([tiles[at] for at in sorted(tiles)[:n_tile]]) for _, tiles in sorted(heads.items())])
                for (at_side, _), heads in sorted(found.items())
                if at_side == side
            ]
        )
        for side in SIDES
    }


def energy(residual: Tensor) -> Tensor:
    """Share of the energy of each matrix [..., n, d] that its best model of rank 1, 2, ..., d has: [..., d]."""
    squares = torch.linalg.svdvals(residual).square()
    return squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp_min(1e-30)


def like(residual: Tensor) -> Tensor:
    """Gaussian noise in which every token and every channel of a matrix [..., n, d] has the energy that it has there, and nothing else."""
    squares = residual.square()
    sizes = squares.mean(-1, keepdim=True) * squares.mean(-2, keepdim=True) / squares.mean((-2, -1), keepdim=True).clamp_min(1e-30)
    return torch.randn(residual.shape, generator=torch.Generator().manual_seed(2)) * sizes.sqrt()


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print Markdown."""
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def percent(x: Tensor | float) -> str:
    return f"{100 * float(x):.1f}"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------------------------------


def print_energy(shares: dict[tuple[str, str], Tensor], matched: dict[tuple[str, str], Tensor], chance: Tensor) -> None:
    """Energy by rank for each backbone, and the range of the heads' means at rank 4; then every head of every layer."""
    print("\n## Energy of the residual in its best rank-r model, %")
    rows = [["Gaussian noise", "", *(percent(chance[r - 1]) for r in RANKS), "", ""]]
    for (name, side), share in shares.items():
        heads = share.mean(2)[..., 3]
        rows.append(
            [
                name,
                side.upper(),
                *(percent(share[..., r - 1].mean()) for r in RANKS),
                f"{percent(heads.min())} to {percent(heads.max())}",
                percent(matched[name, side][..., 3].mean()),
            ]
        )
    table(["backbone", "side", *(f"r = {r}" for r in RANKS), "r = 4, heads", "r = 4, noise alike"], rows)
    print("\n## The same at rank 4, each layer (its heads in a row), %")
    rows = []
    for name in DRAWN:
        for side in SIDES:
            heads = shares[name, side].mean(2)[..., 3]
            rows.append([name, side.upper(), *(" ".join(percent(x) for x in layer) for layer in heads)])
    table(["backbone", "side", *(f"layer {i}" for i in range(len(heads)))], rows)


def print_worth(rows: Rows) -> None:
    """What L as stored does to the squared error for its bits, against what bits of D do."""
    rows = {side: x[:, :, ::4] for side, x in rows.items()}  # of so many tiles that leaves enough
    print(f"\n## What L buys for its bits ({rows['k'].shape[2]} tiles of each head)")

    def error(side: str, code: Callable[[str, Tensor], Coded]) -> tuple[float, float]:
        coded = code(side, rows[side])
        return float((coded.xhat - rows[side]).square().mean()), coded.bits_per_element

    def line(name: str, side: str, plain: tuple[float, float], finer: tuple[float, float], with_l: tuple[float, float], what: str) -> list[str]:
        """One row: errors and bits of D, of D with a bit more, and of D with L."""
        bit = math.log(plain[0] / finer[0]) / (finer[1] - plain[1])
        cost, gain = with_l[1] - plain[1], math.log(plain[0] / with_l[0])
        return [name, side.upper(), what, f"{cost:.3f}", f"{math.exp(gain):.3f}", f"{math.exp(bit * cost):.3f}", f"{gain / bit / cost:.2f}"]

    lines = []
    for name, backbone, bits in (("KCVT", "kcvt", 4), ("KIVI g = 64", "kivi", 2)):
        for side in SIDES:
            plain, finer, with_l = (
                error(side, lambda side, x, b=b, rank=rank: gear.gear_l(x, side, b, backbone=backbone, rank=rank))  # noqa: B023
                for b, rank in ((bits, 0), (bits + 1, 0), (bits, 4))
            )
            lines.append(line(f"{name}, {bits} bits", side, plain, finer, with_l, "r = 4, f16"))
    for name, side in ((name, side) for name in ("gear", "gear3", "gear2") for side in SIDES):
        plain = error(side, ours(name))
        more = getattr(PRESETS[name], f"bits_{side}") + 1
        finer = min(error(side, ours(name, **{f"bits_{side}": more, f"clip_{side}": clip})) for clip in (1.0, 0.95, 0.9, 0.8))
        for rank, factor_bits, n_round in ((1, 4, 3), (2, 4, 3), (4, 4, 1), (4, 4, 3), (4, 8, 3), (8, 4, 3)):
            with_l = error(side, ours(name, **{f"rank_{side}": rank, "factor_bits": factor_bits, "rounds": n_round}))
            what = f"r = {rank}, {factor_bits} bits, {n_round} round{'s' if n_round > 1 else ''}"
            lines.append(line(name, side, plain, finer, with_l, what))
    table(["D", "side", "L", "bits for L", "L divides the error by", "as many bits of D by", "gain of L / of D"], lines)


GROUPS = {"k": "32 tokens of a channel", "v": "64 channels of a token"}
FORMS = ("plain", "centered", "rotated", "both")


def group_ranges(rows: Rows) -> dict[tuple[str, str], Tensor]:
    """Highest less lowest of every group of a tile: [n_layer, n_head, n_tile, n_group], for both sides in four forms."""
    found = {}
    for side, x in rows.items():
        for form in FORMS:
            y = x - x.mean(-2, keepdim=True) if form in ("centered", "both") else x
            y = hadamard(y) if form in ("rotated", "both") else y
            groups = y.unflatten(-2, (-1, 32)).transpose(-1, -2) if side == "k" else y
            found[side, form] = (groups.amax(-1) - groups.amin(-1)).flatten(3)
    return found


def print_ranges(ranges: dict[tuple[str, str], Tensor]) -> None:
    """Mean square of the ranges, to which the squared error is proportional, and how far ranges of one tile differ."""
    print("\n## Ranges of the groups")
    lines = []
    for (side, form), r in ranges.items():
        plain = ranges[side, "plain"].square().mean((2, 3))
        relative = r.square().mean((2, 3)) / plain  # of each head
        spread = r.std(-1) / r.mean(-1)
        size = r.square().mean() / ranges[side, "plain"].square().mean()
        far = (r.quantile(0.99, -1) / r.quantile(0.5, -1)).mean()
        figures = (f"{size:.3f}", f"{relative.min():.2f} to {relative.max():.2f}", f"{spread.mean():.2f}", f"{far:.2f}")
        lines.append([side.upper(), GROUPS[side], form, *figures])
    table(["side", "group", "form", "mean square / plain's", "of the heads", "deviation / mean", "99 % / median"], lines)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------------------------------


def draw(shares: dict[tuple[str, str], Tensor], chance: Tensor, ranges: dict[tuple[str, str], Tensor], folder: Path) -> None:
    """The three pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(figure: object, name: str) -> None:
        figure.savefig(folder / name, dpi=80)  # type: ignore[attr-defined]
        pyplot.close(figure)

    most = 16
    figure, axes = pyplot.subplots(1, len(DRAWN), figsize=(13, 3.6), sharey=True, layout="constrained")
    for panel, name in zip(axes, DRAWN, strict=True):
        for side, style in zip(SIDES, ("-", "--"), strict=True):
            for il, layer in enumerate(shares[name, side].mean((1, 2))):
                panel.plot(range(1, most + 1), 100 * layer[:most], style, color=f"C{il}", label=f"{side.upper()}, layer {il}", linewidth=1)
        panel.plot(range(1, most + 1), 100 * chance[:most], color="black", linewidth=2, label="Gaussian noise")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("rank")
        panel.set_xticks((1, 2, 4, 8, 16))
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("energy of the residual, %")
    axes[-1].legend(fontsize=6, ncol=2)
    save(figure, "spectrum-energy.png")

    figure, panel = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for i, name in enumerate(DRAWN):
        for side, marker, shift in zip(SIDES, "ox", (-0.12, 0.12), strict=True):
            heads = 100 * shares[name, side].mean(2)[..., 3]
            for il, layer in enumerate(heads):
                label = f"layer {il}" if i == 0 and side == "k" else None
                panel.scatter([i + shift] * len(layer), layer, marker=marker, color=f"C{il}", s=22, label=label)
    panel.axhline(100 * chance[3], color="black", linewidth=1, label="Gaussian noise")
    panel.set_xticks(range(len(DRAWN)), DRAWN, fontsize=8)
    panel.set_ylabel("energy in rank 4, %")
    panel.set_title("every head: K (o) and V (x)", fontsize=10)
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3, axis="y")
    save(figure, "spectrum-heads.png")

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    at = torch.linspace(0, 1, 101)
    for panel, side in zip(axes, SIDES, strict=True):
        for form in FORMS:
            size = ranges[side, "plain"].square().mean((2, 3), keepdim=True).sqrt()
            r = (ranges[side, form] / size).flatten()
            r = r[:: max(1, len(r) // 200_000)]
            panel.plot(100 * at, r.quantile(at), label=form, linestyle=":" if form == "centered" else "-")
        panel.set_title(f"{side.upper()}: groups of {GROUPS[side]}", fontsize=10)
        panel.set_xlabel("percentile of the groups")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("range / its root mean square, plain")
    axes[0].legend(fontsize=8)
    save(figure, "spectrum-ranges.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=lambda name: Path(name) if Path(name).is_dir() else model_argument(name), metavar="MODEL")
    parser.add_argument("text", type=Path, metavar="TEXT_FILE")
    parser.add_argument("--plots", type=Path, help="folder for the pictures; none are drawn without it")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("-t", "--threads", type=int, help="of a GGUF file")
    given = parser.parse_args()
    if given.model.is_dir():
        rows = read_rows(given.model, given.text, given.n_ctx, given.contexts)
    else:
        rows = read_gguf_rows(given.model, given.text, given.n_ctx, given.contexts, given.threads)
    n_layer, n_head, n_tile, _, d = rows["k"].shape
    print(f"{given.model.name}: {n_layer} layers, {n_head} KV heads of {d}; {n_tile} tiles of {TILE} tokens of each head, {given.contexts} contexts")
    noise = torch.randn(200, TILE, d, generator=torch.Generator().manual_seed(1))
    chance = energy(noise).mean(0)
    residuals = {(name, side): code(side, rows[side]).xhat - rows[side] for name, code in BACKBONES.items() for side in SIDES}
    shares = {key: energy(residual) for key, residual in residuals.items()}
    print_energy(shares, {key: energy(like(residual)) for key, residual in residuals.items()}, chance)
    ranges = group_ranges(rows)
    print_ranges(ranges)
    if given.plots:
        given.plots.mkdir(parents=True, exist_ok=True)
        draw(shares, chance, ranges, given.plots)
    print_worth(rows)


if __name__ == "__main__":
    main()
