"""Timing llama.cpp's steps with several KV caches in one process, in turns: what disturbs one of them disturbs its rivals, too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gearcpp import native
from gearcpp.cache.kv_type import KVType
from gearcpp.cli._console import is_verbose, notice
from gearcpp.cli._model import load_model
from gearcpp.errors import GearError, OutOfMemoryError
from gearcpp.model_info import read_model_info

_ROOM = 512 * 2**20  # compute buffers and Python beside a model's weights and cache


@dataclass(frozen=True)
class Plan:
    """What to run, by llama-bench's names.

    Attributes:
        n_prompt, n_gen: tokens of a prompt and of a generation, one test each.
        n_depth: tokens in the cache before a test.
        repetitions: of every test.
        n_threads: None: the physical cores.
        n_ubatch: tokens of a batch.
        swa_full: sliding windows have as many cells as the context.
    """

    n_prompt: Sequence[int]
    n_gen: Sequence[int]
    n_depth: Sequence[int]
    repetitions: int = 5
    n_threads: int | None = None
    n_ubatch: int = 512
    swa_full: bool = False

    @property
    def tests(self) -> list[tuple[int, int]]:
        """(n_prompt, n_gen) of every test; one of them is 0."""
        return [(n, 0) for n in self.n_prompt if n] + [(0, n) for n in self.n_gen if n]

    @property
    def n_ctx(self) -> int:
        """Cells that the deepest test needs, rounded up as llama.cpp does."""
        n_cell = max(self.n_depth) + max(max(test) for test in self.tests)
        return -(-n_cell // 256) * 256


@dataclass
class Result:
    """One test of one cache type.

    Attributes:
        seconds: of every repetition, in the order in which they ran.
        ratios: the baseline's seconds over these, repetition by repetition: above 1 is faster than the baseline.
        kv_bytes, kv_bytes_f16: memory of the cache for its whole context, and what f16 takes.
        peak_rss: of a process of its own that fills the deepest context, or None.
        attention_share: share of the step that depth adds, 1 - t(0) / t(depth); None without a test at depth 0.
    """

    kv_type: str
    n_prompt: int
    n_gen: int
    n_depth: int
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    kv_bytes_f16: int = 0
    peak_rss: int | None = None
    attention_share: float | None = None

    @property
    def test(self) -> str:
        """Such as "pp512 @ d4096"."""
        return (f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}") + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def rates(self) -> list[float]:
        """Tokens a second of every repetition."""
        return [(self.n_prompt or self.n_gen) / seconds for seconds in self.seconds]

    @property
    def rate(self) -> float:
        """Median tokens a second."""
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """Median ratio to the baseline."""
        return statistics.median(self.ratios)


class Runner:
    """One cache type: a model, and a context filled with random tokens to a depth."""

    def __init__(self, path: Path, kv: KVType, plan: Plan) -> None:
        import llama_cpp

        from gearcpp.runtime.context import Batch

        self.kv = kv
        self.llm = load_model(path, kv, n_ctx=plan.n_ctx, n_threads=plan.n_threads, n_batch=plan.n_ubatch, swa_full=plan.swa_full, verbose=is_verbose())
        self._memory = llama_cpp.llama_get_memory(self.llm.ctx)
        self._batch = Batch(self.llm.n_batch)
        self._random = np.random.default_rng(1)  # every cache type sees the same tokens
        self._depth = 0

    def close(self) -> None:
        """Free model and context."""
        self.llm.close()

    def fill(self, depth: int) -> None:
        """Make the cache hold exactly `depth` tokens."""
        import llama_cpp

        from gearcpp.runtime.free_cells import can_go_back

        if depth < self._depth:
            # What has no way back, a recurrent state or a window that has moved on, is filled again.
            goes_back = can_go_back(self.llm.ctx, 0, depth) and llama_cpp.llama_memory_seq_rm(self._memory, 0, depth, -1)
            if not goes_back:
                llama_cpp.llama_memory_clear(self._memory, True)
            self._depth = depth if goes_back else 0
        self._decode(depth - self._depth, self.llm.n_batch)

    def seconds(self, n_prompt: int, n_gen: int) -> float:
        """Time one test, then go back to the depth at which it started."""
        depth = self._depth
        start = time.perf_counter()
        self._decode(n_prompt or n_gen, self.llm.n_batch if n_prompt else 1)
        elapsed = time.perf_counter() - start
        self.fill(depth)
        return elapsed

    def _decode(self, n_tokens: int, n_batch: int) -> None:
        import llama_cpp

        tokens = self._random.integers(0, self.llm.n_vocab(), n_tokens, np.int32)  # [n_tokens]
        for first in range(0, n_tokens, n_batch):
            chunk = tokens[first : first + n_batch]
            self._batch.clear()
            self._batch.add(0, self._depth, chunk, logits=True)
            if status := llama_cpp.llama_decode(self.llm.ctx, self._batch.struct):
                raise GearError(f"llama_decode returned {status} with --kv {self.kv.name} at depth {self._depth}; -v shows llama.cpp's log")
            llama_cpp.llama_synchronize(self.llm.ctx)
            self._depth += len(chunk)


def run(path: Path, types: Sequence[KVType], baseline: KVType, plan: Plan) -> list[Result]:
    """Time every test of every type.

    As many types as fit into memory are loaded together, the baseline always among them; a repetition runs each of them once, forwards and backwards in
    turn (A B C, C B A, ...).

    Raises:
        OutOfMemoryError: not even two of them fit.
    """
    results: list[Result] = []
    for group in groups(types, baseline, _n_resident(path, len(types), plan)):
        with ExitStack() as stack:
            runners = []
            for kv in group:
                notice(f"loading {path.name} with {kv.name}")
                runners.append(runner := Runner(path, kv, plan))
                stack.callback(runner.close)
                runner.seconds(min(plan.n_ubatch, plan.n_ctx), 0)  # warm-up: pages, threads and caches
            measured = _run_group(runners, plan)
        results += [result for result in measured if result.kv_type != baseline.name or not results]
    _add_attention_share(results)
    return results


def groups(types: Sequence[KVType], baseline: KVType, n_resident: int) -> list[list[KVType]]:
    """The types in groups of at most `n_resident`, each led by the baseline."""
    others = [kv for kv in types if kv != baseline]
    return [[baseline, *others[first : first + n_resident - 1]] for first in range(0, max(1, len(others)), n_resident - 1)]


def _n_resident(path: Path, n_types: int, plan: Plan) -> int:
    """How many models with their caches fit into memory together; weights may be copied for each (llama.cpp repacks them)."""
    info, available = read_model_info(path), native.available_memory()
    needed = sum(file.stat().st_size for file in info.files) + 2 * info.kv_elements(plan.n_ctx) + _ROOM
    n_resident = min(n_types, int(available // needed))
    if n_resident < min(2, n_types):
        raise OutOfMemoryError(
            f"two models with a context of {plan.n_ctx} need {2 * needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free: "
            "use a smaller model, -d or -p"
        )
    return max(2, n_resident)


def _run_group(runners: Sequence[Runner], plan: Plan) -> list[Result]:
    """Every test at every depth; the first runner is the baseline."""
    results = []
    for depth in sorted(set(plan.n_depth)):
        for runner in runners:
            runner.fill(depth)
        for n_prompt, n_gen in plan.tests:
            row = [_result(runner, n_prompt, n_gen, depth) for runner in runners]
            notice(f"measuring {row[0].test}: {', '.join(runner.kv.name for runner in runners)}")
            for repetition in range(plan.repetitions):
                turns = list(zip(runners, row, strict=True))
                for runner, result in turns if repetition % 2 == 0 else reversed(turns):
                    result.seconds.append(runner.seconds(n_prompt, n_gen))
            for result in row:
                result.ratios = [base / own for base, own in zip(row[0].seconds, result.seconds, strict=True)]
            results += row
    return results


def _result(runner: Runner, n_prompt: int, n_gen: int, depth: int) -> Result:
    total = runner.llm.kv_stats()["total"]
    return Result(runner.kv.name, n_prompt, n_gen, depth, kv_bytes=total["bytes"], kv_bytes_f16=total["bytes_f16"])


def _add_attention_share(results: Sequence[Result]) -> None:
    """Nothing but attention over the cache grows with depth, so what a step takes beyond the same step at depth 0 is attention's."""
    at_zero = {(r.kv_type, r.n_prompt, r.n_gen): statistics.median(r.seconds) for r in results if r.n_depth == 0}
    for result in results:
        base = at_zero.get((result.kv_type, result.n_prompt, result.n_gen))
        if base and result.n_depth:
            result.attention_share = max(0.0, 1 - base / statistics.median(result.seconds))
