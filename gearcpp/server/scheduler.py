"""Several sequences in one llama.cpp context, decoded together: continuous batching.

A thread of its own repeats one step: drop what was cancelled, admit what waits, decode one batch (the next token of every answer, then pieces of prompts
as far as the batch reaches), sample. With one slot this is one request after the other.

The KV cache is unified: all sequences share its cells. A prompt takes over the cells of the longest prefix that it shares with any other
sequence, running or finished, so its rows and tiles are there once. Finished sequences stay in the cache until their cells are needed.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import llama_cpp

from gearcpp.errors import ClosedError, GearError
from gearcpp.runtime import free_cells
from gearcpp.runtime.context import Batch

from .cells import CellLedger
from .sequence import Sequence

if TYPE_CHECKING:
    from gearcpp.runtime.llama import Llama

logger = logging.getLogger("gearcpp.server")

HEADROOM = 64  # cells that must be free for an answer's first tokens before its prompt is begun
WORTH_WAITING = 32  # tokens in common with a prompt under way for which a prompt waits, to share them
# When as many tokens were written as this many contexts hold, a prefix is evaluated anew instead of shared: where its rows are in a tile with cells
# that others write again and again, GEAR's ranges widen each time, and the rows lose (docs/server.md).
TURNS = 1
_KV_PERIOD = 0.5  # seconds between two looks at the KV cache's statistics
_RATE_PERIOD = 0.5  # seconds over which tokens per second are counted, at least


@dataclass
class Counters:
    """What a scheduler has done and holds. Written by its thread alone; whoever reads may see a step half counted."""

    prompt_tokens: int = 0  # evaluated
    shared_tokens: int = 0  # of prompts, taken over from another sequence
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    cells: int = 0
    cells_running: int = 0
    cells_kept: int = 0  # of finished sequences alone
    tokens_per_second: float = 0.0
    kv: dict[str, Any] = field(default_factory=dict)  # Llama.kv_stats()


@dataclass
class _Slot:
    """A sequence number of llama.cpp and what is in the cache under it."""

    id: int
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    sequence: Sequence | None = None
    order: int = 0  # of admission; later: of the end

    @property
    def rest(self) -> list[int]:
        """Tokens of the running sequence that are not in the cache yet."""
        assert self.sequence
        return self.sequence.tokens[len(self.tokens) :]

    @property
    def n_rest(self) -> int:
        assert self.sequence
        return len(self.sequence.tokens) - len(self.tokens)


class Scheduler:
    """Decodes sequences together.

    Args:
        llm: the model; its context must be unified with ``n_slot`` sequences, and belongs to the scheduler from now on.
        n_slot: most sequences at once.
    """

    def __init__(self, llm: Llama, n_slot: int) -> None:
        assert 1 <= n_slot <= llm.n_batch
        self.counters = Counters(cells=llm.n_ctx())
        self._llm = llm
        self._context = llm.ctx
        self._memory = llama_cpp.llama_get_memory(llm.ctx)
        # A recurrent state cannot be cut to a common prefix.
        self._can_cut = not (llama_cpp.llama_model_is_recurrent(llm.model) or llama_cpp.llama_model_is_hybrid(llm.model))
        # Cells of a sliding window that two sequences hold are not given back when both have moved on: there a prompt takes over what a finished
        # sequence left, but none that goes on.
        self._can_share = self._can_cut and not llm.has_small_windows
        self._cells = CellLedger(llm.n_ctx())
        self._most_age = TURNS * llm.n_ctx() if llm.kv_type.gear else math.inf
        self._slots = [_Slot(i) for i in range(n_slot)]
        self._batch = Batch(llm.n_batch)
        self._orders = itertools.count(1)
        self._waiting: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._kv_time = self._rate_time = time.monotonic()
        self._rate_tokens = 0
        self._look_at_cache()
        # llama.cpp asks between the operations of a step whether to give up. libc's atoi is the answer: "0" no, "1" yes, without Python in a hot loop.
        self._abort = ctypes.create_string_buffer(b"0")
        self._ask_abort = ctypes.cast(ctypes.CDLL(None).atoi, llama_cpp.ggml_abort_callback)
        llama_cpp.llama_set_abort_callback(self._context, self._ask_abort, ctypes.cast(self._abort, ctypes.c_void_p))
        self._thread = threading.Thread(target=self._run, name="gearcpp-scheduler", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Let it wait for its turn. ClosedError when there will be none."""
        with self._changed:
            if self._closed:
                raise ClosedError("the server is stopping")
            if self._failure:
                raise GearError(f"the scheduler stopped: {self._failure!r}")
            self._waiting.append(sequence)
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether sequences that are submitted will be decoded."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Drop all sequences and end the thread, in the middle of a step if need be. May be called twice."""
        with self._changed:
            self._closed = True
            self._abort.value = b"1"
            self._changed.notify()
        self._thread.join()

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # The scheduler's thread
    # -----------------------------------------------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> list[_Slot]:
        """Slots with a sequence, in the order of admission."""
        return sorted((slot for slot in self._slots if slot.sequence), key=lambda slot: slot.order)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as error:
            logger.exception("the scheduler stopped")
            self._failure = error
        finally:
            with self._changed:
                waiting, self._waiting = list(self._waiting), deque()
            for sequence in [*(slot.sequence for slot in self._running), *waiting]:
                assert sequence
                if self._failure:
                    sequence.fail(GearError(f"the scheduler stopped: {self._failure!r}"))
                else:
                    sequence.drop()

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do. False when closed."""
        with self._changed:
            while not (self._closed or self._waiting or self._running):
                self._changed.wait()
            return not self._closed

    def _step(self) -> None:
        start = time.monotonic()
        self._drop_cancelled()
        self._admit()
        work = self._plan()
        self.counters.running, self.counters.waiting = len(self._running), len(self._waiting)  # now: the first step of a long prompt takes a while
        if work and self._decode(work):
            self._sample(work)
        self._count(start)

    def _drop_cancelled(self) -> None:
        for slot in self._running:
            if slot.sequence and slot.sequence.cancelled:
                slot.sequence.drop()
                self._finish(slot)
        with self._changed:
            cancelled = [sequence for sequence in self._waiting if sequence.cancelled]
            for sequence in cancelled:
                self._waiting.remove(sequence)
        for sequence in cancelled:
            sequence.drop()

    def _finish(self, slot: _Slot) -> None:
        """The slot's sequence is over; what is in the cache stays for others to share."""
        slot.sequence = None
        slot.order = next(self._orders)

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # Admission
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give slots to those who wait, strictly in turn, as long as their prompts fit into the cache beside what the running ones still need."""
        while self._waiting:
            idle = [slot for slot in self._slots if not slot.sequence]
            sequence = self._waiting[0]
            if not idle or self._is_being_read(sequence):
                return
            slot = self._prepare(idle, sequence)
            promised = sum(running.n_rest for running in self._running)
            n_new = len(sequence.tokens) - len(slot.tokens) + min(sequence.n_left, HEADROOM)
            while self._cells.free - promised < n_new and self._evict(slot):
                pass
            if self._cells.free - promised < n_new and self._running:
                return
            with self._changed:
                self._waiting.popleft()
            slot.sequence = sequence
            slot.order = next(self._orders)
            self.counters.shared_tokens += len(slot.tokens)

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Whether a running sequence's prompt, when it is in the cache, will have much more in common with this one than anything has now."""
        if not self._can_share:
            return False
        now = max(self._n_shareable(slot, sequence) for slot in self._slots)
        return any(slot.n_rest > 1 and _common(slot.sequence.tokens, sequence.tokens) >= now + WORTH_WAITING for slot in self._running if slot.sequence)

    def _prepare(self, idle: list[_Slot], sequence: Sequence) -> _Slot:
        """An idle slot that holds the longest prefix of the sequence that is in the cache (all but its last token, whose logits are wanted)."""
        donor = max(self._slots if self._can_share else idle, key=lambda slot: self._n_shareable(slot, sequence))
        n = min(self._n_shareable(donor, sequence), len(sequence.tokens) - 1)
        empty_first = sorted(idle, key=lambda slot: (bool(slot.tokens), slot.order))
        if n and donor in idle and (2 * n >= len(donor.tokens) or len(idle) == 1 or not self._can_share):
            self._cut(donor, n)
            return donor
        target = empty_first[0] if empty_first[0] is not donor or not n else empty_first[1]
        self._cut(target, 0)
        if n:
            llama_cpp.llama_memory_seq_cp(self._memory, donor.id, target.id, 0, n)
            target.tokens = donor.tokens[:n]
            target.cells = self._cells.share(donor.cells[:n])
        return target

    def _n_shareable(self, slot: _Slot, sequence: Sequence) -> int:
        """Tokens of a sequence's prefix whose cells a slot can share."""
        if not self._can_cut or not slot.cells or self._cells.age(slot.cells[0]) > self._most_age:
            return 0
        n = _common(slot.tokens, sequence.tokens)
        return n if free_cells.can_go_back(self._context, slot.id, min(n, len(sequence.tokens) - 1)) else 0

    def _evict(self, spared: _Slot | None = None) -> bool:
        """Give up the finished sequence that ended longest ago. Whether there was one."""
        idle = [slot for slot in self._slots if not slot.sequence and slot.tokens and slot is not spared]
        if not idle:
            return False
        self._cut(min(idle, key=lambda slot: slot.order), 0)
        return True

    def _cut(self, slot: _Slot, n: int) -> None:
        """Keep the first n tokens of a slot."""
        if n == len(slot.tokens):
            return
        if not llama_cpp.llama_memory_seq_rm(self._memory, slot.id, n, -1):
            n = 0
            llama_cpp.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
        if self._llm._device:
            free_cells.tell(self._context, self._llm._device)
        self._cells.release(slot.cells[n:])
        del slot.tokens[n:], slot.cells[n:]

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # One batch
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def _plan(self) -> list[tuple[_Slot, int]]:
        """How many tokens of which slots the next batch holds. When the cache is full, the sequence admitted last goes back to wait."""
        while True:
            running = self._running
            work = [(slot, 1) for slot in running if slot.n_rest == 1]
            n_left = self._batch.capacity - len(work)
            for slot in running:
                if slot.n_rest > 1 and n_left:
                    work.append((slot, min(slot.n_rest, n_left)))
                    n_left -= work[-1][1]
            n_wanted = self._batch.capacity - n_left
            while self._cells.free < n_wanted and self._evict():
                pass
            if self._cells.free >= n_wanted:
                return work
            assert len(running) > 1, "a single sequence never outgrows the context"
            self._preempt(running[-1])

    def _preempt(self, slot: _Slot) -> None:
        """Take a sequence's cells away; prompt and answer so far are evaluated again when its turn comes."""
        assert slot.sequence
        self.counters.preemptions += 1
        with self._changed:
            self._waiting.appendleft(slot.sequence)
        slot.sequence = None
        self._cut(slot, 0)

    def _decode(self, work: list[tuple[_Slot, int]]) -> bool:
        """Evaluate a batch. When llama.cpp fails, so do all sequences in it, and the cache is emptied: what it holds is not known."""
        self._batch.clear()
        for slot, n in work:
            self._batch.add(slot.id, len(slot.tokens), slot.rest[:n], logits=n == slot.n_rest)
        status = llama_cpp.llama_decode(self._context, self._batch.struct)
        if status == 0:
            for slot, n in work:
                assert slot.sequence
                self.counters.prompt_tokens += max(0, min(slot.sequence.n_prompt, len(slot.tokens) + n) - len(slot.tokens))
                slot.tokens += slot.rest[:n]
                slot.cells += self._cells.take(n)
            return True
        if self._closed:
            return False
        device = self._llm._device
        failure = (device.take_failure() if device else None) or GearError(f"llama_decode failed with status {status}")
        logger.error("a batch failed: %s", failure)
        for slot, _ in work:
            assert slot.sequence
            slot.sequence.fail(failure)
            self._finish(slot)
        llama_cpp.llama_memory_clear(self._memory, True)
        for slot in self._slots:
            self._cells.release(slot.cells)
            slot.tokens, slot.cells = [], []
        return False

    def _sample(self, work: list[tuple[_Slot, int]]) -> None:
        index = -1
        for slot, n in work:
            index += n
            if slot.n_rest:
                continue
            assert slot.sequence
            n_before = slot.sequence.n_answer
            try:
                is_done = slot.sequence.advance(self._context, index)
            except Exception as error:  # of a grammar or a logits processor: the other sequences have nothing to do with it
                slot.sequence.fail(error)
                is_done = True
            self.counters.generated_tokens += slot.sequence.n_answer - n_before
            if is_done:
                self._finish(slot)

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # Counting
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def _count(self, start: float) -> None:
        now = time.monotonic()
        counters = self.counters
        counters.steps += 1
        counters.step_seconds += now - start
        counters.running, counters.waiting = len(self._running), len(self._waiting)
        is_idle = not counters.running
        if is_idle or now - self._rate_time >= _RATE_PERIOD:
            counters.tokens_per_second = 0.0 if is_idle else (counters.generated_tokens - self._rate_tokens) / (now - self._rate_time)
            self._rate_time, self._rate_tokens = now, counters.generated_tokens
        if is_idle or now - self._kv_time >= _KV_PERIOD:
            self._look_at_cache()

    def _look_at_cache(self) -> None:
        self._kv_time = time.monotonic()
        self.counters.cells_running = _union(slot.cells for slot in self._slots if slot.sequence)
        self.counters.cells_kept = self._cells.used - self.counters.cells_running
        self.counters.kv = self._llm.kv_stats()


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _union(lists: Iterable[list[int]]) -> int:
    """How many different cells there are in lists of them."""
    return len(set().union(*lists))
