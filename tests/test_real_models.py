"""The presets on real models, for `pytest -m real`: texts that a model writes, divergences, sessions (CONTRIBUTING.md says how to get the models).

The text is code of this package, as `gearcpp check` reads it. Every bound is stated beside what was seen, with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gearcpp import PRESETS, Llama
from gearcpp.evaluation.check import own_text
from gearcpp.evaluation.perplexity import Measurement, Settings
from gearcpp.evaluation.tasks import Drift, answer, compare_answers, split_prompts

pytestmark = pytest.mark.real
RealModel = Callable[[str], Path]


@contextmanager
def loaded(path: Path, kv_type: str, n_ctx: int = 1024, n_ubatch: int = 128) -> Iterator[Llama]:
    arguments: dict[str, Any] = {"n_ctx": n_ctx, "n_batch": n_ubatch, "n_ubatch": n_ubatch, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True}
    llm = Llama(str(path), kv_type=kv_type, verbose=False, **arguments)
    try:
        yield llm
    finally:
        llm.close()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Greedy text
# ---------------------------------------------------------------------------------------------------------------------------------------------


def test_greedy_text_follows_f16s_as_far_as_f16_follows_itself(real_model: RealModel) -> None:
    """f16 with the prompt read in short pieces, which llama.cpp computes by another kernel, is the measure: its text parts from f16's own, too."""
    path = real_model("smollm2-135m")

    def write(kv_type: str, n_ubatch: int = 128) -> list[list[int]]:
        with loaded(path, kv_type, n_ubatch=n_ubatch) as llm:
            return [answer(llm, prompt, 48).tokens for prompt in split_prompts(llm, own_text(), 4, 700)]

    f16 = write("f16")

    def drift(answers: list[list[int]]) -> list[Drift]:
        return [compare_answers(one, other) for one, other in zip(answers, f16, strict=True)]

    itself, gear = drift(write("f16", n_ubatch=4)), drift(write("gear"))
    # Seen, tokens before the texts part, of 48: 0, 7, 48, 17 and 3, 30, 1, 48.
    assert sum(d.first_difference for d in gear) >= 0.5 * sum(d.first_difference for d in itself)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Divergence
# ---------------------------------------------------------------------------------------------------------------------------------------------


# Mean KLD in nat, in this order what was seen: 0.0036, 0.0044, 0.0072, 0.0194 and, of the forms with L, 0.0046, 0.0067, 0.0188, of the paper's settings
# 0.0048 and 0.0416. The weights are quantized, which puts a floor of 0.0035 under them: so far is f16 from itself, read in pieces of 63.
SMOLLM2 = {
    "gear-hi": 0.007,
    "gear": 0.008,
    "gear3": 0.012,
    "gear2": 0.03,
    "gear-l": 0.008,
    "gear-l3": 0.012,
    "gear-l2": 0.03,
    "gear-paper4": 0.009,
    "gear-paper2": 0.07,
}
QWEN = {"gear2": 0.03}  # 0.0150


def divergences(path: Path, presets: Iterable[str], n_ctx: int) -> dict[str, float]:
    """Mean KLD of each preset on the second half of a chunk."""
    presets = list(presets)
    measurement = Measurement(path, own_text(), ",".join(presets), Settings(n_ctx=n_ctx, n_chunks=1, n_threads=1, n_models=len(presets) + 1, floor=False))
    for _ in measurement.run():
        pass
    found = {row.label: row.summary.kld_mean for row in measurement.rows() if row.label != "f16"}
    print(found)
    return found


def test_every_preset_stays_near_f16(real_model: RealModel) -> None:
    found = divergences(real_model("smollm2-135m"), SMOLLM2, n_ctx=1024)
    assert {*found, "gear4"} == set(PRESETS)  # gear4 is another name of gear
    assert {name: kld for name, kld in found.items() if not kld <= SMOLLM2[name]} == {}


def test_a_model_with_channels_that_stand_out_stands_two_bits(real_model: RealModel) -> None:
    """Qwen's key biases: before channels were weighed, gear2 ruined it."""
    found = divergences(real_model("qwen2.5-coder-0.5b"), QWEN, n_ctx=896)
    assert found["gear2"] > 1e-4, "nothing was packed"
    assert found["gear2"] <= QWEN["gear2"]


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Sessions
# ---------------------------------------------------------------------------------------------------------------------------------------------


def write_on(llm: Llama) -> tuple[list[int], bytes]:
    """A line's end and the twenty likeliest tokens behind it, and the last logits. The first logits after a load are those of the next token read."""
    tokens = llm.tokenize(b"\n", add_bos=False)
    for _ in range(20):
        llm.eval(tokens[-1:])
        tokens.append(int(np.argmax(logits(llm))))
    return tokens, logits(llm).tobytes()


def logits(llm: Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy()


@pytest.mark.parametrize("kv_type", ["gear", "gear2"])
def test_a_session_goes_on_as_if_it_had_not_been_saved(real_model: RealModel, tmp_path: Path, kv_type: str) -> None:
    path = real_model("smollm2-135m")
    with loaded(path, kv_type) as llm:
        prompt = llm.tokenize(own_text())[:700]
        answer(llm, prompt, 8)
        assert llm.kv_stats()["total"]["packed_share"] > 0.3
        n_bytes = llm.save_session(tmp_path / "talk", {"turn": 1})
        tokens = llm.input_ids[: llm.n_tokens].tolist()
        unbroken = write_on(llm)
    with loaded(path, kv_type) as other:
        assert other.load_session(tmp_path / "talk") == {"turn": 1}
        assert other.input_ids[: other.n_tokens].tolist() == tokens
        assert other.kv_stats()["total"]["packed_share"] > 0.3
        assert write_on(other) == unbroken
    with loaded(path, "f16") as plain:
        plain.eval(tokens)
        assert n_bytes < 0.8 * len(plain.save_state().llama_state)
