"""What the tests of the torch reference share. They are skipped without PyTorch, all but the one that says so."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest):
    """A torch generator whose seed comes from the test's name and GEARCPP_TEST_SEED; it is printed, so that a failure shows it."""
    torch = pytest.importorskip("torch", reason="gearcpp.reference needs PyTorch")
    torch.set_num_threads(1)  # the tensors are small
    seed = zlib.crc32(request.node.name.encode()) + int(os.environ.get("GEARCPP_TEST_SEED", "1"))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def real_rows(bundled_model: Path) -> dict[str, np.ndarray]:
    """Keys and values of the bundled model on 512 tokens of text, from plain llama.cpp: {"k", "v"}: f32 [n_layer * n_head, 512, 64]."""
    import llama_cpp

    llm = llama_cpp.Llama(str(bundled_model), n_ctx=512, n_batch=512, flash_attn=True, verbose=False)
    try:
        tokens = llm.tokenize(Path(__file__).with_name("test_gear.py").read_bytes())[:512]
        llm.eval(tokens)
        context = llm._ctx.ctx
        state = (llama_cpp.ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(context, 0))()
        assert llama_cpp.llama_state_seq_get_data(context, state, len(state), 0) == len(state)
        rows = _rows_of_state(bytes(state), len(tokens))
    finally:
        llm.close()
    return {side: np.concatenate([layer.reshape(len(tokens), -1, 64).swapaxes(0, 1) for layer in layers]) for side, layers in rows.items()}


@pytest.fixture
def rows_of_state():
    """`_rows_of_state`, for tests of what a cache holds."""
    return _rows_of_state


def _rows_of_state(state: bytes, n_token: int) -> dict[str, list[np.ndarray]]:
    """The f16 rows of each layer, [n_token, n_embd], from llama.cpp's sequence state (llama-kv-cache.cpp, state_write)."""
    place = state.find(struct.pack("<II", 1, n_token))  # one stream, its cells; versions differ in what comes before

    def take(layout: str):
        nonlocal place
        value = struct.unpack_from("<" + layout, state, place)
        place += struct.calcsize("<" + layout)
        return value[0]

    take("II")
    for _ in range(n_token):
        take("i")  # position
        for _ in range(take("I")):
            take("i")  # sequence
    assert take("I") == 0  # V is not transposed, because flash attention is on
    n_layer = take("I")
    rows: dict[str, list[np.ndarray]] = {"k": [], "v": []}
    for layers in rows.values():
        for _ in range(n_layer):
            assert take("i") == 1  # f16
            n_bytes = take("Q") * n_token
            layers.append(np.frombuffer(state, np.float16, n_bytes // 2, place).reshape(n_token, -1).astype(np.float32))
            place += n_bytes
    assert place == len(state)
    return rows
