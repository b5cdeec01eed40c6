"""The cache knows how wrong it is: its own figures against numpy's, and what it does where a head is coded too badly."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import models
import numpy as np
import numpy.typing as npt
import pytest

from gearcpp import GearConfig, Llama
from gearcpp.cache import stats
from gearcpp.native import Cache

F32 = npt.NDArray[np.float32]
N_HEAD, D, N_CELL, N = 3, 64, 2048, 512
CONFIG = GearConfig(bits_k=3, bits_v=3, tile=64, n_tail=0, n_sink=0, feedback_k=False)  # whose figure is of channels alone


def rows_of(random: np.random.Generator, n: int = N) -> F32:
    """Rows [n, N_HEAD * D] that are f16 numbers, of heads and channels of several sizes."""
    sizes = np.exp(random.normal(0, 1, N_HEAD * D))
    return (random.standard_normal((n, N_HEAD * D)) * sizes).astype(np.float16).astype(np.float32)


def queries_of(random: np.random.Generator, n: int = 40) -> F32:
    """Queries [1, 2 * N_HEAD, n, D]: two heads share a KV head."""
    return (random.standard_normal((1, 2 * N_HEAD, n, D)) * np.exp(random.normal(0, 1, (1, 2 * N_HEAD, 1, D)))).astype(np.float32)


def filled(config: GearConfig, k: F32, v: F32, q: F32, n_threads: int = 1, n_ubatch: int = N) -> Cache:
    """A cache with these rows, packed after its heads met these queries."""
    cache = Cache(config, n_head_kv=N_HEAD, d_head_k=D, n_cell=N_CELL, n_ubatch=n_ubatch)
    for side, rows in (("k", k), ("v", v)):
        cache.write(side, np.arange(len(rows)), rows, n_threads)  # type: ignore[arg-type]
    cache.attend(q, n_kv=len(k), n_threads=n_threads)
    cache.flush("k", n_threads)
    cache.flush("v", n_threads)
    return cache


@pytest.mark.parametrize("rotate", ["auto", True, False])
def test_figures_are_what_numpy_says(rotate: Any, random: np.random.Generator) -> None:
    k, v, q = rows_of(random), rows_of(random), queries_of(random)
    with filled(CONFIG.replace(rotate_k=rotate), k, v, q) as cache:
        k_hat, v_hat = (cache.read(side, 0, N).astype(np.float64) for side in ("k", "v"))  # type: ignore[arg-type]
        of_k, of_v = cache.stats("k"), cache.stats("v")
    assert of_k["n_packed"] == of_v["n_packed"] == N

    square = (q.astype(np.float64) ** 2).reshape(N_HEAD, -1, D).mean(axis=1)  # [N_HEAD, D]
    squared_error = ((k - k_hat) ** 2).reshape(N, N_HEAD, D)
    of_heads = np.sqrt((squared_error * square).sum(axis=2).mean(axis=0) / D)  # scale 1 / sqrt(D)
    np.testing.assert_allclose(of_k["score_error"], np.sqrt((of_heads**2).mean()), rtol=0.01)
    np.testing.assert_allclose(of_k["worst_error"], of_heads.max(), rtol=0.01)
    assert of_k["worst_head"] == of_heads.argmax()

    def relative(x: F32, x_hat: Any) -> Any:
        return np.sqrt(((x - x_hat) ** 2).sum(axis=0) / (x.astype(np.float64) ** 2).sum(axis=0))

    np.testing.assert_allclose(of_k["error"], relative(k.reshape(-1, 1), k_hat.reshape(-1, 1)), rtol=0.01)
    np.testing.assert_allclose(of_v["error"], relative(v.reshape(-1, 1), v_hat.reshape(-1, 1)), rtol=0.01)
    v_heads = [relative(v[:, h * D : h * D + D].reshape(-1, 1), v_hat[:, h * D : h * D + D].reshape(-1, 1))[0] for h in range(N_HEAD)]
    np.testing.assert_allclose(of_v["worst_error"], max(v_heads), rtol=0.01)
    assert of_v["worst_head"] == np.argmax(v_heads)
    assert np.isnan(of_v["score_error"])


def test_the_figure_of_scores_is_what_scores_are_off(random: np.random.Generator) -> None:
    """Against the scores themselves, not the formula: independent queries, so that the diagonal is all there is."""
    k, q = rows_of(random), queries_of(random, n=400)
    with filled(CONFIG, k, k, q) as cache:
        off = (k - cache.read("k", 0, N).astype(np.float32)).reshape(N, N_HEAD, D)
        scores = np.einsum("hqd,thd->hqt", q.reshape(N_HEAD, -1, D), off) / np.sqrt(D)
        np.testing.assert_allclose(cache.stats("k")["score_error"], np.sqrt((scores.astype(np.float64) ** 2).mean()), rtol=0.1)


def test_threads_change_nothing(random: np.random.Generator) -> None:
    k, q = rows_of(random), queries_of(random)
    seen = []
    for n_threads in (1, 2, 3):
        with filled(CONFIG, k, k, q, n_threads) as cache:
            seen.append([cache.stats(side)[name] for side in ("k", "v") for name in ("error", "worst_error", "worst_head")])  # type: ignore[arg-type]
    assert seen[0] == seen[1] == seen[2]


def test_nothing_is_known_before_a_tile_is_packed_and_after_a_clear(random: np.random.Generator) -> None:
    k, q = rows_of(random), queries_of(random)
    with filled(CONFIG.replace(n_tail=N), k, k, q) as cache:
        assert cache.stats("k")["worst_head"] == -1 and np.isnan(cache.stats("k")["error"])
    with filled(CONFIG, k, k, q) as cache:
        assert cache.stats("k")["worst_head"] >= 0
        cache.clear()
        assert cache.stats("k")["worst_head"] == -1 and np.isnan(cache.stats("k")["error"])


def ruined(random: np.random.Generator, n: int = N) -> tuple[F32, F32]:
    """Keys and queries of a head that a rotation ruins, as Qwen2's key bias makes them: one channel hundreds of times larger than the others, which alone
    meet the queries."""
    k, q = random.standard_normal((n, N_HEAD * D)).astype(np.float32), random.standard_normal((1, 2 * N_HEAD, 40, D)).astype(np.float32) * 3
    k[:, D + 5] += 200 * random.standard_normal(n).astype(np.float32)
    q[:, :, :, 5] = 0
    return k.astype(np.float16).astype(np.float32), q


def test_a_head_that_is_coded_too_badly_stays_f16_from_then_on(random: np.random.Generator) -> None:
    (k, q), (more, _) = ruined(random), ruined(random)
    config = CONFIG.replace(bits_k=2, bits_v=2, rotate_k=True)
    with filled(config, k, k, q) as cache:
        assert cache.stats("k")["worst_head"] == 1 and cache.stats("k")["worst_error"] > 2
        first = cache.read("k", 0, N)
        cells = np.arange(N, 2 * N)
        for at in range(0, N, 128):
            cache.write("k", cells[at : at + 128], more[at : at + 128])
        cache.flush("k")
        after = cache.stats("k")
        assert after["stays_exact"] == 1
        assert after["n_packed"] == N and after["n_exact"] == N
        assert (cache.read("k", 0, N) == first).all()
        assert (cache.read("k", N, N) == more).all()
        assert after["bytes_exact"] == N_CELL * N_HEAD * D * 2
        assert cache.stats("v")["stays_exact"] == 0  # the same rows, but V has no queries

        new = cache.attend(q, n_kv=2 * N)  # reads both kinds
        assert np.isfinite(new).all()

        cache.clear()  # a new cache: it packs
        assert cache.stats("k")["stays_exact"] == 0
        with filled(config, more, more, q) as fresh:
            cache.write("k", np.arange(N), more)
            cache.attend(q, n_kv=N)
            cache.flush("k")
            assert (cache.read("k") == fresh.read("k")).all()
            assert cache.stats("k")["bytes_exact"] == fresh.stats("k")["bytes_exact"]


def test_with_weights_the_same_head_is_coded_well(random: np.random.Generator) -> None:
    k, q = ruined(random)
    with filled(CONFIG, k, k, q) as cache:
        assert cache.stats("k")["worst_error"] < 2
        cache.write("k", np.arange(N, N + 64), k[:64])
        assert cache.stats("k")["stays_exact"] == 0


def test_streams_are_copied_to_and_from_a_side_that_stays_exact(random: np.random.Generator) -> None:
    k, q = ruined(random)
    config = CONFIG.replace(bits_k=2, rotate_k=True)
    with Cache(config, n_head_kv=N_HEAD, d_head_k=D, n_cell=N_CELL, n_stream=2, n_ubatch=N) as cache:
        cache.write("k", np.arange(N), k)
        cache.write("v", np.arange(N), k)
        cache.attend(q, n_kv=N)
        cache.flush("k")
        for at in range(N, 2 * N, 128):
            cache.write("k", np.arange(at, at + 128), k[at - N : at - N + 128])
        assert cache.stats("k")["stays_exact"] == 1
        cache.copy_stream("k", 0, 1)
        assert (cache.read("k", N_CELL, N_CELL) == cache.read("k", 0, N_CELL)).all()


def test_a_session_of_a_side_that_stays_exact_is_read(random: np.random.Generator) -> None:
    k, q = ruined(random)
    config = CONFIG.replace(bits_k=2, rotate_k=True)
    with filled(config, k, k, q, n_ubatch=128) as cache:
        for at in range(N, 2 * N, 128):
            cache.write("k", np.arange(at, at + 128), k[at - N : at - N + 128])
        assert cache.stats("k")["stays_exact"] == 1
        saved, packed = cache.save("k"), cache.read("k", 0, 256)
    with Cache(config, n_head_kv=N_HEAD, d_head_k=D, n_cell=N_CELL, n_ubatch=128) as other:
        other.load("k", saved)
        assert other.stats("k")["n_written"] == 2 * N
        assert (other.read("k", 0, 256) == packed).all()
        np.testing.assert_allclose(other.read("k", N, N).astype(np.float32), k, atol=300)  # packed again: there is no pool for so many


PROGRAM = """
import json, sys
import numpy as np
from gearcpp import Llama
llm = Llama(sys.argv[1], kv_type=sys.argv[2], n_ctx=1024, n_batch=128, n_ubatch=128, n_threads=1, n_threads_batch=1, verbose=False)
llm.eval(np.random.default_rng(1).integers(3, llm.n_vocab(), 900).tolist())
print(json.dumps(llm.kv_stats()))
"""


def test_kv_stats_say_it_and_a_healthy_model_says_nothing(bundled_model: Any) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(bundled_model), "gear"], capture_output=True, text=True, check=True)
    assert "packing changes" not in done.stderr
    seen = json.loads(done.stdout)
    assert 0.01 < seen["total"]["score_error"] < 0.5
    assert 0.03 < seen["total"]["value_error"] < 0.2
    assert seen["total"]["n_stay_exact"] == 0
    for side in ("k", "v"):
        worst = stats.worst(seen["layers"], side)
        assert worst and worst["worst_error"] >= seen["total"]["score_error" if side == "k" else "value_error"]


def test_own_types_and_exact_rows_know_nothing(bundled_model: Any) -> None:
    for kv in ("f16", "q8_0", GearConfig(n_tail=1024)):
        llm = Llama(str(bundled_model), kv_type=kv, n_ctx=256, n_threads=1, verbose=False)
        llm.eval(list(range(3, 103)))
        total = llm.kv_stats()["total"]
        llm.close()
        assert total["score_error"] is None and total["value_error"] is None and total["n_stay_exact"] == 0


def test_a_model_that_stands_no_rotation_is_told_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model with a key bias as Qwen2's: llama.cpp goes on, and one line for each side says what stays f16."""
    plain = models._FAMILIES["llama"]

    def biased(weights: Any, block: str, shape: models.Shape) -> None:
        plain(weights, block, shape)
        bias = np.zeros(shape.n_head_kv * shape.d_head, np.float32)
        bias[:: shape.d_head] = 400  # of a channel that RoPE turns fast: it strays as far as it is large
        weights.writer.add_tensor(f"{block}.attn_k.bias", bias)

    monkeypatch.setitem(models._FAMILIES, "llama", biased)
    path = models.write_model(tmp_path / "biased.gguf")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path), "gear2(rotate_k=True,tile=64)"], capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if "packing changes" in line]
    assert [line.split(":")[1] for line in said] == [" layer 0 K", " layer 1 K"]
    assert all("its new rows stay f16 from here on" in line for line in said)
    seen = json.loads(done.stdout)
    assert seen["total"]["n_stay_exact"] == 2
    assert {layer["side"] for layer in seen["layers"] if layer["stays_exact"]} == {"k"}
