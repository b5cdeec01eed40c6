"""What gearcpp.Llama does with its cache: speculative decoding, embeddings, encoders, adapters that come and go, contexts that are used again. The
reference is the same on f16."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from cache_driver import CacheDriver, furthest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from models import N_VOCAB, Shape, write_lora

from gearcpp import GearConfig, Llama

RandomModel = Callable[..., Path]
EXACT = GearConfig(tile=64, n_tail=512)
PACKED = GearConfig(tile=64, n_tail=32, bits_k=6, bits_v=6)
HYBRID = ("lfm2", Shape(n_layer=4, n_head=2, n_head_kv=1))


@pytest.fixture(autouse=True)
def every_cache_in_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEARCPP_SMALL_CACHE", "store")


def load(path: Path, kv_type: Any, **arguments: Any) -> Llama:
    arguments = {"n_ctx": 512, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **arguments}
    return Llama(str(path), kv_type=kv_type, flash_attn=True, **arguments)


def greedy(llm: Llama, prompt: list[int], n: int) -> list[int]:
    return [token for token, _ in zip(llm.generate(prompt, temp=0.0), range(n), strict=False)]


def logits(llm: Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llm._ctx.get_logits(), (N_VOCAB,)).astype(np.float64)


class _Guess:
    """A draft model that says what really comes for a while and then something else, so that every draft is partly rolled back."""

    def __init__(self, truth: list[int], n_right: int) -> None:
        self.truth, self.n_right = truth, n_right

    def __call__(self, input_ids: Any, /, **_: Any) -> Any:
        n = len(input_ids)
        right = self.truth[n : n + self.n_right]
        return np.array([*right, *(3 + (token + 1 - 3) % 256 for token in self.truth[n + self.n_right : n + self.n_right + 3])], np.intc)


@pytest.mark.parametrize("n_right", [0, 1, 4])
def test_drafts_are_rolled_back(n_right: int, random_model: RandomModel, random: np.random.Generator) -> None:
    """With exact rows a draft model changes nothing, however much of what it says is wrong."""
    prompt = [1, *random.integers(3, N_VOCAB, 99).tolist()]
    plain = load(random_model(), "f16")
    truth = prompt + greedy(plain, prompt, 120)
    drafting = load(random_model(), EXACT, logits_all=True, draft_model=_Guess(truth, n_right))
    assert prompt + greedy(drafting, prompt, 100) == truth[: len(prompt) + 100]


def test_prompt_lookup(random_model: RandomModel) -> None:
    """llama-cpp-python's own draft model, on a prompt that repeats itself."""
    prompt = [1, *([*range(10, 30)] * 5)]
    expected = greedy(load(random_model(), "f16"), prompt, 80)
    for kv_type in ("f16", EXACT):
        drafting = load(random_model(), kv_type, logits_all=True, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=7))
        assert greedy(drafting, prompt, 80) == expected


@pytest.mark.parametrize("family", [("bert", Shape(n_head=2, n_head_kv=2, n_ctx=512)), ("llama", Shape()), HYBRID], ids=lambda family: family[0])
def test_embeddings(family: tuple[str, Shape], random_model: RandomModel) -> None:
    """Several texts at once, then again: encoders need no cache, and the others' is used like any."""
    texts = [word * 12 for word in ("one text ", "another one ", "a third, longer one than those ")]
    vectors = {}
    for name, kv_type in (("f16", "f16"), ("exact", EXACT), ("packed", PACKED)):
        llm = load(random_model(*family), kv_type, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN, n_batch=512, n_ubatch=512)
        vectors[name] = np.array([llm.embed(texts, normalize=True), llm.embed(texts, normalize=True)])
        assert bool(llm.kv_stats()["layers"]) == (family[0] != "bert")
        llm.close()
    np.testing.assert_allclose(vectors["exact"], vectors["f16"], atol=2e-3)  # of vectors of length 1
    np.testing.assert_allclose(vectors["packed"], vectors["f16"], atol=2e-2)
    assert np.abs(vectors["f16"][0, 0] - vectors["f16"][0, 1]).max() > 0.05  # different texts are that far apart


def test_adapters_come_and_go(random_model: RandomModel, tmp_path: Path, random: np.random.Generator) -> None:
    """LoRA adapters are switched while a context runs: rows written under one stay and are read under another."""
    adapters = [write_lora(tmp_path / f"{seed}.gguf", Shape(seed=seed)) for seed in (1, 2)]
    pieces = random.integers(3, N_VOCAB, (6, 80)).tolist()

    def switching(kv_type: Any, order: list[int | None]) -> list[np.ndarray]:
        with CacheDriver(random_model(), kv_type, kv_unified=True) as driver:
            loaded = [llama_cpp.llama_adapter_lora_init(driver.model, str(path).encode()) for path in adapters]
            assert all(loaded)
            for piece, chosen in zip(pieces, order, strict=True):
                use = [] if chosen is None else [loaded[chosen]]
                pointers = (llama_cpp.llama_adapter_lora_p_ctypes * max(len(use), 1))(*use)
                scales = (ctypes.c_float * max(len(use), 1))(*[1.0] * len(use))
                assert llama_cpp.llama_set_adapters_lora(driver.context, pointers, len(use), scales) == 0
                driver.step({0: piece, 1: piece[:9]})
            assert kv_type == "f16" or driver.most_packed > 0 or kv_type.n_tail > 512
        return driver.logits

    order = [None, 0, 1, None, 1, 0]
    plain = switching("f16", order)
    assert furthest(plain, switching(EXACT.replace(n_tail=2048), order)) < 0.01
    assert furthest(plain, switching(PACKED, order)) < 0.25
    assert furthest(plain, switching("f16", [None] * 6)) > 0.5  # the adapters do something


@pytest.mark.parametrize("family", [("llama", Shape()), ("gemma2", Shape()), ("mixtral", Shape())], ids=lambda family: family[0])
def test_three_times_past_the_context(family: tuple[str, Shape], random_model: RandomModel, random: np.random.Generator) -> None:
    pieces = random.integers(3, N_VOCAB, (90, 20)).tolist()
    runs = {}
    for name, kv_type in (("f16", "f16"), ("exact", EXACT), ("packed", PACKED)):
        llm = load(random_model(*family), kv_type, swa_full=True)
        seen = []
        for piece in pieces:
            if llm.n_tokens + len(piece) >= llm.n_ctx():
                llm.shift_context(4, 250)
            llm.eval(piece)
            seen.append(logits(llm))
        runs[name] = seen
        llm.close()
    share = 0.8 if family[0] == "mixtral" else 1.0
    assert furthest(runs["f16"], runs["exact"], share) < 0.01
    assert furthest(runs["f16"], runs["packed"], share) < 0.25


@pytest.mark.parametrize("kv_type", [EXACT, PACKED], ids=["exact", "packed"])
@pytest.mark.parametrize("family", [("llama", Shape()), HYBRID], ids=lambda family: family[0])
def test_a_context_used_again_is_as_new(kv_type: GearConfig, family: tuple[str, Shape], random_model: RandomModel, random: np.random.Generator) -> None:
    """After reset(), and after a close and a new load, the same tokens give the same logits to the last bit."""
    tokens = [1, *random.integers(3, N_VOCAB, 399).tolist()]
    llm = load(random_model(*family), kv_type)
    llm.eval(tokens)
    first = logits(llm)
    for _ in range(3):
        llm.reset()
        llm.eval(random.integers(3, N_VOCAB, 300).tolist())
        llm.reset()
        llm._ctx.kv_cache_clear()
        llm.eval(tokens)
        np.testing.assert_array_equal(logits(llm), first)
    llm.close()
    again = load(random_model(*family), kv_type)
    again.eval(tokens)
    np.testing.assert_array_equal(logits(again), first)
