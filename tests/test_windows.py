"""Sliding windows with the cells that they need: what that saves, and that nobody goes back to where a window is lost without noticing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Shape

from gearcpp import GearConfig, Llama, UnsupportedError

RandomModel = Callable[..., Path]
SMALL = GearConfig(tile=64, n_tail=32)
N_CTX, WINDOW, N_UBATCH = 1024, 96, 64
KV_TYPES = pytest.mark.parametrize("kv_type", ["f16", SMALL], ids=["f16", "gear"])


def load(path: Path, kv_type: Any = SMALL, **arguments: Any) -> Llama:
    common = {"n_ctx": N_CTX, "n_batch": N_UBATCH, "n_ubatch": N_UBATCH, "n_threads": 1, "flash_attn": True, "logits_all": True, "seed": 1}
    return Llama(str(path), kv_type=kv_type, verbose=False, **{**common, **arguments})


def tokens(n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, n).tolist()


@pytest.fixture
def path(random_model: RandomModel) -> Path:
    return random_model("gemma3", Shape(n_layer=6, window=WINDOW))


@KV_TYPES
def test_windows_have_few_cells_unless_it_is_asked(path: Path, kv_type: Any) -> None:
    for arguments, n_cell in (({}, 256), ({"swa_full": False}, 256), ({"swa_full": None}, 256), ({"swa_full": True}, N_CTX)):
        llm = load(path, kv_type, **arguments)
        assert [layer["n_cell"] for layer in llm.kv_stats()["layers"] if layer["side"] == "k"] == [n_cell] * 5 + [N_CTX]
        assert llm.has_small_windows == (n_cell < N_CTX)
        llm.close()


def test_steps_are_shorter_where_windows_have_cells_for_them(path: Path, random_model: RandomModel) -> None:
    for model, arguments, n_ubatch in ((path, {}, 256), (path, {"swa_full": True}, 512), (path, {"n_ubatch": 300}, 300), (random_model(), {}, 512)):
        llm = Llama(str(model), n_ctx=4096, verbose=False, **arguments)
        assert llm.context_params.n_ubatch == n_ubatch
        llm.close()


@KV_TYPES
def test_going_back_as_far_as_the_window_reaches(path: Path, kv_type: Any) -> None:
    """As if what was given up had never been, up to the order of cells."""
    new, used = load(path, kv_type), load(path, kv_type)
    for llm in (new, used):
        llm.eval(tokens(200))
    used.eval(tokens(40, seed=2))
    assert used._ctx.kv_cache_seq_rm(-1, 200, -1)
    used.n_tokens = 200
    for llm in (new, used):
        llm.eval(tokens(30, seed=3))
    np.testing.assert_allclose(used.scores[200:230], new.scores[200:230], atol=0.05 * np.abs(new.scores[200:230]).max())


@KV_TYPES
def test_going_back_to_where_the_window_is_lost(path: Path, kv_type: Any) -> None:
    llm = load(path, kv_type)
    llm.eval(tokens(700))
    before = np.array(llm.scores[699])
    assert not llm._ctx.kv_cache_seq_rm(-1, 100, -1)
    llm.n_tokens = 100
    with pytest.raises(UnsupportedError, match=r"windows of this gemma3 model do not reach back to token 100.*swa_full=True"):
        llm.eval([5])
    llm.n_tokens = 699  # nothing was lost meanwhile
    llm.eval([tokens(700)[699]])
    np.testing.assert_allclose(llm.scores[699], before, atol=0.05 * np.abs(before).max())


@KV_TYPES
def test_a_prompt_that_shares_a_lost_window_is_evaluated_again(path: Path, kv_type: Any) -> None:
    """`generate` takes up a common prefix; where its window is lost it must not."""
    prompt = tokens(100)
    fresh = load(path, kv_type)
    fresh.eval([*prompt, 7, 9])
    expected = np.array(fresh.scores[101])
    llm = load(path, kv_type)
    llm.eval([*prompt, *tokens(600, seed=2)])
    next(iter(llm.generate([*prompt, 7, 9], temp=0.0)))
    assert llm.input_ids[:102].tolist() == [*prompt, 7, 9]
    np.testing.assert_allclose(llm.scores[101], expected, atol=0.05 * np.abs(expected).max())


def test_whole_windows_go_back_anywhere(path: Path) -> None:
    llm = load(path, swa_full=True)
    llm.eval(tokens(700))
    assert llm._ctx.kv_cache_seq_rm(-1, 100, -1)
    llm.n_tokens = 100
    llm.eval([5])
    llm.shift_context(1, 50)
