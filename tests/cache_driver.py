"""A context driven through llama.cpp's low-level API, so that a test can run one script twice: on f16 and on GEAR.

A `CacheDriver` decodes tokens of several sequences, removes, copies and shifts them, and records the logits of every step and what every call answered.
Two runs of a script differ by their cache and by nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import gearcpp
from gearcpp.cache.device import GearDevice
from gearcpp.cache.python_codec import Codec
from gearcpp.runtime.context import Batch

Tokens = Sequence[int]


class CacheDriver:
    """One model, one context after the other, and what was recorded. Close it, or use it in a ``with`` statement.

    Attributes:
        logits: [n_vocab] of the last token of each sequence of each step, in order.
        answers: what llama.cpp said to removals and the like.
        ends: the next position of each sequence.
        most_packed: most rows that were packed after a step, over K and V of all layers.
    """

    N_UBATCH = 64

    def __init__(self, path: Path, kv_type: Any, codec: Codec | None = None, **fields: Any) -> None:
        params, self.device = gearcpp.model_params(path, kv_type, n_ubatch=self.N_UBATCH, codec=codec)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, self.failure
        self._context_params = gearcpp.context_params(
            kv_type, **{"n_ctx": 2048, "n_batch": 512, "n_ubatch": self.N_UBATCH, "n_threads": 1, "n_threads_batch": 1, "n_seq_max": 4, **fields}
        )
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.logits: list[np.ndarray] = []
        self.answers: list[Any] = []
        self.ends: dict[int, int] = {}
        self.most_packed = 0
        self.new_context()

    def __enter__(self) -> CacheDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
        if self.device:
            self.device.close()

    def new_context(self) -> None:
        """Throw the context away and make another one."""
        if self.context:
            llama_cpp.llama_free(self.context)
        self.context = llama_cpp.llama_init_from_model(self.model, self._context_params)
        assert self.context, self.failure
        self.ends = {}

    @property
    def failure(self) -> Exception | None:
        return self.device.take_failure() if self.device else None

    @property
    def memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.context)

    @property
    def n_packed(self) -> int:
        return sum(store["n_packed"] for store in self.device.stats()) if isinstance(self.device, GearDevice) else 0

    def step(self, sequences: Mapping[int, Tokens]) -> dict[int, np.ndarray]:
        """Decode tokens at the end of each sequence, all in one batch, and record and return the logits after each one's last token."""
        n = sum(map(len, sequences.values()))
        batch = Batch(n)
        last: dict[int, int] = {}
        for sequence, tokens in sequences.items():
            position = self.ends.get(sequence, 0)
            batch.add(sequence, position, tokens, logits=True)
            last[sequence], self.ends[sequence] = batch.struct.n_tokens - 1, position + len(tokens)
        status = llama_cpp.llama_decode(self.context, batch.struct)
        assert status == 0, (status, self.failure)
        rows = {s: llama_cpp.llama_get_logits_ith(self.context, at) for s, at in last.items()}
        seen = {s: np.ctypeslib.as_array(row, (self.n_vocab,)).astype(np.float64) for s, row in rows.items()}
        self.logits += seen.values()
        self.most_packed = max(self.most_packed, self.n_packed)
        return seen

    def remove(self, sequence: int, begin: int, end: int = -1) -> bool:
        """Take positions out of a sequence, where llama.cpp can."""
        done = bool(llama_cpp.llama_memory_seq_rm(self.memory, sequence, begin, end))
        self.answers.append(done)
        if done and sequence in self.ends and (end < 0 or end >= self.ends[sequence]):
            self.ends[sequence] = min(self.ends[sequence], max(begin, 0))
        return done

    def copy(self, source: int, target: int, begin: int = -1, end: int = -1) -> None:
        """Let a sequence share what another one holds."""
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, begin, end)
        self.ends[target] = self.ends[source] if end < 0 else min(end, self.ends[source])

    def keep(self, sequence: int) -> None:
        """Forget all other sequences."""
        llama_cpp.llama_memory_seq_keep(self.memory, sequence)
        # llama.cpp leaves streams of their own alone; what it kept is what counts.
        ends = {s: int(llama_cpp.llama_memory_seq_pos_max(self.memory, s)) + 1 for s in self.ends}
        self.ends = {s: end for s, end in ends.items() if end > 0}
        self.answers.append(self.ends)

    def shift(self, sequence: int, begin: int, delta: int) -> None:
        """Move the positions of a sequence from ``begin`` on."""
        llama_cpp.llama_memory_seq_add(self.memory, sequence, begin, -1, delta)
        self.ends[sequence] += delta

    def clear(self, data: bool) -> None:
        """Forget everything; data: also what the cells hold."""
        llama_cpp.llama_memory_clear(self.memory, data)
        self.ends = {}

    def state(self, sequence: int | None = None) -> tuple[bytes, int]:
        """The saved state of the context, or of one sequence."""
        of_all = sequence is None
        size = llama_cpp.llama_state_get_size(self.context) if of_all else llama_cpp.llama_state_seq_get_size(self.context, sequence)
        buffer = (ctypes.c_uint8 * size)()
        if of_all:
            written = llama_cpp.llama_state_get_data(self.context, buffer, size)
        else:
            written = llama_cpp.llama_state_seq_get_data(self.context, buffer, size, sequence)
        assert written, self.failure
        return bytes(memoryview(buffer)[:written]), size

    def restore(self, state: tuple[bytes, int], ends: Mapping[int, int], sequence: int | None = None) -> None:
        """Go back to a saved state; ``ends`` are those of the sequences in it."""
        data = (ctypes.c_uint8 * len(state[0])).from_buffer_copy(state[0])
        if sequence is None:
            read = llama_cpp.llama_state_set_data(self.context, data, len(data))
            self.ends = dict(ends)
        else:
            read = llama_cpp.llama_state_seq_set_data(self.context, data, len(data), sequence)
            self.ends[sequence] = ends[sequence]
        assert read == len(data), self.failure


def furthest(reference: Sequence[np.ndarray], other: Sequence[np.ndarray], share: float = 1.0) -> float:
    """The largest difference of logits in two runs, relative to the largest logit of its step; share: of this share of the steps, the nearest ones."""
    assert len(reference) == len(other) > 0
    distances = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(reference, other, strict=True)]
    return float(np.quantile(distances, share))


def tokens_differ(reference: Sequence[np.ndarray], other: Sequence[np.ndarray], margin: float) -> int:
    """Steps whose likeliest tokens differ, where the reference's is ahead of the next one by more than ``margin`` (relative to its largest logit)."""
    n = 0
    for a, b in zip(reference, other, strict=True):
        top = np.sort(a)[-2:]
        n += a.argmax() != b.argmax() and (top[1] - top[0]) / np.abs(a).max() > margin
    return n
