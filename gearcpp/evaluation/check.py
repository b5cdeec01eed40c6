"""Whether a model stands a compressed KV cache, in plain words (`gearcpp check`).

A short text is read with an f16 cache and with the chosen one (see `gearcpp.evaluation.perplexity`). The verdict compares two figures with fixed bounds:
the mean KL divergence, in nat, and the change of the perplexity, as a share. The bounds come from a model with large key biases, Qwen2.5-Coder-0.5B with
f16 weights at 2048 tokens: q8_0, which few people tell from f16, has 0.0038 there and gear3 0.0046; gear2 has 0.022 with perplexity +0.2 %; a cache that
ruins the model has 0.3 to 0.9 with perplexity +29 % and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from .perplexity import Row

SAME_KLD = 0.005  # nat; just above q8_0 on the model above
CLOSE_KLD = 0.03  # nat; just above gear2 there, a tenth of what a ruined model has
MOST_PPL_CHANGE = 0.03  # share of f16's perplexity, either way

LADDER = ("gear2", "gear3", "gear", "gear-hi")  # presets that are tried, smallest first


class Outcome(Enum):
    """How a model stands a cache."""

    SAME = "stands it"
    CLOSE = "stands it, with small changes"
    BROKEN = "does not stand it"


@dataclass(frozen=True)
class Verdict:
    """What one cache does to a model.

    Attributes:
        kv: the cache's name.
        bits_per_element: stored bits of each number of K and V in a packed tile or block.
        kld: mean KL divergence from f16, nat.
        same_top: share of the tokens whose likeliest token is f16's, 0 to 1.
        ppl_change: perplexity over f16's, less 1.
    """

    kv: str
    bits_per_element: float
    kld: float
    same_top: float
    ppl_change: float

    @property
    def outcome(self) -> Outcome:
        """By the bounds; figures that are not numbers count as broken."""
        if not (self.kld <= CLOSE_KLD and abs(self.ppl_change) <= MOST_PPL_CHANGE):
            return Outcome.BROKEN
        return Outcome.SAME if self.kld <= SAME_KLD else Outcome.CLOSE

    @property
    def stands(self) -> bool:
        """Whether the model can be used with this cache."""
        return self.outcome is not Outcome.BROKEN

    def __str__(self) -> str:
        figures = f"KLD {self.kld:.4f}, the likeliest token stays the same in {100 * self.same_top:.1f} %, perplexity {100 * self.ppl_change:+.1f} %"
        return f"{self.kv}: {self.outcome.value} ({figures})"


def judge(row: Row) -> Verdict:
    """The verdict on one measured cache."""
    s = row.summary
    change = math.expm1(s.ln_ppl_ratio) if s.ln_ppl_ratio < 100 else math.inf
    return Verdict(row.label, row.bits_per_element, s.kld_mean, s.same_top, change)


def next_preset(chosen: str, verdicts: Mapping[str, Verdict]) -> str | None:
    """The preset to try next, None when the smallest that stands is known, or that none does.

    From a preset that stands the search goes down until one does not; from one that does not, up. Beside another cache it starts at the smallest.

    Args:
        chosen: the cache that was asked about.
        verdicts: so far, by name, the chosen one's among them.
    """
    start = LADDER.index(chosen) if chosen in LADDER else -1
    if start >= 0 and verdicts[chosen].stands:
        for name in reversed(LADDER[:start]):
            if name not in verdicts:
                return name
            if not verdicts[name].stands:
                return None
        return None
    for name in LADDER[start + 1 :]:
        if name not in verdicts:
            return name
        if verdicts[name].stands:
            return None
    return None


def layer_lines(row: Row) -> list[str]:
    """What the cache says of its layers: root mean square errors, of scores in nats and of values as a share of their size, with the worst head's."""
    lines = []
    for il in sorted({layer["il"] for layer in row.layers}):
        parts = []
        for layer in row.layers:
            error = layer["score_error"] if layer["side"] == "k" else layer["error"]
            if layer["il"] == il and error is not None:
                figures = f"{error:.3f} nats" if layer["side"] == "k" else f"{error:.1%}"
                most = f"{layer['worst_error']:.3f}" if layer["side"] == "k" else f"{layer['worst_error']:.1%}"
                stays = ", stays f16 from then on" if layer["stays_exact"] else ""
                parts.append(f"{'scores' if layer['side'] == 'k' else 'values'} {figures} (head {layer['worst_head']}: {most}{stays})")
        lines.append(f"  layer {il}: {'; '.join(parts) or 'nothing is known'}")
    return lines


def smallest(verdicts: Mapping[str, Verdict]) -> str | None:
    """The smallest preset that was tried and stands; None: none did."""
    return next((name for name in LADDER if name in verdicts and verdicts[name].stands), None)


def own_text() -> bytes:
    """A text that every installation has: code of this package and its docstrings, some 42 kB."""
    here = Path(__file__).parent
    return b"\n".join((here / name).read_bytes() for name in ("perplexity.py", "calibration.py", "tasks.py"))
