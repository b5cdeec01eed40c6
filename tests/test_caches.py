"""Prompt caches: gearcpp's own, which hold packed states, and llama-cpp-python's, which go on working."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache
from models import N_VOCAB, Shape

from gearcpp import ConfigError, GearConfig, GearDiskCache, GearError, GearRAMCache, GearState, Llama

RandomModel = Callable[..., Path]
Cache = GearRAMCache | GearDiskCache
SMALL = GearConfig(tile=64, n_tail=32)


def load(path: Path, kv_type: Any = SMALL, **arguments: Any) -> Llama:
    return Llama(str(path), kv_type=kv_type, **{"n_ctx": 1024, "n_batch": 64, "n_threads": 2, "flash_attn": True, "verbose": False, **arguments})


def state_of(llm: Llama, tokens: list[int]) -> GearState:
    llm.reset()
    llm.eval(tokens)
    state = llm.save_state(packed=True)
    assert isinstance(state, GearState)
    return state


def next_logits(llm: Llama) -> np.ndarray:
    llm.eval([7])
    llm.n_tokens -= 1
    return np.ctypeslib.as_array(llm._ctx.get_logits(), (N_VOCAB,)).copy()


@pytest.fixture
def llm(random_model: RandomModel) -> Llama:
    return load(random_model())


@pytest.fixture(params=["memory", "disk"])
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Cache]:
    return lambda capacity=2**30: GearRAMCache(capacity) if request.param == "memory" else GearDiskCache(tmp_path / "cache", capacity)


MakeCache = Callable[..., Cache]


def test_the_longest_prefix_is_found(make_cache: MakeCache, llm: Llama) -> None:
    cache = make_cache()
    prefixes = [[5], [5, 6], [5, 6, 7, 8], [9, 9]]
    for tokens in prefixes:
        cache[tokens] = state_of(llm, tokens)
    for tokens, found in (([5, 6, 7, 1], [5, 6, 7, 8]), ([5, 1], [5]), ([5, 6, 1], [5, 6]), ([9], [9, 9])):
        assert tokens in cache
        assert cache[tokens].input_ids.tolist() == found
    for tokens in ([1], []):
        assert tokens not in cache
        with pytest.raises(KeyError):
            cache[tokens]
    assert 3 not in cache


def test_states_come_back_as_they_were(make_cache: MakeCache, llm: Llama, random: np.random.Generator) -> None:
    cache = make_cache()
    tokens = random.integers(3, N_VOCAB, 300).tolist()
    cache[tokens] = state_of(llm, tokens)
    expected = next_logits(llm)
    llm.reset()
    llm.load_state(cache[tokens])
    np.testing.assert_array_equal(next_logits(llm), expected)


def test_what_was_not_used_for_longest_goes_first(make_cache: MakeCache, llm: Llama) -> None:
    states = {first: state_of(llm, [first, 1, 2]) for first in (10, 11, 12, 13)}
    n_bytes = max(len(state.llama_state) + 2 * state.input_ids.nbytes for state in states.values())
    cache = make_cache(3 * n_bytes)
    for first in (10, 11, 12):
        cache[[first]] = states[first]
    assert cache.cache_size <= 3 * n_bytes
    assert cache.cache_size >= sum(len(states[first].llama_state) for first in (10, 11, 12))
    cache[[10]]  # used
    cache[[13]] = states[13]
    assert [first for first in states if [first] in cache] == [10, 12, 13]
    cache[[12]] = states[12]  # kept again: no second copy, and it is the newest
    assert [first for first in states if [first] in cache] == [10, 12, 13]
    cache[[11]] = states[11]
    assert [first for first in states if [first] in cache] == [11, 12, 13]

    small = make_cache(len(states[10].llama_state) - 1)
    small[[10]] = states[10]
    assert [10] not in small or isinstance(small, GearDiskCache)  # the folder has it from before


def test_a_state_that_is_too_large_by_itself_pushes_nothing_out(llm: Llama, tmp_path: Path) -> None:
    short, long = state_of(llm, [1, 2]), state_of(llm, list(range(3, 203)))
    capacity = len(short.llama_state) + 1000
    assert len(long.llama_state) > capacity
    for cache in (GearRAMCache(capacity), GearDiskCache(tmp_path / "cache", capacity)):
        cache[[1, 2]] = short
        cache[[3]] = long
        assert [1] in cache and [3] not in cache


def test_only_packed_states(make_cache: MakeCache, llm: Llama) -> None:
    llm.eval([1, 2])
    with pytest.raises(ConfigError, match="holds packed states"):
        make_cache()[[1, 2]] = llm.save_state()


def test_each_model_and_cache_sees_its_own(make_cache: MakeCache, random_model: RandomModel) -> None:
    cache = make_cache()
    models = [load(random_model()), load(random_model("llama", Shape(seed=2))), load(random_model(), "f16"), load(random_model(), "q8_0")]
    for i, model in enumerate(models):
        model.set_cache(cache)
        model.eval([1, 2, 3 + i])
        model.cache[[1, 2, 3 + i]] = model.save_state()
    assert len({cache.get([1, 2, 3 + i], None).owner for i in range(4)}) == 4
    for i, model in enumerate(models):
        state = model.cache[[1, 2]]
        assert state.input_ids.tolist() == [1, 2, 3 + i]
        assert [1, 2] in model.cache and [2] not in model.cache
        model.load_state(state)
    assert models[0].cache.cache_size == cache.cache_size


@pytest.mark.parametrize("kind", ["memory", "disk", "llama-cpp-python's memory", "llama-cpp-python's disk"])
def test_completions_take_their_prompts_from_the_cache(kind: str, random_model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(random_model(), SMALL.replace(bits_k=7, bits_v=7))  # near enough to exact for the same text
    llm.set_cache(
        {
            "memory": lambda: GearRAMCache(),
            "disk": lambda: GearDiskCache(tmp_path),
            "llama-cpp-python's memory": lambda: LlamaRAMCache(),
            "llama-cpp-python's disk": lambda: LlamaDiskCache(str(tmp_path)),
        }[kind]()
    )
    prompt = "a prompt that comes twice " * 10
    first = llm(prompt, max_tokens=8, temperature=0)["choices"][0]["text"]
    tokens = llm.tokenize(prompt.encode())
    state = llm.cache[tokens]
    assert isinstance(state, GearState) == (not kind.startswith("llama"))
    llm("something else", max_tokens=2)
    llm.cache[tokens] = state  # LlamaDiskCache forgets what it gives
    evaluated: list[int] = []
    evaluate = llm.eval
    monkeypatch.setattr(llm, "eval", lambda tokens: (evaluated.append(len(tokens)), evaluate(tokens)))
    assert llm(prompt, max_tokens=8, temperature=0)["choices"][0]["text"] == first
    assert max(evaluated) < 10  # the prompt has some 250 tokens
    llm.set_cache(None)
    assert not isinstance(llm.save_state(), GearState)


def test_more_prompts_fit(random_model: RandomModel, random: np.random.Generator) -> None:
    """Counted in bytes: 3-bit tiles of a prompt of 1000 tokens, against the states of llama-cpp-python's cache; a tenth are the queries' moments."""
    llm = load(random_model("llama", Shape(n_layer=4, d_head=128, n_embd=64, n_ff=32)), SMALL.replace(bits_k=3, bits_v=3))
    llm.eval(random.integers(3, N_VOCAB, 1000).tolist())
    packed = llm.save_state(packed=True)
    assert packed.llama_state_size < llm.save_state().llama_state_size / 3.2


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_the_next_process_finds_what_this_one_kept(llm: Llama, tmp_path: Path, random_model: RandomModel) -> None:
    GearDiskCache(tmp_path / "a" / "b")[[]] = state_of(llm, [5, 6, 7])
    code = """
import sys
from gearcpp import GearDiskCache, GearConfig, Llama
llm = Llama(sys.argv[1], kv_type=GearConfig(tile=64, n_tail=32), n_ctx=1024, n_batch=64, flash_attn=True, verbose=False)
llm.set_cache(GearDiskCache(sys.argv[2]))
llm.load_state(llm.cache[[5, 6, 7, 8]])
print(llm.n_tokens)
llm.eval([8])
llm.cache[[5, 6, 7, 8]] = llm.save_state()
"""
    cache = GearDiskCache(tmp_path / "a" / "b")
    assert cache[[5, 6, 7, 8]].n_tokens == 3
    done = subprocess.run([sys.executable, "-c", code, str(random_model()), str(tmp_path / "a" / "b")], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
    assert cache[[5, 6, 7, 8]].n_tokens == 4  # and what another process keeps meanwhile


def test_damaged_files_are_not_there(llm: Llama, tmp_path: Path) -> None:
    cache = GearDiskCache(tmp_path)
    for tokens in ([5], [5, 6], [5, 6, 7]):
        cache[tokens] = state_of(llm, tokens)
    by_tokens = {len(GearState(path.read_bytes()).input_ids): path for path in tmp_path.iterdir()}
    longest = by_tokens[3].read_bytes()
    by_tokens[3].write_bytes(longest[:-100] + bytes(8) + longest[-92:])
    by_tokens[2].write_bytes(by_tokens[2].read_bytes()[:100])
    (tmp_path / "foreign.gearstate").write_bytes(b"something else")
    (tmp_path / "README").write_text("of somebody else")
    with pytest.warns(RuntimeWarning, match="was removed from the prompt cache: it is damaged"):
        assert cache[[5, 6, 7]].input_ids.tolist() == [5]
    assert not by_tokens[3].exists()
    by_tokens[1].unlink()  # as another process may
    assert [5] not in cache
    with pytest.raises(KeyError):
        cache[[5]]
    cache[[5, 6]] = state_of(llm, [5, 6])
    assert cache[[5, 6]].n_tokens == 2
    assert (tmp_path / "README").exists()


def test_full_disks_and_folders_that_cannot_be(llm: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = GearDiskCache(tmp_path / "cache")
    state = state_of(llm, [5, 6, 7])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(RuntimeWarning, match="was not kept in the prompt cache: .*No space left"):
            cache[[5]] = state
    assert os.listdir(tmp_path / "cache") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(GearError, match="cannot make the folder"):
        GearDiskCache(tmp_path / "file" / "cache")


def test_old_files_make_room_whoever_wrote_them(llm: Llama, tmp_path: Path) -> None:
    state = state_of(llm, [5, 6, 7])
    cache = GearDiskCache(tmp_path, len(state.llama_state) + 100)
    (tmp_path / "old.gearstate").write_bytes(bytes(200))
    os.utime(tmp_path / "old.gearstate", (1, 1))
    cache[[5]] = state
    assert not (tmp_path / "old.gearstate").exists()
    assert cache.cache_size == len(state.llama_state)
