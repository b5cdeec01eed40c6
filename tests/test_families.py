"""Architectures by name: what GEAR makes of their layers, what that takes, and what it does to their logits, sessions and states.

benchmarks/families.py does the same at length, with every layer broken in turn.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from families import FAMILIES, write_family
from models import N_VOCAB

import gearcpp
from gearcpp import GearConfig, Llama, UnsupportedError, native, read_model_info
from gearcpp.cache.allocation import GEAR, RECURRENT, SHARED, Allocation, allocated, cache_bytes, group_layers, state_bytes
from gearcpp.cache.kv_type import normalize_kv_type

N_CTX, N_TOKENS, N_UBATCH = 512, 224, 32
SMALL = GearConfig(tile=64, n_tail=32, bits_k=6, bits_v=6)
# Of packed logits, against what a layer does to them whose values are lost where they are packed: 6 bits do far less.
BOUND = 1 / 3
NEAR = 0.06  # of logits, against their spread: what comes back in another order, or is packed once more

NAMES = list(FAMILIES)
HYBRID = [name for name in NAMES if FAMILIES[name].recurrent]
Model = Callable[[str], Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """``model(name)``: the path of a family's model, made once."""
    folder = tmp_path_factory.mktemp("families")
    return lambda name: path if (path := folder / f"{name}.gguf").exists() else write_family(path, name)


@pytest.fixture
def tokens(random: np.random.Generator) -> list[int]:
    return [1, *random.integers(3, N_VOCAB, N_TOKENS - 1).tolist()]


def load(path: Path, kv_type: Any, **arguments: Any) -> Llama:
    common = {"n_ctx": N_CTX, "n_batch": N_UBATCH, "n_ubatch": N_UBATCH, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    return Llama(str(path), kv_type=kv_type, **{**common, **arguments})


def logits(path: Path, kv_type: Any, tokens: list[int], **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
    llm = load(path, kv_type, **arguments)
    llm.eval(tokens)
    scores, stats = llm.scores[: len(tokens)].astype(np.float64), llm.kv_stats()
    llm.close()
    return scores, stats


def packable(name: str) -> bool:
    """Whether the heads of all its layers can be packed by this build."""
    shape = FAMILIES[name].shape
    try:
        native.check_heads(SMALL, shape.d_head, shape.d_v)
    except UnsupportedError:
        return False
    return True


def test_every_name_is_known_to_llama_cpp(model: Model) -> None:
    for name in NAMES:
        handle = llama_cpp.llama_model_load_from_file(str(model(name)).encode(), llama_cpp.llama_model_default_params())
        assert handle, name
        llama_cpp.llama_model_free(handle)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_as_predicted(name: str, model: Model) -> None:
    """The cells and states that the metadata foretell are those that llama.cpp says it made, to its two decimals of a MiB."""
    n_ctx, lines = 2048, []
    listen = llama_cpp.llama_log_callback(lambda level, text, user: lines.append(text.decode()))
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        params = gearcpp.context_params("f16", n_ctx=n_ctx, n_batch=N_UBATCH, n_ubatch=N_UBATCH, swa_full=False)
        handle = llama_cpp.llama_model_load_from_file(str(model(name)).encode(), llama_cpp.llama_model_default_params())
        context = llama_cpp.llama_init_from_model(handle, params)
        assert context
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(handle)
    finally:
        from gearcpp.cli._model import silence_llama_log

        silence_llama_log()
    made = {kind: [float(size) for line in lines for size in re.findall(rf"{kind} buffer size = +([0-9.]+) MiB", line)] for kind in ("KV", "RS")}
    info, allocation = read_model_info(model(name)), Allocation(n_ctx, N_UBATCH)
    sides = allocated(normalize_kv_type("f16"), info, allocation)
    assert sum(side.n_bytes for side in sides) / 2**20 == pytest.approx(sum(made["KV"]), abs=0.006 * len(made["KV"]))
    assert state_bytes(info, allocation) / 2**20 == pytest.approx(sum(made["RS"]), abs=0.006 * len(made["RS"]))
    assert bool(made["RS"]) == bool(FAMILIES[name].recurrent)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_layers_are(name: str, model: Model) -> None:
    """Before anything is loaded, and after: the same kinds, the same bytes, for every layer."""
    if not packable(name):
        with pytest.raises(UnsupportedError, match="nothing of this model's KV cache could be compressed"):
            load(model(name), "gear", n_ctx=4096, n_ubatch=512, n_batch=512)
        return
    family, info = FAMILIES[name], read_model_info(model(name))
    llm = load(model(name), "gear", n_ctx=4096, n_ubatch=512, n_batch=512, logits_all=False)
    stats = llm.kv_stats()
    llm.close()
    allocation = Allocation(4096, 512)
    sides = allocated(normalize_kv_type("gear"), info, allocation)
    assert [(layer["il"], layer["side"], layer["kind"], layer["bytes"], layer["n_cell"]) for layer in stats["layers"]] == [
        (side.il, side.side, side.kind, side.n_bytes, side.n_cell) for side in sides
    ]
    groups = group_layers([(side.il, side.kind, side.n_bytes) for side in sides], info, allocation)
    assert stats["groups"] == [group.to_dict() for group in groups]
    by_kind = {group.kind: group.layers for group in groups}
    is_beside = name == "falcon-h1"
    alone = () if is_beside else family.recurrent
    assert by_kind[GEAR] == tuple(il for il in range(family.shape.n_layer) if il not in (*family.windows, *family.uncached, *alone))
    assert by_kind.get("f16: window too small to gain", ()) == family.windows
    assert by_kind.get(RECURRENT, ()) == family.recurrent
    assert by_kind.get(SHARED, ()) == (family.uncached if name == "gemma4" else ())
    assert stats["total"]["growth_share_lost"] == 0
    assert stats["total"]["state_bytes"] == state_bytes(info, allocation)
    assert cache_bytes(normalize_kv_type("gear"), info, allocation) >= stats["total"]["bytes"] + stats["total"]["state_bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With every row exact GEAR is f16 up to the rounding of flash attention; packed it stays within a share of the logits' size."""
    if not packable(name):
        pytest.skip("this build does not pack heads of this size")
    path = model(name)
    flash, _ = logits(path, "f16", tokens, flash_attn=True)
    plain, _ = logits(path, "f16", tokens, flash_attn=False)
    packed, stats = logits(path, SMALL, tokens)
    kinds = {layer["kind"] for layer in stats["layers"] if layer["il"] not in FAMILIES[name].windows}
    assert kinds == {GEAR}
    assert all(layer["n_packed"] > 64 for layer in stats["layers"] if layer["kind"] == GEAR)
    assert 0 < relative(packed, flash) < BOUND * lost_layer(path, tokens, flash)
    monkeypatch.setenv("GEARCPP_SMALL_CACHE", "store")  # else a cache that is all tail would be kept as plain f16
    exact, stats = logits(path, SMALL.replace(n_tail=N_CTX), tokens)
    assert {layer["kind"] for layer in stats["layers"]} == {GEAR}
    assert stats["total"]["n_packed"] == 0
    assert np.abs(exact - flash).max() <= 3 * np.abs(plain - flash).max()


def relative(scores: np.ndarray, reference: np.ndarray) -> float:
    """Of the second half, whose queries see packed rows: the error against the logits' spread."""
    half = len(reference) // 2
    return float(np.linalg.norm(scores[half:] - reference[half:]) / np.linalg.norm(reference[half:] - reference[half:].mean(axis=1, keepdims=True)))


def lost_layer(path: Path, tokens: list[int], reference: np.ndarray) -> float:
    """The error of logits where the last layer that is packed loses its values."""
    last = max((layer for layer in read_model_info(path).cached_layers if not layer.window), key=lambda layer: layer.il)
    values = "k" if last.v_in_k else "v"

    def lose(il: int, side: str, head: int, x: np.ndarray, written: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, float]:
        return (0 * x if (side, il) == (values, last.il) else x), 1.0

    scores, _ = logits(path, SMALL, tokens, codec=lose)
    return relative(scores, reference)


@pytest.mark.parametrize("name", HYBRID)
def test_sessions_of_hybrids(name: str, model: Model, tokens: list[int], tmp_path: Path) -> None:
    """The recurrent state is kept beside the packed rows: the conversation goes on without being evaluated again, and says the same bit for bit."""
    check_sessions(name, model(name), tokens, tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "gemma4", "gpt-oss", "olmo3"])
def test_sessions(name: str, model: Model, tokens: list[int], tmp_path: Path) -> None:
    if not packable(name):
        pytest.skip("this build does not pack heads of this size")
    check_sessions(name, model(name), tokens, tmp_path)


def check_sessions(name: str, path: Path, tokens: list[int], folder: Path) -> None:
    def check(actual: np.ndarray, expected: np.ndarray) -> None:
        if FAMILIES[name].windows:  # whose cells come back in another order, and with it the sums
            assert relative(actual, expected) < NEAR
        else:
            np.testing.assert_array_equal(actual, expected)

    def go_on(llm: Llama) -> np.ndarray:
        assert llm.n_tokens == N_TOKENS
        llm.eval([7, 9])
        return np.array(llm.scores[N_TOKENS : N_TOKENS + 2])

    llm, other = load(path, SMALL), load(path, SMALL)
    llm.eval(tokens)
    llm.save_session(folder / "session", {"a": 1})
    packed, plain = llm.save_state(packed=True), llm.save_state(packed=False)
    expected = go_on(llm)
    assert other.load_session(folder / "session") == {"a": 1}
    check(go_on(other), expected)
    other.load_state(packed)
    check(go_on(other), expected)
    other.load_state(plain)  # rows that were packed are packed again
    assert relative(go_on(other), expected) < NEAR
    llm.close()
    other.close()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_shifts(name: str, model: Model, tokens: list[int]) -> None:
    """Where llama.cpp can shift the cache, the logits after it stay near those of f16; where it cannot, it is said."""
    results = []
    for kv_type in ("f16", SMALL):
        llm = load(model(name), kv_type, flash_attn=True, swa_full=True)
        llm.eval(tokens)
        llm.shift_context(4, 60)
        llm.eval([5])
        results.append(np.array(llm.scores[: llm.n_tokens], np.float64)[-2:])
        llm.close()
    assert 0 < relative(results[1], results[0]) < NEAR


@pytest.mark.parametrize("name", ["gemma3", "qwen35"])
def test_what_cannot_be_shifted_says_so(name: str, model: Model) -> None:
    llm = load(model(name), SMALL)
    llm.eval([1, 5, 9, 11])
    with pytest.raises(UnsupportedError, match="swa_full=True" if name == "gemma3" else "begin a new context"):
        llm.shift_context(1, 2)
    llm.close()
