"""Keys that are rounded for the error of scores (feedback_k): native/codec/feedback.h derives it, docs/coding-keys.md says what it brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gearcpp import PRESETS, ConfigError, GearConfig, Llama
from gearcpp.config import check_config
from gearcpp.native import Cache

F32 = npt.NDArray[np.float32]
N_HEAD, N_SHARE, D, N = 2, 2, 64, 512
PLAIN = GearConfig(bits_k=2, bits_v=2, tile=64, n_tail=0, n_sink=0, feedback_k=False)
FED = PLAIN.replace(feedback_k=True)


def queries_of(random: np.random.Generator, n: int) -> F32:
    """Queries [1, N_HEAD * N_SHARE, n, D] that look along a few directions: those of a head share them."""
    directions = random.standard_normal((N_HEAD, 1, 6, D))
    along = random.standard_normal((N_HEAD, N_SHARE, n, 6)) @ directions
    return (along + 0.2 * random.standard_normal(along.shape)).reshape(1, N_HEAD * N_SHARE, n, D).astype(np.float32)


def coded(config: GearConfig, keys: F32, queries: F32, n_threads: int = 1) -> F32:
    """Keys [N, N_HEAD * D] as the cache has them, packed after these queries."""
    with Cache(config, n_head_kv=N_HEAD, d_head_k=D, n_cell=1024, n_ubatch=N) as cache:
        for side in ("k", "v"):
            cache.write(side, np.arange(N), keys, n_threads)  # type: ignore[arg-type]
        cache.attend(queries, n_kv=N, n_threads=n_threads)
        cache.flush("k", n_threads)
        assert cache.stats("k")["n_packed"] == N
        return np.array(cache.read("k", 0, N), np.float32)


def score_error(keys: F32, read: F32, queries: F32) -> float:
    off = (read - keys).reshape(N, N_HEAD, D).transpose(1, 2, 0)
    return float(np.mean((queries[0].reshape(N_HEAD, -1, D) @ off) ** 2))


def test_scores_of_queries_to_come_err_less(random: np.random.Generator) -> None:
    keys = random.standard_normal((N, N_HEAD * D)).astype(np.float16).astype(np.float32)
    queries = queries_of(random, 400)
    met, to_come = queries[:, :, :200], queries[:, :, 200:]
    plain, fed = (coded(config, keys, np.ascontiguousarray(met)) for config in (PLAIN, FED))
    assert score_error(keys, fed, to_come) < 0.5 * score_error(keys, plain, to_come)
    assert np.mean((fed - keys) ** 2) > np.mean((plain - keys) ** 2)  # that is what it gives for it


def test_the_figure_of_scores_knows_that_roundings_cancel(random: np.random.Generator) -> None:
    keys, queries = random.standard_normal((N, N_HEAD * D)).astype(np.float16).astype(np.float32), queries_of(random, 800)
    with Cache(FED, n_head_kv=N_HEAD, d_head_k=D, n_cell=1024, n_ubatch=N) as cache:
        for side in ("k", "v"):
            cache.write(side, np.arange(N), keys)  # type: ignore[arg-type]
        cache.attend(queries, n_kv=N)
        cache.flush("k")
        read, seen = np.array(cache.read("k", 0, N), np.float32), cache.stats("k")
    off = ((read - keys) ** 2).reshape(N, N_HEAD, D)
    of_channels_alone = np.sqrt((off * (queries[0].reshape(N_HEAD, -1, D) ** 2).mean(axis=1)).sum(axis=2).mean() / D)
    of_scores = np.sqrt(score_error(keys, read, queries) / D)
    assert of_scores < 0.6 * of_channels_alone
    np.testing.assert_allclose(seen["score_error"], of_scores, rtol=0.2)  # of one row in sixteen, and one query in eight


def test_threads_change_nothing(random: np.random.Generator) -> None:
    keys, queries = random.standard_normal((N, N_HEAD * D)).astype(np.float32), queries_of(random, 50)
    one, two = (coded(FED, keys, queries, n_threads) for n_threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_what_does_not_go_together_is_refused() -> None:
    for other in ({"rank_k": 2}, {"sparsity": 0.02, "center_v": False}, {"center_k": True}):
        with pytest.raises(ConfigError, match="feedback_k"):
            check_config(FED.replace(**other))


def test_auto_goes_without_where_it_cannot_be(bundled_model: Path) -> None:
    auto = PRESETS["gear2"].replace(feedback_k="auto", tile=64, n_tail=32)
    assert auto.has_feedback(256) and not auto.has_feedback(288)
    for other in ({"rank_k": 2}, {"sparsity": 0.02, "center_v": False}, {"center_k": True}, {"bits_k": 16}):
        check_config(auto.replace(**other))
        assert not auto.replace(**other).has_feedback(64)
    sizes = {}
    for name, config in {"auto": auto, "low rank": auto.replace(rank_k=2), "never": auto.replace(feedback_k=False)}.items():
        llm = Llama(bundled_model, kv_type=config, n_ctx=1024, n_threads=1, verbose=False)
        llm.eval([5])
        sizes[name] = llm.kv_stats()["total"]["bytes_tables"]
        llm.close()
    layers, d = llm.info.layers, llm.info.layers[0].d_head_k
    assert sizes["low rank"] == sizes["never"]
    assert sizes["auto"] - sizes["never"] == len(layers) * layers[0].n_head_kv * d * (d + 3)


def test_a_model_writes_on_and_a_session_is_the_same(bundled_model: Path, tmp_path: Path) -> None:
    config = PRESETS["gear2"].replace(tile=64, n_tail=32, feedback_k=True, clip_k=0.8)
    llm = Llama(bundled_model, kv_type=config, n_ctx=512, n_batch=128, n_threads=1, verbose=False, seed=1)
    tokens = llm.tokenize(("The old man looked at the sea and said nothing for a long while. " * 40).encode())[:400]
    llm.eval(tokens)
    total = llm.kv_stats()["total"]
    assert total["n_packed"] > 0
    head = llm.info.layers[0]
    assert total["bytes_tables"] > len(llm.info.layers) * head.n_head_kv * head.d_head_k**2
    llm.save_session(tmp_path / "session")
    llm.eval([5])
    after = np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()])
    llm.reset()
    llm.load_session(tmp_path / "session")
    llm.eval([5])
    np.testing.assert_array_equal(np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()]), after)
    llm.close()


def test_an_emptied_cache_forgets_its_queries(random_model: Callable[..., Path]) -> None:
    llm = Llama(random_model(), kv_type=PRESETS["gear2"].replace(tile=64, n_tail=32, feedback_k=True), n_ctx=512, n_threads=1, verbose=False, seed=1)
    tokens = [3 + i * 7 % 90 for i in range(300)]
    seen = []
    for _ in range(2):
        llm.reset()
        llm._ctx.kv_cache_clear()
        llm.eval(tokens)
        seen.append(np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()]))
    np.testing.assert_array_equal(*seen)
    llm.close()
