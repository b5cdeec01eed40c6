"""Whatever llama.cpp does with a cache leaves a GEAR cache where it leaves f16: each script here is led on f16, on a GEAR cache whose rows are all exact
and on one that packs, for every kind of memory that llama.cpp has.

With exact rows the likeliest tokens are the same and the logits differ by flash attention's rounding. Where tiles are packed (6 bits) the difference is
bounded; the bounds were measured and have room, and what a fault does is beyond them (the last tests).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_life import Life, furthest, tokens_differ
from models import N_VOCAB, Shape

from gearcpp import GearConfig

RandomModel = Callable[..., Path]
Script = Callable[[Life, np.random.Generator], None]

EXACT = GearConfig(tile=64, n_tail=2048)
PACKED = GearConfig(tile=64, n_tail=32, bits_k=6, bits_v=6)

# Kinds of memory: family, shape, fields of the context.
MEMORIES: dict[str, tuple[str, Shape, dict[str, Any]]] = {
    "one stream": ("llama", Shape(), {"kv_unified": True}),
    "streams": ("llama", Shape(), {"kv_unified": False}),
    "windows": ("gemma2", Shape(), {"kv_unified": True}),
    "windows kept whole, streams": ("gemma2", Shape(), {"kv_unified": False, "swa_full": True}),
    "mixture of experts": ("mixtral", Shape(), {"kv_unified": True}),
    "hybrid": ("lfm2", Shape(n_layer=4, n_head=2, n_head_kv=1), {"kv_unified": True, "n_rs_seq": 8}),
    "hybrid, streams": ("lfm2", Shape(n_layer=4, n_head=2, n_head_kv=1), {"kv_unified": False, "n_rs_seq": 8}),
}


def text(random: np.random.Generator, n: int) -> list[int]:
    return random.integers(3, N_VOCAB, n).tolist()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------------------------------


def many_sequences(life: Life, random: np.random.Generator) -> None:
    """Four sequences of any length side by side; now and then one ends and another one begins in its place."""
    for _ in range(25):
        present = [s for s in range(4) if random.random() < 0.7] or [0]
        for sequence in present:
            if life.ends.get(sequence, 0) > 300 and random.random() < 0.5:
                life.remove(sequence, -1)
        life.step({s: text(random, int(random.integers(1, 50))) for s in present if life.ends.get(s, 0) < 450} or {0: text(random, 1)})


def shared_prefix(life: Life, random: np.random.Generator) -> None:
    """One prompt, four answers; one of them is branched again later."""
    life.step({0: text(random, 150)})
    for target in (1, 2, 3):
        life.copy(0, target)
    for _ in range(12):
        life.step({s: text(random, 4) for s in range(4)})
    life.remove(3, -1)
    life.copy(1, 3)
    for _ in range(4):
        life.step({s: text(random, 5) for s in (1, 3)})
    life.remove(0, -1)  # the prompt is still the others'
    life.step({s: text(random, 3) for s in (1, 2, 3)})


def removal_and_refill(life: Life, random: np.random.Generator) -> None:
    """Holes in the middle of two sequences, whose cells a third one fills."""
    life.step({0: text(random, 200), 1: text(random, 190)})
    life.remove(0, 40, 130)
    life.remove(1, 10, 70)
    life.step({0: text(random, 3), 1: text(random, 3)})
    for _ in range(6):
        life.step({2: text(random, 30), 0: text(random, 1)})
    life.remove(2, 20, 60)
    life.step({3: text(random, 90)})
    life.step({s: text(random, 2) for s in range(4)})


def keeping_one(life: Life, random: np.random.Generator) -> None:
    """seq_keep: all but one are forgotten, and others take their cells."""
    for kept in (2, 0):
        life.step({s: text(random, 100) for s in range(4)})
        life.keep(kept)
        for _ in range(3):
            life.step({kept: text(random, 7)})
    life.step({1: text(random, 80), 3: text(random, 50)})
    life.step({s: text(random, 1) for s in (0, 1, 3)})


def shifts(life: Life, random: np.random.Generator) -> None:
    """Past 256 tokens again and again: the middle goes, what follows moves up, five times."""
    life.step({0: text(random, 240)})
    for _ in range(5):
        if life.remove(0, 16, 106):
            life.shift(0, 106, -90)
        for _ in range(3):
            life.step({0: text(random, 30)})
    life.step({1: text(random, 40), 0: text(random, 1)})


def rollback(life: Life, random: np.random.Generator) -> None:
    """Speculative decoding: a draft of up to eight tokens is decoded, and those that were not accepted are taken back."""
    life.step({0: text(random, 180)})
    for _ in range(30):
        drafted, accepted = int(random.integers(2, 9)), int(random.integers(0, 8))
        life.step({0: text(random, drafted)})
        life.remove(0, life.ends[0] - max(drafted - 1 - accepted, 0))


def reset_and_reuse(life: Life, random: np.random.Generator) -> None:
    """The context is cleared, with and without its cells, and used again."""
    for data in (True, False, True):
        for _ in range(2):
            life.step({s: text(random, 120) for s in range(3)})
        life.step({s: text(random, 1) for s in range(3)})
        life.clear(data)
    life.step({1: text(random, 330)})
    life.step({1: text(random, 1)})


def reload(life: Life, random: np.random.Generator) -> None:
    """The context is saved, thrown away and restored; then one sequence is saved and restored under another name."""
    life.step({0: text(random, 270), 1: text(random, 220)})
    state, ends = life.state(), dict(life.ends)
    life.new_context()
    life.restore(state, ends)
    life.step({0: text(random, 9), 1: text(random, 9)})
    state, ends = life.state(0), {3: life.ends[0]}
    life.remove(0, -1)
    life.step({2: text(random, 150)})
    life.restore(state, ends, 3)
    life.step({3: text(random, 5), 2: text(random, 1)})


SCRIPTS: list[Script] = [many_sequences, shared_prefix, removal_and_refill, keeping_one, shifts, rollback, reset_and_reuse, reload]


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Lives
# ---------------------------------------------------------------------------------------------------------------------------------------------


def lead(path: Path, kv_type: Any, script: Script, seed: int, **fields: Any) -> Life:
    with Life(path, kv_type, **fields) as life:
        script(life, np.random.default_rng(seed))
    return life


# Largest difference of logits from f16, relative to the largest one. Over six seeds exact rows were at most 0.0031 away
# (llama), packed ones 0.110 (llama), 0.087 (mixtral), 0.010 (gemma2) and 0.0085 (lfm2).
EXACT_BOUND = 0.01
PACKED_BOUND = {"llama": 0.25, "mixtral": 0.25, "gemma2": 0.03, "lfm2": 0.03}
# A mixture of experts may send a token elsewhere for a rounding, which changes a step or two.
SHARE = {"mixtral": 0.8}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_life(memory: str, script: Script, random_model: RandomModel, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEARCPP_SMALL_CACHE", "store")  # windows and caches that are all tail are GEAR's, too
    family, shape, fields = MEMORIES[memory]
    path = random_model(family, shape)
    seed = int(random.integers(2**32))
    plain, exact, packed = (lead(path, kv_type, script, seed, **fields) for kv_type in ("f16", EXACT, PACKED))
    assert exact.answers == packed.answers == plain.answers
    assert exact.most_packed == 0 < packed.most_packed
    share = SHARE.get(family, 1.0)
    assert furthest(plain.logits, exact.logits, share) < EXACT_BOUND
    assert tokens_differ(plain.logits, exact.logits, EXACT_BOUND) <= (1 - share) * len(plain.logits)
    assert furthest(plain.logits, packed.logits, share) < PACKED_BOUND[family]


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Faults that must show
# ---------------------------------------------------------------------------------------------------------------------------------------------


def shifts_of_neighbours(life: Life, random: np.random.Generator) -> None:
    """As `shifts`, but what goes are the 90 tokens from one further on."""
    take, move = life.remove, life.shift
    life.remove = lambda sequence, begin, end=-1: take(sequence, begin + 1, end + 1)  # type: ignore[method-assign]
    life.shift = lambda sequence, begin, delta: move(sequence, begin + 1, delta)  # type: ignore[method-assign]
    shifts(life, random)


def rollback_of_one_less(life: Life, random: np.random.Generator) -> None:
    """As `rollback`, but a token that was not accepted stays."""
    take = life.remove
    life.remove = lambda sequence, begin, end=-1: take(sequence, min(begin + 1, life.ends[sequence]), end)  # type: ignore[method-assign]
    rollback(life, random)


@pytest.mark.parametrize(("script", "faulty"), [(shifts, shifts_of_neighbours), (rollback, rollback_of_one_less)])
def test_the_exact_bound_finds_a_fault(script: Script, faulty: Script, random_model: RandomModel, random: np.random.Generator) -> None:
    seed = int(random.integers(2**32))
    right, wrong = (lead(random_model(), "f16", s, seed, kv_unified=True) for s in (script, faulty))
    assert furthest(right.logits, wrong.logits) > 5 * EXACT_BOUND


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_packed_bound_finds_a_fault(script: Script, random_model: RandomModel, random: np.random.Generator) -> None:
    """A codec that puts each packed key into its neighbour's cell."""

    def neighbours(il: int, side: str, head: int, x: np.ndarray, written: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, float]:
        return np.roll(x, side == "k", axis=0), x.nbytes / 4

    seed = int(random.integers(2**32))
    right = lead(random_model(), "f16", script, seed, kv_unified=True)
    wrong = lead(random_model(), PACKED, script, seed, kv_unified=True, codec=neighbours)
    assert furthest(right.logits, wrong.logits) > PACKED_BOUND["llama"]
