"""Answers do not depend on what a context held before: an emptied one is a new one, bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from gearcpp import GearConfig, Llama
from gearcpp.runtime import free_cells

RandomModel = Callable[..., Path]
SMALL = GearConfig(tile=64, n_tail=32)
N_PROMPT = 500


def load(path: Path, kv_type: Any = SMALL, **arguments: Any) -> Llama:
    defaults = {"n_ctx": 1024, "n_batch": 128, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return Llama(str(path), kv_type=kv_type, **{**defaults, **arguments})


def logits(llm: Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), (llm.n_vocab(),)).copy()


def tokens(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, n).tolist()


def exact_and_packed(llm: Llama) -> tuple[int, int]:
    total = llm.kv_stats()["total"]
    return total["n_exact"], total["n_packed"]


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, random_model: RandomModel) -> Path:
    return random_model(request.param)


def reset(llm: Llama) -> None:
    llm.reset()


def clear(llm: Llama) -> None:
    llm.n_tokens = 0
    llm._ctx.kv_cache_clear()


def remove(llm: Llama) -> None:
    llm.n_tokens = 0
    llm._ctx.kv_cache_seq_rm(-1, 0, -1)


def count_from_zero(llm: Llama) -> None:
    llm.n_tokens = 0  # what the parent's reset does: the next eval gives the cells back


@pytest.mark.parametrize("kv_type", [SMALL, GearConfig(bits_k=3, bits_v=3, tile=64, n_tail=32)], ids=["4 bits", "3 bits"])
@pytest.mark.parametrize("empty", [reset, clear, remove, count_from_zero])
def test_an_emptied_context_is_a_new_one(random_model: RandomModel, empty: Callable[[Llama], None], kv_type: GearConfig) -> None:
    path = random_model()
    new = load(path, kv_type)
    new.eval(tokens(N_PROMPT))
    assert new.kv_stats()["total"]["n_packed"] > 0
    used = load(path, kv_type)
    for earlier in (tokens(N_PROMPT), tokens(900, seed=2), tokens(70, seed=3)):
        used.eval(earlier)
        empty(used)
    used.eval(tokens(N_PROMPT))
    assert np.array_equal(logits(new), logits(used))
    assert exact_and_packed(new) == exact_and_packed(used)


def test_windows_leave_no_trace(model: Path) -> None:
    new, used = load(model), load(model)
    new.eval(tokens(N_PROMPT))
    used.eval(tokens(900, seed=2))
    used.reset()
    used.eval(tokens(N_PROMPT))
    assert np.array_equal(logits(new), logits(used))


@pytest.mark.parametrize("n_end", [1, 40, 150])
def test_a_sequence_that_gives_up_its_end_goes_on_as_if_it_had_never_been(random_model: RandomModel, n_end: int) -> None:
    """But for what the end's queries said of rounding (feedback_k): a mean does not forget."""
    path, kv_type = random_model(), SMALL.replace(feedback_k=False)
    new, used = load(path, kv_type), load(path, kv_type)
    for llm in (new, used):
        llm.eval(tokens(200))
    for seed in range(3):
        used.eval(tokens(n_end, seed + 10))
        used.n_tokens = 200
        used._ctx.kv_cache_seq_rm(-1, 200, -1)
    counted = exact_and_packed(used)
    assert sum(counted) == sum(exact_and_packed(new))
    if n_end < 100:  # a longer end takes the pool's rows, and what was packed for it stays packed
        assert counted == exact_and_packed(new)
        for llm in (new, used):
            llm.eval(tokens(300, seed=5))
        assert np.array_equal(logits(new), logits(used))
        assert exact_and_packed(new) == exact_and_packed(used)


def test_a_gap_in_the_middle_is_free(random_model: RandomModel) -> None:
    llm = load(random_model())
    llm.eval(tokens(600))
    llm.shift_context(10, 200)
    assert sum(exact_and_packed(llm)) == 2 * llm.info.n_layer * 400


def test_greedy_text_is_the_same_after_other_conversations(random_model: RandomModel) -> None:
    llm = load(random_model())
    prompt = tokens(400)

    def answer() -> list[int]:
        stream = llm.generate(prompt, temp=0.0)
        return [next(stream) for _ in range(24)]

    first = answer()
    for seed in range(3):
        llm.eval(tokens(300, seed))
        llm.reset()
    assert answer() == first


def test_other_sequences_keep_what_they_hold(random_model: RandomModel) -> None:
    """Two sequences in one stream of cells; one gives up its end."""
    from gearcpp import context_params, model_params

    params, device = model_params(random_model(), SMALL, n_ubatch=64)
    assert device
    model = llama_cpp.llama_model_load_from_file(str(random_model()).encode(), params)
    context = llama_cpp.llama_init_from_model(
        model, context_params(SMALL, n_ctx=1024, n_batch=64, n_ubatch=64, n_seq_max=2, kv_unified=True, n_threads=1, n_threads_batch=1)
    )
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(64, 0, 1)

    def decode(sequence: int, first: int, ids: list[int]) -> None:
        for begin in range(0, len(ids), 64):
            piece = ids[begin : begin + 64]
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + begin + i, 1, sequence
                batch.logits[i] = i == len(piece) - 1
            assert llama_cpp.llama_decode(context, batch) == 0

    decode(0, 0, tokens(300))
    decode(1, 0, tokens(300, seed=2))
    size = llama_cpp.llama_state_seq_get_size(context, 0)
    before = (ctypes.c_uint8 * size)()
    llama_cpp.llama_state_seq_get_data(context, before, size, 0)
    llama_cpp.llama_memory_seq_rm(memory, 1, 100, -1)
    free_cells.tell(context, device)
    assert {store["n_written"] for store in device.stats()} == {400}
    after = (ctypes.c_uint8 * size)()
    llama_cpp.llama_state_seq_get_data(context, after, size, 0)
    assert bytes(before) == bytes(after)
    llama_cpp.llama_memory_seq_rm(memory, -1, -1, -1)
    free_cells.tell(context, device)
    assert {store["n_written"] for store in device.stats()} == {0}
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    device.close()
