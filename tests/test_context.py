"""gearcpp.runtime.context: batches of several sequences, and why a model or a context cannot be made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from models import N_VOCAB

from gearcpp import DataError, GearError, UnsupportedError, context_params, model_params, read_model_info
from gearcpp.runtime.context import Batch, Context, Model

RandomModel = Callable[..., Path]


@contextmanager
def opened(path: Path, kv_type: Any = "f16", **fields: Any) -> Iterator[Context]:
    with ExitStack() as stack:
        params, device = model_params(path, kv_type, n_ubatch=64)
        if device:
            stack.enter_context(closing(device))
        model = stack.enter_context(closing(Model(read_model_info(path), params, device)))
        fields = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, **fields}
        yield stack.enter_context(closing(Context(model, context_params(kv_type, **fields), str(kv_type))))


def test_a_batch_holds_what_was_added() -> None:
    batch = Batch(8)
    for _ in range(2):  # nothing is left over from the first time
        batch.clear()
        batch.add(2, 10, [5, 6, 7], logits=True)
        batch.add(0, 0, [8], logits=False)
        batch.add(1, 3, np.array([1, 2, 3]), logits=np.array([0, 2]))
        n = batch.struct.n_tokens
        assert n == 7
        assert list(batch.struct.token[:n]) == [5, 6, 7, 8, 1, 2, 3]
        assert list(batch.struct.pos[:n]) == [10, 11, 12, 0, 3, 4, 5]
        assert [batch.struct.seq_id[i][0] for i in range(n)] == [2, 2, 2, 0, 1, 1, 1]
        assert list(batch.struct.n_seq_id[:n]) == [1] * 7
        assert list(batch.struct.logits[:n]) == [0, 0, 1, 0, 1, 0, 1]


def test_sequences_of_one_batch_do_not_see_each_other(random_model: RandomModel, random: np.random.Generator) -> None:
    texts = random.integers(3, N_VOCAB, (2, 20)).tolist()
    with opened(random_model(), n_seq_max=2, kv_unified=True) as context:
        batch = Batch(64)
        for sequence, tokens in enumerate(texts):
            batch.add(sequence, 0, tokens, logits=True)
        context.decode(batch)
        together = context.logits(2).copy()
        for sequence, tokens in enumerate(texts):
            context.clear()
            batch.clear()
            batch.add(0, 0, tokens, logits=True)
            context.decode(batch)
            np.testing.assert_allclose(context.logits(1)[0], together[sequence], atol=0.02 * np.abs(together).max())
    assert np.abs(together[0] - together[1]).max() > 0.1 * np.abs(together).max()


def test_reasons(random_model: RandomModel, tmp_path: Path) -> None:
    with opened(random_model()) as context:
        batch = Batch(64)
        with pytest.raises(GearError, match=r"f16: llama_decode failed with 1 at position 256"):
            for position in range(0, 320, 64):
                batch.clear()
                batch.add(0, position, [5] * 64)
                context.decode(batch)
        params = context_params(("f16", "q8_0"), n_ctx=256)
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with pytest.raises(UnsupportedError, match=r"no context of 256 tokens with a quantized cache can be made: .*V cache"):
            Context(context.model, params, "quantized")
    damaged = tmp_path / "model.gguf"
    data = random_model().read_bytes()
    damaged.write_bytes(data[: len(data) - 1000])
    with pytest.raises(DataError, match=r"llama\.cpp cannot load"):
        Model(read_model_info(damaged), model_params(damaged, "f16")[0])
