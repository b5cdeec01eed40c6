"""What the cache of gearcpp.Llama does to a model's logits, and what it says of itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from models import N_VOCAB, Shape

import gearcpp
from gearcpp import ConfigError, GearConfig, Llama, native
from gearcpp.cache.device import GearDevice
from gearcpp.runtime.context import Batch

RandomModel = Callable[..., Path]
N_CTX, N_TOKENS = 512, 400
SMALL = GearConfig(tile=64, n_tail=32)

MODELS = {
    "grouped heads": ("llama", Shape()),
    "one KV head per query head": ("llama", Shape(n_head_kv=4, d_head=32)),
    "heads of 256": ("llama", Shape(n_head=2, n_head_kv=1, d_head=256)),
    "heads of 512": ("llama", Shape(n_head=2, n_head_kv=1, d_head=512)),
    "K and V of different sizes": ("minicpm3", Shape(n_head_kv=4, d_head=96, d_head_v=64)),
    "K and V of 576 and 512": ("minicpm3", Shape(n_head=2, n_head_kv=2, d_head=576, d_head_v=512)),
    "latent attention": ("deepseek2", Shape(n_head=8, n_head_kv=1, d_head=576, d_head_v=512)),
    "latent attention, small": ("deepseek2", Shape(n_head_kv=1, d_head=96, d_head_v=64)),
    "soft-cap and windows": ("gemma2", Shape()),
    "windows": ("gemma3", Shape(n_layer=6)),
    "sinks and windows": ("gpt-oss", Shape()),
    "ALiBi": ("mpt", Shape(n_head=2, n_head_kv=1)),
}


def logits(path: Path, kv_type: Any, tokens: list[int], **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
    llm = Llama(str(path), **{"kv_type": kv_type, "n_ctx": N_CTX, "n_batch": 64, "n_threads": 2, "logits_all": True, "verbose": False, **arguments})
    llm.eval(tokens)
    scores, stats = llm.scores[: len(tokens)].astype(np.float64), llm.kv_stats()
    llm.close()
    return scores, stats


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(softmax(p) || softmax(q)) of each row."""
    log_p = p - np.logaddexp.reduce(p, axis=1, keepdims=True)
    log_q = q - np.logaddexp.reduce(q, axis=1, keepdims=True)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


@pytest.mark.parametrize(("name", "swa_full"), [*((name, True) for name in MODELS), *((name, False) for name in MODELS if "windows" in name)])
def test_exact_rows_are_f16(name: str, swa_full: bool, random_model: RandomModel, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every row exact, GEAR differs from llama.cpp's f16 by no more than flash attention differs from plain attention there."""
    monkeypatch.setenv("GEARCPP_SMALL_CACHE", "store")  # else a cache that is all tail would be kept as plain f16
    path = random_model(*MODELS[name])
    tokens = [1, *random.integers(3, N_VOCAB, N_TOKENS - 1).tolist()]
    flash, _ = logits(path, "f16", tokens, flash_attn=True, swa_full=swa_full)
    plain, _ = logits(path, "f16", tokens, flash_attn=False, swa_full=swa_full)
    gear, stats = logits(path, SMALL.replace(n_tail=N_CTX), tokens, swa_full=swa_full)
    assert stats["total"]["n_packed"] == 0
    assert {layer["kind"] for layer in stats["layers"]} == {"gear"}
    assert np.abs(gear - flash).max() <= 3 * np.abs(plain - flash).max()


@pytest.mark.parametrize("name", MODELS)
def test_packed_tiles_are_near(name: str, random_model: RandomModel, random: np.random.Generator) -> None:
    """More bits, less divergence; and most of what queries see is packed."""
    path = random_model(*MODELS[name])
    tokens = [1, *random.integers(3, N_VOCAB, N_TOKENS - 1).tolist()]
    reference, _ = logits(path, "f16", tokens, flash_attn=True)
    means = []
    for bits in (2, 4, 6):
        scores, stats = logits(path, SMALL.replace(bits_k=bits, bits_v=bits), tokens)
        assert stats["total"]["packed_share"] > 0.5
        means.append(kl_divergence(reference, scores)[N_TOKENS // 2 :].mean())
    assert means[0] > 4 * means[1] > 16 * means[2] > 0
    assert means[2] < 0.01


def test_statistics_add_up(random_model: RandomModel, random: np.random.Generator) -> None:
    config = SMALL.replace(bits_k=3, rank_v=2)
    tokens = [1, *random.integers(3, N_VOCAB, N_TOKENS - 1).tolist()]
    _, stats = logits(random_model(), config, tokens)
    total, layers = stats["total"], stats["layers"]
    assert [(layer["il"], layer["side"]) for layer in layers] == [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
    for layer in layers:
        assert (layer["kind"], layer["n_head_kv"], layer["d_head"], layer["n_cell"], layer["n_stream"]) == ("gear", 2, 64, N_CTX, 1)
        assert layer["n_written"] == N_TOKENS == layer["n_packed"] + layer["n_exact"]
        assert layer["bits_per_element"] == native.bits_per_element(config, layer["side"], 64)
        assert layer["bytes_tiles"] == N_CTX * 2 * 64 * layer["bits_per_element"] / 8
        assert layer["bytes_f16"] == N_CTX * 2 * 64 * 2
        assert layer["bytes_tiles_used"] <= layer["bytes_tiles"]
        assert layer["bytes"] == layer["bytes_tiles"] + layer["bytes_exact"] + layer["bytes_tables"]
    for name in ("n_written", "n_packed", "n_exact", "bytes", "bytes_used", "bytes_f16", "bytes_exact"):
        assert total[name] == sum(layer[name] for layer in layers)
    assert total["bits_per_element"] == pytest.approx(np.mean([layer["bits_per_element"] for layer in layers]))
    assert total["bits_per_element_all"] == pytest.approx(total["bytes"] * 8 / (4 * N_CTX * 2 * 64))
    assert total["scratch_bytes"] > 0


def test_statistics_of_llamas_own_types(random_model: RandomModel) -> None:
    llm = Llama(str(random_model()), kv_type=("q8_0", "q4_0"), n_ctx=N_CTX, verbose=False)
    llm.eval([1, 5, 9])
    total = llm.kv_stats()["total"]
    assert total["bits_per_element"] == (8.5 + 4.5) / 2
    assert total["bytes_f16"] == 4 * N_CTX * 2 * 64 * 2
    assert total["bytes"] == total["bytes_f16"] * 6.5 / 16
    assert (total["n_written"], total["n_packed"]) == (3 * 4, 0)


def test_a_side_may_stay_f16(random_model: RandomModel) -> None:
    tokens = [1, *range(3, 250)]
    _, stats = logits(random_model(), SMALL.replace(bits_v=16), tokens)
    assert {(layer["side"], layer["kind"]) for layer in stats["layers"]} == {("k", "gear"), ("v", "f16: asked for")}
    assert all(layer["n_packed"] == 0 for layer in stats["layers"] if layer["side"] == "v")


def test_small_windows_stay_f16(random_model: RandomModel) -> None:
    """A sliding-window cache of a few hundred cells gains nothing from packing, and says so."""
    _, stats = logits(random_model("gemma2", Shape()), GearConfig(), [1, 5, 9], swa_full=False, n_ctx=4096)
    kinds = {layer["il"]: layer["kind"] for layer in stats["layers"]}
    assert kinds == {0: "f16: window too small to gain", 1: "gear"}


def test_ubatch_does_not_matter_while_rows_are_exact(random_model: RandomModel, random: np.random.Generator) -> None:
    tokens = [1, *random.integers(3, N_VOCAB, 299).tolist()]
    config = SMALL.replace(n_tail=512)
    whole, _ = logits(random_model(), config, tokens, n_batch=512)
    single, _ = logits(random_model(), config, tokens, n_batch=512, n_ubatch=7)
    assert np.abs(whole - single).max() < 0.02 * np.abs(whole).max()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The low-level API
# ---------------------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def low_level(path: Path, kv_type: Any, **fields: Any) -> Iterator[tuple[Any, GearDevice | None]]:
    params, device = gearcpp.model_params(path, kv_type, n_ubatch=64)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    context = llama_cpp.llama_init_from_model(model, gearcpp.context_params(kv_type, n_ctx=2 * N_CTX, n_batch=64, n_ubatch=64, n_threads=2, **fields))
    assert context, device and device.take_failure()
    try:
        yield context, device
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
        if device:
            device.close()


def decode(context: Any, sequences: list[list[int]], position: int) -> np.ndarray:
    """Decode the same number of tokens of each sequence; logits of the last ones [n_sequence, n_vocab]."""
    n = len(sequences[0])
    batch = Batch(n * len(sequences))
    for sequence, tokens in enumerate(sequences):
        batch.add(sequence, position, tokens, logits=True)
    assert llama_cpp.llama_decode(context, batch.struct) == 0
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, (s + 1) * n - 1), (N_VOCAB,)).copy() for s in range(len(sequences))]
    return np.array(rows, np.float64)


@pytest.mark.parametrize("kv_unified", [False, True])
def test_two_sequences(kv_unified: bool, random_model: RandomModel, random: np.random.Generator) -> None:
    """Two sequences decoded together, in streams of their own or in one, equal those of f16; a copied sequence goes on like its source."""
    sequences = random.integers(3, N_VOCAB, (2, 256)).tolist()
    finals = {}
    for kv_type in ("f16", SMALL.replace(bits_k=6, bits_v=6)):
        with low_level(random_model(), kv_type, n_seq_max=2, kv_unified=kv_unified) as (context, device):
            for start in range(0, 256, 32):
                final = decode(context, [s[start : start + 32] for s in sequences], start)
            if device:
                stats = device.stats()
                assert {s["n_stream"] for s in stats} == {1 if kv_unified else 2}
                assert all(s["n_packed"] > 128 and s["n_written"] == 512 for s in stats)
            memory = llama_cpp.llama_get_memory(context)
            llama_cpp.llama_memory_seq_rm(memory, 1, -1, -1)
            llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
            after_copy = decode(context, [[7], [7]], 256)
            np.testing.assert_allclose(after_copy[0], after_copy[1], atol=0.02 * np.abs(after_copy).max())
            finals[str(kv_type)] = np.concatenate([final, after_copy])
    reference, gear = finals.values()
    assert kl_divergence(reference, gear).max() < 0.05


def test_low_level_parameters_are_checked(random_model: RandomModel) -> None:
    with pytest.raises(ConfigError, match="n_gpu_layers is set by kv_type"):
        gearcpp.model_params(random_model(), "gear", n_gpu_layers=3)
    with pytest.raises(ConfigError, match="did you mean 'n_ubatch'"):
        gearcpp.context_params("gear", n_ubach=3)
    with pytest.raises(ConfigError, match="flash_attn_type is set by kv_type"):
        gearcpp.context_params("gear", flash_attn_type=0)
    params, device = gearcpp.model_params(random_model(), "q8_0", n_gpu_layers=3)
    assert device is None
    assert (params.devices, params.n_gpu_layers) == (None, 3)
    context = gearcpp.context_params(("q8_0", "q4_0"), n_seq_max=3)
    assert (context.type_k, context.type_v, context.n_seq_max) == (8, 2, 3)


def test_measuring_without_allocating(random_model: RandomModel) -> None:
    """llama.cpp's memory fit loads a model that allocates nothing, on the same device, before the real one."""
    unmapped = {"load_mode": llama_cpp.LLAMA_LOAD_MODE_NONE} if hasattr(llama_cpp, "LLAMA_LOAD_MODE_NONE") else {"use_mmap": False}
    params, device = gearcpp.model_params(random_model(), SMALL, n_ubatch=64, **unmapped)
    assert device
    path = str(random_model()).encode()
    for no_alloc in (True, False):
        params.no_alloc = no_alloc
        model = llama_cpp.llama_model_load_from_file(path, params)
        context = llama_cpp.llama_init_from_model(model, gearcpp.context_params(SMALL, n_ctx=N_CTX, n_batch=64, n_ubatch=64))
        assert context, device.take_failure()
        if not no_alloc:
            assert np.isfinite(decode(context, [[1, 2, 3]], 0)).all()
            assert {store["kind"] for store in device.stats()} == {0}
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    device.close()
    assert ctypes.sizeof(params) > 0
