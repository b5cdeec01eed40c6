"""The store against a plain f16 cache, driven at random by hypothesis: writes in any order, rewrites, erasures, copies of streams, shifts, flushes, saves
(of f16 and of packed tiles, in place and renumbered) and attention, for several configurations. Every step compares every cell.

    GEARCPP_STEPS=100000 pytest tests/test_store_property.py        the long form; the default is for continuous integration
    GEARCPP_TEST_SEED=7 pytest tests/test_store_property.py         another seed (it is in pytest's header)

The model knows of each cell what was written and what was read last. Unwritten cells are zeros. Rows that must be exact (sinks, the tail, the last write)
are the f16 of what was written, to the bit. Any other row may be packed: coding it moves it by at most a step, or by what a range that kept rows hold cuts
off (`cut_of`), and a step that does not touch a packed row may move it by no more than a step again, if its tile was packed again.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, event, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from gearcpp import DataError, GearConfig, native
from gearcpp.cache.stats import ERRORS

N_HEAD, D_HEAD = 2, 32
N_EMBD = N_HEAD * D_HEAD
SIDES: tuple[native.Side, native.Side] = ("k", "v")

SEED = int(os.environ.get("GEARCPP_TEST_SEED", "1"))
N_STEPS = int(os.environ.get("GEARCPP_STEPS", "1200"))
STEPS_PER_RUN = 60

# The backbone alone; presets come and go, and what they set is tried here by name.
PLAIN = GearConfig(rotate_k=False, rotate_v=False, center_k=False, center_v=False, clip_k=1.0, clip_v=1.0)
CONFIGS = [
    GearConfig(),
    PLAIN.replace(bits_k=7, bits_v=7),
    PLAIN.replace(bits_k=4, bits_v=4, center_k=True, center_v=True),
    PLAIN.replace(bits_k=3, bits_v=2, group_k=64, group_v=32),
    PLAIN.replace(bits_k=6, bits_v=5, rank_k=2, rank_v=2, factor_bits=4, rounds=2),
    PLAIN.replace(sparsity=0.05, scale_bits=16),
    PLAIN.replace(rotate_k=True, rotate_v=True),
    PLAIN.replace(bits_v=16),
    PLAIN.replace(bits_k=16),
]


def step_of(config: GearConfig, side: native.Side) -> float:
    """How far coding may move a number: a whole step of the widest group, whose numbers are within 1 but for shifts (sqrt 2) and rotation (sqrt d).

    A code is within half a step. The other half is for scales and zeros of 8 bits, and for L's share in the range.
    """
    bits = getattr(config, f"bits_{side}")
    widest = 2 * np.sqrt(2) * (2.0 if getattr(config, f"rotate_{side}") else 1.0)  # a rotated number of these rows is within 2 sqrt 2
    return 0.0 if bits == 16 else widest / (2**bits - 1)


def cut_of(config: GearConfig, side: native.Side) -> float:
    """How far coding may move a number of a row that joins packed ones of K.

    Their group's range is held while the squares of what it cuts off are no more than a wider range's rounding adds: step^2 / 12 for each of its numbers.
    """
    step = step_of(config, side)
    return step * max(1.0, float(np.sqrt((config.group_k or config.tile) / 12))) if side == "k" else step


class Store(RuleBasedStateMachine):
    """One cache and its model. Cells are global; both sides get the same calls with rows of their own."""

    @initialize(
        config=st.sampled_from(CONFIGS),
        tile=st.sampled_from([64, 128]),
        n_tail=st.sampled_from([0, 5, 32, 200]),
        n_sink=st.sampled_from([0, 3, 70]),
        n_cell=st.sampled_from([64, 300, 448]),
        n_stream=st.integers(1, 3),
        n_ubatch=st.sampled_from([1, 16, 48]),
    )
    def begin(self, config: GearConfig, tile: int, n_tail: int, n_sink: int, n_cell: int, n_stream: int, n_ubatch: int) -> None:
        self.config = config.replace(tile=tile, n_tail=n_tail, n_sink=n_sink)
        self.n_cell, self.n_stream, self.n_ubatch = n_cell, n_stream, n_ubatch
        self.cache = self.make()
        n_all = n_cell * n_stream
        self.written = np.zeros(n_all, np.bool_)
        self.truth = {side: np.zeros((n_all, N_EMBD), np.float16) for side in SIDES}  # what should be read, but for coding
        self.seen = {side: np.zeros((n_all, N_EMBD), np.float16) for side in SIDES}  # what was read last
        self.coded = {side: np.zeros(n_all, np.bool_) for side in SIDES}  # rows that were seen to come from a tile
        self.history: list[list[int]] = [[] for _ in range(n_stream)]  # cells of each stream in the order in which they were written
        self.last: set[int] = set()  # of the last write
        self.touched = np.zeros(n_all, np.bool_)  # rows that this step was to change

    def make(self) -> native.Cache:
        return native.Cache(self.config, n_head_kv=N_HEAD, d_head_k=D_HEAD, n_cell=self.n_cell, n_stream=self.n_stream, n_ubatch=self.n_ubatch)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()

    # --- steps -------------------------------------------------------------------------------------------------------------------------------

    def write(self, cells: np.ndarray, numbers: np.random.Generator, n_threads: int) -> None:
        for side in SIDES:
            rows = numbers.uniform(-1, 1, (len(cells), N_EMBD)).astype(np.float32)
            self.cache.write(side, cells, rows, n_threads)
            for cell, row in zip(cells, rows, strict=True):
                self.truth[side][cell] = row
        self.written[cells] = self.touched[cells] = True
        self.last = set(cells.tolist())
        for cell in cells.tolist():
            self.history[cell // self.n_cell].append(cell)

    @rule(random=st.integers(0, 2**32 - 1), share=st.floats(0, 1), n_threads=st.sampled_from([1, 1, 1, 2]))
    def write_in_a_row(self, random: int, share: float, n_threads: int) -> None:
        """A step of llama.cpp: consecutive cells of one stream."""
        numbers = np.random.default_rng(random)
        n = max(1, int(share * min(self.n_ubatch, self.n_cell)))
        first = int(numbers.integers(self.n_stream)) * self.n_cell + int(numbers.integers(self.n_cell - n + 1))
        self.write(np.arange(first, first + n), numbers, n_threads)

    @rule(random=st.integers(0, 2**32 - 1), n=st.integers(1, 48))
    def fill(self, random: int, n: int) -> None:
        """Several such steps, one after the other through a stream."""
        numbers = np.random.default_rng(random)
        first = int(numbers.integers(self.n_stream)) * self.n_cell + int(numbers.integers(self.n_cell))
        end = (first // self.n_cell + 1) * self.n_cell
        for _ in range(n):
            if first < end:
                self.write(np.arange(first, min(first + self.n_ubatch, end)), numbers, 1)
                first += self.n_ubatch

    @rule(random=st.integers(0, 2**32 - 1), n=st.integers(1, 60), n_threads=st.sampled_from([1, 1, 1, 2]))
    def write_scattered(self, random: int, n: int, n_threads: int) -> None:
        """Any cells of any streams, some of them twice, and perhaps more than n_ubatch."""
        numbers = np.random.default_rng(random)
        self.write(numbers.integers(0, self.n_cell * self.n_stream, n), numbers, n_threads)

    @rule(random=st.integers(0, 2**32 - 1), n=st.integers(1, 200))
    def erase(self, random: int, n: int) -> None:
        first = int(np.random.default_rng(random).integers(self.n_cell * self.n_stream))
        n = min(n, self.n_cell * self.n_stream - first)
        for side in SIDES:
            self.cache.erase(side, first, n)
            self.truth[side][first : first + n] = 0
        self.written[first : first + n] = False
        self.touched[first : first + n] = True
        self.history = [[-1 if first <= cell < first + n else cell for cell in cells] for cells in self.history]

    @rule(random=st.integers(0, 2**32 - 1))
    def copy_stream(self, random: int) -> None:
        source, target = (int(s) for s in np.random.default_rng(random).integers(0, self.n_stream, 2))
        of_source, of_target = (slice(s * self.n_cell, (s + 1) * self.n_cell) for s in (source, target))
        for side in SIDES:
            self.cache.copy_stream(side, source, target)
            self.truth[side][of_target] = self.truth[side][of_source]
            copied = self.cache.read(side, target * self.n_cell, self.n_cell)
            assert copied.tobytes() == self.seen[side][of_source].tobytes(), "a copied stream differs from its source"
        self.written[of_target] = self.written[of_source]
        self.touched[of_target] = True
        self.history[target] = [cell if cell < 0 else cell % self.n_cell + target * self.n_cell for cell in self.history[source]]
        self.last = set()  # of the copy, only the tail is sure to be exact

    @rule(random=st.integers(0, 2**32 - 1), share=st.sampled_from([0.02, 0.5, 1.0]), angle=st.floats(-3, 3))
    def shift(self, random: int, share: float, angle: float) -> None:
        """A K-shift: pairs of channels of some rows turn by an angle. What is turned is what is there, coded or not."""
        marked = (np.random.default_rng(random).random(self.n_cell * self.n_stream) < share) & self.written
        cos, sin = np.cos(angle), np.sin(angle)

        def turned(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
            a, b = rows[:, 0::2].astype(np.float32), rows[:, 1::2].astype(np.float32)
            result = np.empty(rows.shape, np.float32)
            result[:, 0::2], result[:, 1::2] = a * cos - b * sin, a * sin + b * cos
            # rows that were turned before keep to the range that the bounds are made for
            result /= np.maximum(1, np.abs(result).max(axis=1, keepdims=True) / np.sqrt(2))
            return np.where(chosen[:, None], result.astype(np.float16), rows)

        self.cache.update("k", marked, turned)
        self.truth["k"] = turned(self.seen["k"], marked)
        self.touched |= marked

    @rule(n_threads=st.sampled_from([1, 2]))
    def flush(self, n_threads: int) -> None:
        for side in SIDES:
            self.cache.flush(side, n_threads)
        self.last = set()

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        for side in SIDES:
            self.truth[side][:] = 0
        self.written[:] = False
        self.touched[:] = True
        self.history = [[] for _ in range(self.n_stream)]
        self.last = set()

    @rule(random=st.integers(0, 2**32 - 1))
    def save_and_restore(self, random: int) -> None:
        """Through f16, as llama.cpp's own states go: the rows of a cache into a new one, in another order of writes."""
        fresh = self.make()
        blocks = [np.arange(i, min(i + self.n_ubatch, len(self.written))) for i in range(0, len(self.written), self.n_ubatch)]
        order = np.random.default_rng(random).permutation(len(blocks))
        self.history = [[] for _ in range(self.n_stream)]
        for i in order:
            cells = blocks[i][self.written[blocks[i]]]
            if len(cells) == 0:
                continue
            for side in SIDES:
                fresh.write(side, cells, self.seen[side][cells].astype(np.float32))
            self.last = set(cells.tolist())
            for cell in cells.tolist():
                self.history[cell // self.n_cell].append(cell)
        for side in SIDES:
            self.truth[side] = self.seen[side].copy()
        self.touched[:] = True
        self.cache.close()
        self.cache = fresh

    @rule(flushed=st.booleans())
    def save_packed(self, flushed: bool) -> None:
        """As sessions do, into the same cells: all is as it was, bit for bit, and stays so, where there is room for as many exact rows."""
        if flushed:
            self.flush(1)
        fresh = self.make()
        for side in SIDES:
            saved = self.cache.save(side)
            assert fresh.load(side, saved) == 0
            before, after = self.cache.stats(side), fresh.stats(side)
            if after["bytes_exact"] < before["bytes_exact"]:
                # A write of more than n_ubatch rows had enlarged the pool: what finds no room in the new one is written, and packed.
                event("restored into a smaller pool")
                self.truth[side], self.touched[:] = self.seen[side].copy(), True
                self.last = set()
                continue
            assert fresh.save(side) == saved, "what is saved again differs"
            assert fresh.read(side).tobytes() == self.cache.read(side).tobytes(), "a restored cache differs from the saved one"
            own = dict.fromkeys(("n_pack", "bytes_exact", "bytes_tables", *ERRORS), 0)  # of what each cache did
            assert {**after, **own} == {**before, **own}
        self.cache.close()
        self.cache = fresh

    @rule(random=st.integers(0, 2**32 - 1), kind=st.sampled_from(["closed gaps", "turned", "mixed", "swapped streams"]))
    def save_packed_and_renumber(self, random: int, kind: str) -> None:
        """As sessions do where llama.cpp gives the cells other numbers: rows that come out of tiles are coded again, and none is lost."""
        numbers = np.random.default_rng(random)
        to = np.arange(len(self.written))
        for stream in range(self.n_stream):
            cells = slice(stream * self.n_cell, (stream + 1) * self.n_cell)
            match kind:
                case "closed gaps":
                    order = np.argsort(~self.written[cells], kind="stable")
                    to[cells][order] = cells.start + np.arange(self.n_cell)
                case "turned":
                    to[cells] = np.roll(to[cells], int(numbers.integers(self.n_cell)))
                case "mixed":
                    to[cells] = numbers.permutation(to[cells])
        if kind == "swapped streams":
            to = to.reshape(self.n_stream, self.n_cell)[numbers.permutation(self.n_stream)].ravel()
        fresh = self.make()
        for side in SIDES:
            n_packed = self.cache.stats(side)["n_packed"]
            assert fresh.load(side, self.cache.save(side), to) <= n_packed
            self.truth[side][to] = self.seen[side]
        self.written[to] = self.written.copy()
        self.touched[:] = True
        # Of what was exact only the tails are sure to be it still: they are written last, in their order. Erased rows count as long as nothing moves.
        tails = [[int(to[cell]) if cell >= 0 else -1 for cell in cells[max(0, len(cells) - self.config.n_tail) :]] for cells in self.history]
        self.history = [[] for _ in range(self.n_stream)]
        for tail in tails:
            if max(tail, default=-1) >= 0:
                self.history[max(tail) // self.n_cell] = tail
        self.last = set()
        self.cache.close()
        self.cache = fresh

    @rule(random=st.integers(0, 2**32 - 1))
    def refused(self, random: int) -> None:
        """What cannot be done says so and changes nothing."""
        n_all = self.n_cell * self.n_stream
        good = int(np.random.default_rng(random).integers(n_all))
        for call in (
            lambda: self.cache.write("k", [good, n_all], np.zeros((2, N_EMBD))),
            lambda: self.cache.write("v", [-1], np.zeros((1, N_EMBD))),
            lambda: self.cache.erase("k", good, n_all + 1),
            lambda: self.cache.copy_stream("v", 0, self.n_stream),
            lambda: self.cache.read("k", good, n_all + 1),
            lambda: self.cache.load("k", self.cache.save("v")),
            lambda: self.cache.load("v", self.cache.save("v")[:-1]),
        ):
            try:
                call()
            except (ValueError, DataError):
                continue
            raise AssertionError("a call that cannot be right was taken")

    @rule(random=st.integers(0, 2**32 - 1), n_query=st.sampled_from([1, 5, 40]), n_threads=st.sampled_from([1, 1, 2]))
    def attend(self, random: int, n_query: int, n_threads: int) -> None:
        """Attention over what the cache reads as, in f64."""
        numbers = np.random.default_rng(random)
        stream, n_kv = int(numbers.integers(self.n_stream)), int(numbers.integers(1, self.n_cell + 1))
        rows = slice(stream * self.n_cell, stream * self.n_cell + n_kv)
        visible = (numbers.random((n_query, n_kv)) < numbers.choice([0.1, 0.9])) & self.written[rows]
        visible[:, 0] = True  # an unwritten cell reads as zeros; a query that sees nothing has no answer
        q = numbers.standard_normal((2 * N_HEAD, n_query, D_HEAD)).astype(np.float32)
        got = self.cache.attend(q, n_kv=n_kv, mask=np.where(visible, 0.0, -np.inf), stream0=stream, n_threads=n_threads)
        k, v = (self.seen[side][rows].astype(np.float64).reshape(n_kv, N_HEAD, D_HEAD) for side in SIDES)
        for head in range(2 * N_HEAD):
            scores = q[head] @ k[:, head // 2].T / np.sqrt(D_HEAD) + np.where(visible, 0.0, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            expected = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // 2]
            np.testing.assert_allclose(got[:, head], expected, atol=0.02)  # queries and weights go through 8 bits where tiles are packed

    # --- what holds after every step ---------------------------------------------------------------------------------------------------------

    def exact_cells(self) -> np.ndarray:
        exact = np.zeros_like(self.written)
        for stream, cells in enumerate(self.history):
            exact[stream * self.n_cell : stream * self.n_cell + min(self.config.n_sink, self.n_cell)] = True
            for cell in cells[max(0, len(cells) - self.config.n_tail) :]:
                exact[cell] |= cell >= 0
        exact[list(self.last)] = True
        return exact & self.written

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        exact = self.exact_cells()
        for side in SIDES:
            rows, stats = self.cache.read(side), self.cache.stats(side)
            assert stats["n_written"] == self.written.sum() == stats["n_exact"] + stats["n_packed"]
            assert stats["n_exact"] >= exact.sum()
            assert not rows[~self.written].any(), "an unwritten cell is not zero"
            step, cut = step_of(self.config, side), cut_of(self.config, side)
            off = np.abs(rows.astype(np.float32) - self.truth[side].astype(np.float32)).max(axis=1)
            moved = np.where(self.touched, 0, np.abs(rows.astype(np.float32) - self.seen[side].astype(np.float32)).max(axis=1))
            wrong = exact & (off > 0)
            assert not wrong.any(), f"{side}: exact rows {np.flatnonzero(wrong)[:5]} are off by {off[wrong].max()}"
            assert off.max() <= 3 * step + cut, f"{side}: row {off.argmax()} is off by {off.max()}, a step is {step}"
            # A packed row holds its numbers within its range, unless they were outliers and give way to others.
            far = moved > np.where(self.coded[side] & (self.config.sparsity == 0), step, cut)
            assert not far.any(), f"{side}: rows {np.flatnonzero(far)[:5]} moved by {moved[far].max()} without being touched, a step is {step}"
            self.seen[side] = rows
            self.coded[side] = (self.coded[side] & ~self.touched) | (rows != self.truth[side]).any(axis=1)
            event(f"packed: {stats['n_packed'] > 0}")
        self.touched[:] = False


def test_the_store_is_a_plain_cache() -> None:
    options: dict[str, Any] = {
        "max_examples": max(1, N_STEPS // STEPS_PER_RUN),
        "stateful_step_count": STEPS_PER_RUN,
        "deadline": None,
        "print_blob": True,
        "database": None,
        "suppress_health_check": list(HealthCheck),
        "phases": [Phase.generate, Phase.shrink],
    }
    seeded = seed(SEED)(Store)
    run_state_machine_as_test(seeded, settings=settings(**options))
