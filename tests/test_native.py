"""The native library through its Python wrappers, and the native tests where they are built.

The codec itself is tested natively and against the torch reference; here it is that arrays arrive as they should and that failures become exceptions.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from gearcpp import PRESETS, AbiError, ConfigError, DataError, GearConfig, UnsupportedError, native

D_HEAD = 64


def test_native_tests() -> None:
    """All programs that CMake built from native/tests (GEARCPP_TESTS=ON); their folder is in GEARCPP_NATIVE_BUILD."""
    build = os.environ.get("GEARCPP_NATIVE_BUILD")
    if not build:
        pytest.skip("GEARCPP_NATIVE_BUILD names no build folder")
    result = subprocess.run(["ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_binding_is_of_this_library() -> None:
    assert native.text(native.lib.gear_version()) == native.versions()["gearcpp"]
    assert set(native.versions()) == {"gearcpp", "llama_cpp_python", "ggml", "ggml_commit"}
    assert native.library_path().is_file()
    assert native.available_memory() > 0


def test_every_declared_function_is_exported() -> None:
    """cffi looks a symbol up when it is first used: here, all of them."""
    declared = [name for name in dir(native.lib) if name.startswith("gear_")]
    assert len(declared) > 30
    for name in declared:
        getattr(native.lib, name)


def test_a_missing_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin" if sys.platform != "darwin" else "linux")
    with pytest.raises(AbiError, match="is missing from the gearcpp package"):
        native.library_path()


def test_simd_levels() -> None:
    levels = native.simd_levels()
    assert levels[-1] == "scalar"
    before = native.simd_level()
    try:
        native.select_simd("scalar")
        assert native.simd_level() == "scalar"
        native.select_simd(None)
        assert native.simd_level() in levels
        with pytest.raises(ConfigError, match="mmx"):
            native.select_simd("mmx")
    finally:
        native.select_simd(before)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_tile_there_and_back(name: str, side: native.Side, random: np.random.Generator) -> None:
    config = PRESETS[name]
    layout = native.tile_describe(config, side, D_HEAD)
    x = random.standard_normal((config.tile, D_HEAD)).astype(np.float32)
    tile = native.tile_pack(config, side, x)
    assert tile.nbytes == layout["bytes"]
    assert layout["bytes"] * 8 / x.size == native.bits_per_element(config, side, D_HEAD)

    restored = native.tile_unpack(config, side, D_HEAD, tile)
    # A code is at most half a step off, and the step is the group's range over 2^bits - 1; a normal sample of a tile spans less than 10 either way.
    step = 10.0 / (2 ** getattr(config, f"bits_{side}") - 1)
    assert np.abs(restored - x).max() < step

    unaligned = np.concatenate([np.zeros(1, np.uint8), tile])[1:]
    assert np.array_equal(native.tile_unpack(config, side, D_HEAD, unaligned), restored)


def test_parts_make_up_the_tile(random: np.random.Generator) -> None:
    """X^ = D + L with S restored, from the parts as they are documented."""
    config = GearConfig(rotate_k=False, rotate_v=False, center_v=False, rank_k=2, rank_v=2, sparsity=0.05, group_v=32)
    x = random.standard_normal((config.tile, D_HEAD)).astype(np.float32)
    token, channel = np.indices(x.shape)
    for side in ("k", "v"):
        tile = native.tile_pack(config, side, x)
        parts = native.tile_parts(config, side, D_HEAD, tile)
        group = token // config.group_k * D_HEAD + channel if side == "k" else channel // config.group_v * config.tile + token
        expected = parts.zero[group] + parts.scale[group] * parts.codes + parts.a @ parts.b.T
        vector, _ = np.indices(parts.outlier_index.shape)
        place = (parts.outlier_index, vector) if side == "k" else (vector, parts.outlier_index)
        expected[place] = parts.outlier_value
        np.testing.assert_allclose(native.tile_unpack(config, side, D_HEAD, tile), expected, atol=1e-5)
        np.testing.assert_array_equal(parts.outlier_value, x[place].astype(np.float16).astype(np.float32))


def test_unwritten_cells_have_no_say(random: np.random.Generator) -> None:
    config = GearConfig()
    x = random.standard_normal((config.tile, D_HEAD)).astype(np.float32)
    written = random.random(config.tile) < 0.5
    other = np.where(written[:, None], x, 1e9)
    assert np.array_equal(native.tile_pack(config, "k", x, written), native.tile_pack(config, "k", other, written))


def test_bad_tiles() -> None:
    config = GearConfig()
    with pytest.raises(ConfigError, match=r"x must be \[256, d_head\], not \[128, 64\]"):
        native.tile_pack(config, "k", np.zeros((128, D_HEAD)))
    with pytest.raises(ConfigError, match=r"written must be \[256\]"):
        native.tile_pack(config, "k", np.zeros((256, D_HEAD)), np.ones(3))
    with pytest.raises(DataError, match="this tile has 3 bytes"):
        native.tile_unpack(config, "k", D_HEAD, np.zeros(3, np.uint8))
    with pytest.raises(UnsupportedError):
        native.tile_describe(config, "k", 40)
    with pytest.raises(UnsupportedError):
        native.check_heads(config, 64, 592)


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, sinks: np.ndarray | None, softcap: float) -> np.ndarray:
    """[n_head, n_query, d], [n_kv, n_head_kv, d], [n_kv, n_head_kv, d_v] -> [n_query, n_head, d_v], in f64."""
    out = np.zeros((q.shape[1], q.shape[0], v.shape[2]))
    for head in range(q.shape[0]):
        kv_head = head * k.shape[1] // q.shape[0]
        scores = q[head] @ k[:, kv_head].T / np.sqrt(q.shape[2])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = scores + mask
        sink = -np.inf if sinks is None else sinks[head]
        top = np.maximum(scores.max(axis=1, keepdims=True), sink)
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
        out[:, head] = weights / total @ v[:, kv_head]
    return out


@pytest.mark.parametrize(("with_sinks", "softcap"), [(False, 0.0), (True, 0.0), (False, 15.0)])
def test_a_cache_attends_to_what_it_reads(with_sinks: bool, softcap: float, random: np.random.Generator) -> None:
    n_cell, n_query, n_head, n_head_kv, d_k, d_v = 512, 3, 4, 2, 64, 32
    with native.Cache(GearConfig(tile=64, n_tail=32), n_head_kv=n_head_kv, d_head_k=d_k, d_head_v=d_v, n_cell=n_cell, n_ubatch=64) as cache:
        for start in range(0, n_cell, 64):
            for side, d_head in (("k", d_k), ("v", d_v)):
                cache.write(side, np.arange(start, start + 64), random.standard_normal((64, n_head_kv * d_head)))
        stats = cache.stats("k")
        assert stats["n_written"] == n_cell == stats["n_packed"] + stats["n_exact"]
        assert stats["n_packed"] > n_cell // 2

        q = random.standard_normal((n_head, n_query, d_k)).astype(np.float32)
        mask = np.where(random.random((n_query, n_cell)) < 0.7, 0.0, -np.inf)
        sinks = random.standard_normal(n_head).astype(np.float32) if with_sinks else None
        got = cache.attend(q, mask=mask, sinks=sinks, softcap=softcap)
        k = cache.read("k").astype(np.float64).reshape(n_cell, n_head_kv, d_k)
        v = cache.read("v").astype(np.float64).reshape(n_cell, n_head_kv, d_v)
        # read() rounds to f16, and the products round q and p to a byte where that adds little to the codes' own error (test_attention.cpp has the bound).
        np.testing.assert_allclose(got, softmax_attention(q, k, v, mask, sinks, softcap), atol=1e-2)

        cache.clear()
        assert cache.stats("k")["n_written"] == 0
        assert not cache.read("k").any()


def test_bad_caches(random: np.random.Generator) -> None:
    with pytest.raises(UnsupportedError):
        native.Cache(GearConfig(), n_head_kv=1, d_head_k=40, n_cell=256)
    with pytest.raises(ConfigError):
        native.Cache(GearConfig(bits_k=1), n_head_kv=1, d_head_k=64, n_cell=256)
    with native.Cache(GearConfig(), n_head_kv=2, d_head_k=64, n_cell=256) as cache:
        with pytest.raises(ConfigError, match=r"rows must be \[1, 128\]"):
            cache.write("k", [0], np.zeros((1, 64)))
        with pytest.raises(ConfigError):
            cache.write("k", [256], np.zeros((1, 128)))
        with pytest.raises(ConfigError, match=r"mask must end in \[1, 256\]"):
            cache.attend(np.zeros((2, 1, 64)), mask=np.zeros((1, 64)))
    cache.close()  # a second time
