"""What each term of the codec buys per bit: mean KL divergence of a model's next-token distribution against bits per element, in PyTorch.

    python benchmarks/frontier.py MODEL_FOLDER TEXT_FILE --out FOLDER [--sweep k,v,rivals,best,terms] [--contexts 8] [--n-ctx 2048] [--match REGEX]

The model runs in float32 with Hugging Face transformers. Of each context the last 256 tokens are scored: they read each other exactly (the exact tail),
the first four tokens exactly (the sinks), and all between as it was coded, tile by tile, from the exact model's keys and values; every method alike. One
side is swept with the other left exact; since small errors add up, the best pairs of settings for a budget of bits are then guessed from the two sweeps
and measured. The sweep "terms" takes the presets apart: each term of the codec added or left out, what it costs and what it buys.

This is how presets are chosen. What the native library does with them, with errors fed back through every token, is measured by ``gearcpp perplexity``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from gearcpp import PRESETS, GearConfig
from gearcpp.reference.methods import gear, quantizers, rivals
from gearcpp.reference.methods.gear_tile import gear_tile, side_config, tile_bytes
from gearcpp.reference.methods.tensors import Coded, half

TAIL = 256  # tokens: a query reads its own stretch exactly
N_SINK = 4
BUDGETS = (2.5, 3.5, 4.5, 6.2)  # bits per element, mean of K and V
PLAIN = GearConfig(rotate_k=False, rotate_v=False, center_v=False)  # what the settings below add to
SHARED = ("scale_bits", "factor_bits", "rounds", "sparsity", "tile")  # fields of a GearConfig that hold for both sides

Code = Callable[[str, Tensor], Coded]  # side, tiles [context, kv head, tile, T, d]
LayerCode = Callable[[str, Tensor, int], Coded]  # the same and the layer


@dataclass(frozen=True)
class Setting:
    """One row of the table: a codec for one side or both ("k", "v", "kv") and the tile that it works on."""

    name: str
    sides: str
    code: Code
    tile: int = 256
    config: GearConfig | None = None
    n_sink: int = N_SINK
    by_layer: LayerCode | None = field(default=None, compare=False)  # in the place of code


@dataclass
class Result:
    """What was measured: bits per element of the sides that were coded, KL divergence in nats with its standard error, share of equal top tokens."""

    setting: Setting
    bits: float
    kld: float
    error: float
    same_top: float


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------------------------------


class CodedAttention:
    """Causal attention of the last tokens of contexts over coded keys and values of those before, in the form in which transformers calls it."""

    def __init__(self) -> None:
        self.exact: dict[int, list[Tensor]] = {}  # keys and values of each layer before the last tokens, [n_context, kv head, n, d] each
        self.queries: dict[int, list[Tensor]] = {}  # of each layer, the second moment of the queries' channels in each context, [kv head, d] each
        self.is_recording = False  # add to them what passes by
        self.setting: Setting | None = None
        self.n_bytes = self.n_element = 0

    def __call__(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        """query [batch, head, n, d], key and value [batch, kv head, n, d] -> [batch, n, head, d]"""
        n_group, n_query = query.shape[1] // key.shape[1], query.shape[2]
        new = [half(x) for x in (key, value)]
        before = self.exact.get(module.layer_idx, [x[:0, :, :-TAIL] for x in new])
        if self.is_recording:
            self.exact[module.layer_idx] = [torch.cat([old, x[:, :, :-TAIL]]) for old, x in zip(before, new, strict=True)]
            before = [x[:, :, :0] for x in new]
            shared = query[:, :, :-TAIL].unflatten(1, (-1, n_group))  # query heads of one KV head
            self.queries.setdefault(module.layer_idx, []).append(shared.square().mean((0, 2, 3)))
        else:
            before = [self._code(side, x, module.layer_idx) for side, x in zip("kv", before, strict=True)]
        k, v = (torch.cat(pair, 2).repeat_interleave(n_group, 1) for pair in zip(before, new, strict=True))
        scores = query @ k.transpose(-1, -2) * scaling
        future = torch.ones(n_query, k.shape[2], dtype=torch.bool).triu(k.shape[2] - n_query + 1)
        return (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(1, 2).contiguous(), None

    def _code(self, side: str, x: Tensor, layer: int) -> Tensor:
        setting = self.setting
        if setting is None or side not in setting.sides:
            return x
        tiles = x.unflatten(2, (-1, setting.tile))
        coded = setting.by_layer(side, tiles, layer) if setting.by_layer else setting.code(side, tiles)
        self.n_bytes += coded.n_bytes
        self.n_element += coded.xhat.numel()
        return torch.cat([x[:, :, : setting.n_sink], coded.xhat.flatten(2, 3)[:, :, setting.n_sink :]], 2)


class Meter:
    """A model and contexts of a text, and what a setting does to the model's predictions at their ends."""

    def __init__(self, folder: Path, text: Path, n_ctx: int, n_context: int) -> None:
        self.attention = CodedAttention()
        AttentionInterface.register("coded", self.attention)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="coded").eval()
        tokens = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
        if len(tokens) < n_ctx * n_context:
            raise SystemExit(f"{text} has {len(tokens)} tokens; {n_context} contexts of {n_ctx} need {n_ctx * n_context}")
        if n_ctx % TAIL or n_ctx <= TAIL:
            raise SystemExit(f"--n-ctx must be a multiple of {TAIL} and more than that, not {n_ctx}")
        step = len(tokens) // n_context  # spread over the text
        self.contexts = torch.stack([tokens[i * step : i * step + n_ctx] for i in range(n_context)])
        self.attention.is_recording = True
        with torch.no_grad():
            for context in self.contexts:
                self.model.model(context[None], use_cache=False)
        self.attention.is_recording = False
        self.exact = self._log_probabilities(None)

    @torch.no_grad()
    def _log_probabilities(self, setting: Setting | None) -> Tensor:
        """[n_context * TAIL, n_vocab]"""
        self.attention.setting = setting
        n_ctx = self.contexts.shape[1]
        positions = torch.arange(n_ctx - TAIL, n_ctx)[None]
        hidden = self.model.model(self.contexts[:, -TAIL:], position_ids=positions, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden.flatten(0, 1)).log_softmax(-1)

    def measure(self, setting: Setting) -> Result:
        """Code the contexts with this setting and run their last tokens."""
        self.attention.n_bytes = self.attention.n_element = 0
        coded = self._log_probabilities(setting)
        divergence = (self.exact.exp() * (self.exact - coded)).sum(-1).double()
        return Result(
            setting,
            bits=8 * self.attention.n_bytes / self.attention.n_element,
            kld=divergence.mean().item(),
            error=divergence.std().item() / len(divergence) ** 0.5,
            same_top=(self.exact.argmax(-1) == coded.argmax(-1)).float().mean().item(),
        )


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What is tried
# ---------------------------------------------------------------------------------------------------------------------------------------------


def of_config(sides: str, name: str | None = None, **changes: object) -> Setting:
    """A `GearConfig` on one side or both; ``bits``, ``group``, ``rank``, ``rotate``, ``center`` and ``clip`` mean those of the sides coded."""
    per_side = {"bits", "group", "rank", "rotate", "center", "clip"}
    named = {f"{key}_{side}": value for key, value in changes.items() if key in per_side for side in sides}
    config = PLAIN.replace(**named, **{key: value for key, value in changes.items() if key not in per_side})
    label = name or " ".join(f"{key}={value:g}" for key, value in changes.items())
    return Setting(label, sides, lambda side, x: gear_tile(x, side, config), config.tile, config)


def plain(name: str, sides: str, code: Code, tile: int = 256) -> Setting:
    """A method of the literature."""
    return Setting(name, sides, code, tile)


CLIPS = {2: (0.9, 0.8, 0.7, 0.6), 3: (0.95, 0.9, 0.8), 4: (0.95, 0.9)}  # shares of the range worth trying at these bits


def key_settings() -> Iterator[Setting]:
    """K alone: what groups, rotation, clipping, scales, L, S, rounds and tile length buy."""
    for bits, group, rotated in itertools.product((2, 3, 4, 5, 6), (32, 64, 0), ({}, {"rotate": True})):
        yield of_config("k", bits=bits, group=group, **rotated)
        for clip in CLIPS.get(bits, ()):
            yield of_config("k", bits=bits, group=group, **rotated, clip=clip)
    for bits in (2, 3, 4):
        for group in (32, 0):
            yield of_config("k", bits=bits, group=group, rank=2, factor_bits=4, rounds=3)
            yield of_config("k", bits=bits, group=group, sparsity=0.02)
        yield of_config("k", bits=bits, group=0, rank=4, factor_bits=8)
        yield of_config("k", bits=bits, group=32, rank=4, factor_bits=4, rounds=3)
        yield of_config("k", bits=bits, group=32, rotate=True, rank=2, factor_bits=4, rounds=3)
        yield of_config("k", bits=bits, group=32, scale_bits=16)
        yield of_config("k", bits=bits, group=32, tile=128)
        yield searched_clip("k", bits=bits, group=32)


def value_settings() -> Iterator[Setting]:
    """V alone."""
    for bits, group, rotated, centered in itertools.product((2, 3, 4, 5, 6), (32, 0), ({}, {"rotate": True}), ({}, {"center": True})):
        yield of_config("v", bits=bits, group=group, **rotated, **centered)
        for clip in CLIPS.get(bits, ()):
            yield of_config("v", bits=bits, group=group, **rotated, **centered, clip=clip)
    for bits in (2, 3, 4):
        for rank in (1, 2, 4):
            yield of_config("v", bits=bits, group=0, rank=rank, factor_bits=4, rounds=3)
        yield of_config("v", bits=bits, group=0, rank=1, factor_bits=8, rounds=1)
        yield of_config("v", bits=bits, group=0, rotate=True, rank=1, factor_bits=4, rounds=3)
        for clip in CLIPS[bits][:2]:
            yield of_config("v", bits=bits, group=0, rotate=True, clip=clip, rank=1, factor_bits=4, rounds=3)
        yield of_config("v", bits=bits, group=0, sparsity=0.02)
        yield of_config("v", bits=bits, group=0, scale_bits=16)
        yield of_config("v", bits=bits, group=0, tile=128)
        yield of_config("v", bits=bits, group=0, rotate=True, center=True, rank=1, factor_bits=4, rounds=3)
        yield searched_clip("v", bits=bits, group=0)


def rival_settings() -> Iterator[Setting]:
    """Both sides: the rivals, the paper's settings, and the presets as they are."""
    for kind in rivals.GGML_TYPES:
        yield plain(f"{kind} rotated", "kv", lambda side, x, kind=kind: rivals.llama_cpp(x, side, kind))
    yield plain("q4_0 plain", "kv", lambda side, x: rivals.llama_cpp(x, side, "q4_0", rotate=False))
    for bits in (2, 3, 4):
        yield plain(f"turbo{bits}", "kv", lambda side, x, bits=bits: rivals.turboquant(x, bits))
        yield plain(f"exllama{bits}", "kv", lambda side, x, bits=bits: rivals.exllamav3(x, bits))
        yield plain(f"kivi{bits} g=32", "kv", lambda side, x, bits=bits: quantizers.kivi(x, side, bits, 32))
    for bits_k, bits_v in ((2, 2), (4, 2), (3, 3), (4, 3), (4, 4), (5, 4), (6, 5)):
        yield plain(f"kvarn{bits_k}{bits_v}", "kv", lambda side, x, b=(bits_k, bits_v): rivals.kvarn(x, side, b["kv".index(side)]), tile=128)
    for bits in (2, 4):
        yield plain(f"GEAR as published, {bits} bits", "kv", lambda side, x, bits=bits: gear.gear(x, side, bits))
        yield plain(f"GEAR-L as published, {bits} bits", "kv", lambda side, x, bits=bits: gear.gear_l(x, side, bits))
    for name, config in PRESETS.items():
        yield Setting(name, "kv", lambda side, x, config=config: gear_tile(x, side, config), config.tile, config)


def searched_clip(side: str, bits: int, group: int) -> Setting:
    """Of several shares of clipping, the one with the least squared error in each group: costs no bits, only time when packing."""
    settings = [of_config(side, bits=bits, group=group, clip=clip) for clip in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)]

    def code(side: str, x: Tensor) -> Coded:
        axis, length = (-2, group or x.shape[-2]) if side == "k" else (-1, group or x.shape[-1])
        tries = torch.stack([setting.code(side, x).xhat for setting in settings])
        errors = (tries - x).square().unflatten(axis, (-1, length)).sum(axis, keepdim=True)  # the groups' entries are the axis that unflatten made
        best = errors.argmin(0, keepdim=True)
        chosen = tries.unflatten(axis, (-1, length)).gather(0, best.expand(1, *tries.unflatten(axis, (-1, length)).shape[1:]))
        return Coded(chosen.squeeze(0).reshape(x.shape), settings[0].code(side, x).n_bytes)

    return plain(f"bits={bits} group={group} clip searched", side, code)


def term_settings(attention: CodedAttention) -> Iterator[Setting]:
    """Both sides, around each preset: one term changed at a time."""
    for name in ("gear4", "gear3", "gear2"):
        base = PRESETS[name]
        low_rank = {"factor_bits": 4, "rank_k": 2, "rank_v": 2}
        changes: dict[str, dict[str, object]] = {
            "as it is": {},
            "K not rotated": {"rotate_k": False},
            "V not rotated": {"rotate_v": False},
            "V not centered": {"center_v": False},
            "K centered": {"center_k": True},
            "not clipped": {"clip_k": 1.0, "clip_v": 1.0},
            "K groups of 64": {"group_k": 64},
            "V groups of 32": {"group_v": 32},
            "f16 scales": {"scale_bits": 16},
            "tiles of 128": {"tile": 128},
            "L, r = 2, 1 round": {**low_rank, "rounds": 1},
            "L, r = 2, 3 rounds": {**low_rank, "rounds": 3},
            "L, r = 4, 3 rounds": {**low_rank, "rank_k": 4, "rank_v": 4, "rounds": 3},
            "S, s = 2 %, V not centered": {"center_v": False, "sparsity": 0.02},
            "K one bit more": {"bits_k": base.bits_k + 1},
            "V one bit more": {"bits_v": base.bits_v + 1},
        }
        for term, change in changes.items():
            config = base.replace(**change)
            yield Setting(f"{name}: {term}", "kv", lambda side, x, config=config: gear_tile(x, side, config), config.tile, config)
        for n_sink in (0, 16):
            yield Setting(f"{name}: {n_sink} sinks", "kv", lambda side, x, base=base: gear_tile(x, side, base), base.tile, n_sink=n_sink)
        yield query_weighted(name, base, attention)
        yield ranked_by_layer(name, base.replace(**low_rank, rounds=3), base, attention)


def query_weighted(name: str, base: GearConfig, attention: CodedAttention) -> Setting:
    """K's channels scaled before the rotation, so that the product with the queries loses least, and scaled back: (E q^2 / Var k)^(1/4), the same for both
    channels of a rotary pair. The queries are those of the measured contexts: what the table says is more than could be had from earlier text."""

    def code(side: str, x: Tensor, layer: int) -> Coded:
        if side == "v":
            return gear_tile(x, side, base)
        groups = x.unflatten(-2, (-1, base.group_k))
        spread = (groups - groups.mean(-2, keepdim=True)).square().mean((0, 2, 3, 4))  # [kv head, d]
        weight = torch.stack(attention.queries[layer]).mean(0)
        pairs = (y.unflatten(-1, (2, -1)).mean(-2).repeat(1, 2) for y in (weight, spread))
        ratio = next(pairs) / next(pairs)
        scale = ratio.pow(0.25)[:, None, None]  # [kv head, 1, 1, d]
        coded = gear_tile(x * scale, side, base)
        return Coded(coded.xhat / scale, coded.n_bytes)

    return Setting(f"{name}: K weighted by queries", "kv", lambda side, x: gear_tile(x, side, base), base.tile, by_layer=code)


def ranked_by_layer(name: str, ranked: GearConfig, base: GearConfig, attention: CodedAttention) -> Setting:
    """L only in the layers, half of them, and on the sides where it takes away the largest share of the squared error."""
    gains = {}
    for layer, sides in attention.exact.items():
        for side, x in zip("kv", sides, strict=True):
            tiles = x[:1].unflatten(2, (-1, base.tile))
            errors = [(gear_tile(tiles, side, config).xhat - tiles).square().sum().item() for config in (base, ranked)]
            gains[side, layer] = 1 - errors[1] / errors[0]
    chosen = set(sorted(gains, key=gains.__getitem__)[len(gains) // 2 :])

    def code(side: str, x: Tensor, layer: int) -> Coded:
        return gear_tile(x, side, ranked if (side, layer) in chosen else base)

    return Setting(f"{name}: L, r = 2, in half of the layers", "kv", lambda side, x: gear_tile(x, side, base), base.tile, by_layer=code)


def best_pairs(results: list[Result], budget: float, count: int = 4) -> list[Setting]:
    """The pairs of a K and a V setting within a budget with the least sum of divergences, as settings for both sides."""
    candidates = {side: [r for r in results if r.setting.sides == side and r.setting.config] for side in "kv"}
    found = []
    for k, v in itertools.product(candidates["k"], candidates["v"]):
        config = _merged(k.setting.config, v.setting.config)
        if config and _mean_bits(config) <= budget:
            found.append((k.kld + v.kld, config))
    found.sort(key=lambda pair: pair[0])
    best = list({config: None for _, config in found})[:count]  # in order, each once
    return [
        Setting(f"budget {budget:g}: {describe(config)}", "kv", lambda side, x, config=config: gear_tile(x, side, config), config.tile, config)
        for config in best
    ]


def _merged(k: GearConfig, v: GearConfig) -> GearConfig | None:
    """One configuration with the K fields of the one and the V fields of the other; None where the fields that they share differ.

    A shared field that has no say on a side, because that side has no L, does not have to agree.
    """
    without_say = {"factor_bits", "rounds"}
    source = k if k.rank_k or not v.rank_v else v
    for name in SHARED:
        matters = name not in without_say or (k.rank_k and v.rank_v)
        if matters and getattr(k, name) != getattr(v, name):
            return None
    taken = {field.name: getattr(v, field.name) for field in fields(GearConfig) if field.name.endswith("_v")}
    return replace(k, **taken, factor_bits=source.factor_bits, rounds=source.rounds)


def _mean_bits(config: GearConfig, d_head: int = 64) -> float:
    return sum(8 * tile_bytes(side_config(config, side, d_head)) / (config.tile * d_head) for side in "kv") / 2


def describe(config: GearConfig) -> str:
    """The fields that differ from GearConfig()'s."""
    default = GearConfig()
    names = [field.name for field in fields(GearConfig)]
    return ", ".join(f"{name}={getattr(config, name):g}" for name in names if getattr(config, name) != getattr(default, name)) or "GearConfig()"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------------------------------

TITLES = {"k": "K coded, V exact", "v": "V coded, K exact", "kv": "Both coded"}


def write_table(results: list[Result], path: Path, heading: str) -> None:
    """Markdown: one table for K, one for V, one for both."""
    lines = [f"# Frontier\n\n{heading}\n"]
    for sides, title in TITLES.items():
        rows = [r for r in results if r.setting.sides == sides]
        if rows:
            lines += [f"\n## {title}\n", "| setting | bits/element | KLD in 1e-6 | +- | same top |", "|---|---|---|---|---|"]
            lines += [f"| {r.setting.name} | {r.bits:.3f} | {r.kld * 1e6:.0f} | {r.error * 1e6:.0f} | {r.same_top:.2%} |" for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_csv(results: list[Result], path: Path) -> None:
    """The same figures, for other programs."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sides", "setting", "bits_per_element", "kld", "kld_standard_error", "same_top"])
        writer.writerows([r.setting.sides, r.setting.name, r.bits, r.kld, r.error, r.same_top] for r in results)


def write_plot(results: list[Result], path: Path) -> None:
    """KLD against bits per element, one panel for each of the tables, its lower hull drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [sides for sides in TITLES if any(r.setting.sides == sides for r in results)]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(7 * len(shown), 6), squeeze=False)
    for panel, sides in zip(panels[0], shown, strict=True):
        rows = sorted((r for r in results if r.setting.sides == sides), key=lambda r: (r.bits, r.kld))
        ours = [r for r in rows if r.setting.config]
        others = [r for r in rows if not r.setting.config]
        panel.scatter([r.bits for r in ours], [r.kld for r in ours], label="gearcpp's codec")
        panel.scatter([r.bits for r in others], [r.kld for r in others], marker="x", label="others")
        for r in others if sides == "kv" else []:
            panel.annotate(r.setting.name, (r.bits, r.kld), fontsize=6)
        front = list(itertools.accumulate(ours, lambda best, r: r if r.kld < best.kld else best))
        panel.step([r.bits for r in ours], [r.kld for r in front], where="post", alpha=0.5)
        panel.set(title=TITLES[sides], xlabel="bits per element", ylabel="mean KL divergence (nats)", yscale="log")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure what was asked for, and write frontier.md, frontier.csv and frontier.png after each sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("text", type=Path, help="text file to measure on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, the figures and the plot")
    parser.add_argument("--sweep", default="k,v,rivals,best", help="parts, in order: k, v, rivals, best (pairs for each budget, needs k and v), terms")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=2048, help="tokens of a context; its last 256 are scored")
    parser.add_argument("--match", default="", help="regular expression: of the swept settings, only those whose name has it")
    arguments = parser.parse_args()

    meter = Meter(arguments.model, arguments.text, arguments.n_ctx, arguments.contexts)
    heading = (
        f"{arguments.model.name} on {arguments.text.name}, {arguments.contexts} contexts of {arguments.n_ctx} tokens, the last {TAIL} of each scored; "
        f"these and {N_SINK} sinks are exact for every method. Float32 on the CPU."
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for sweep in arguments.sweep.split(","):
        if sweep == "best":
            settings = [setting for budget in BUDGETS for setting in best_pairs(results, budget)]
        else:
            swept = term_settings(meter.attention) if sweep == "terms" else {"k": key_settings, "v": value_settings, "rivals": rival_settings}[sweep]()
            settings = [setting for setting in swept if re.search(arguments.match, setting.name)]
        for setting in settings:
            begin = time.perf_counter()
            results.append(meter.measure(setting))
            r = results[-1]
            seconds = time.perf_counter() - begin
            print(f"{setting.sides:2} {setting.name:60} {r.bits:6.3f} b/e  KLD {r.kld * 1e6:9.1f} +- {r.error * 1e6:.1f} e-6  {seconds:.0f} s", flush=True)
        write_table(results, arguments.out / "frontier.md", heading)
        write_csv(results, arguments.out / "frontier.csv")
    write_plot(results, arguments.out / "frontier.png")


if __name__ == "__main__":
    main()
