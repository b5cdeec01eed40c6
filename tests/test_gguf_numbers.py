"""Numbers in a GGUF header that no model has are errors: no crash, no abort, no memory without end."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_numbers_process import Numbers
from models import Shape

from gearcpp import DataError, Llama, read_model_info

PROCESS = Path(__file__).with_name("gguf_numbers_process.py")
EVERY = int(os.environ.get("GEARCPP_GGUF_EVERY", "12"))  # 1: each number of the header, which takes minutes

RandomModel = Callable[..., Path]


def changed(model: Path, folder: Path, name: str, value: int) -> Path:
    data = bytearray(model.read_bytes())
    ((at, form),) = [(at, form) for what, at, form in Numbers(bytes(data)).all() if what == name]
    struct.pack_into("<" + form, data, at, value)
    path = folder / "changed.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llama.block_count", 0),
        ("llama.block_count", 65535),
        ("llama.block_count", 2**31 - 1),
        ("llama.embedding_length", 0),
        ("llama.embedding_length", 2**31 - 1),
        ("llama.context_length", 0),
        ("llama.attention.head_count", 2**31 - 1),
        ("llama.attention.head_count_kv", 2**32 - 1),
        ("llama.feed_forward_length", 2**32 - 1),
        ("llama.rope.dimension_count", 0),
        ("llama.rope.dimension_count", 31),
        ("llama.rope.dimension_count", 1024),
        ("number of tensors", 2**62),
        ("number of keys", 2**62),
    ],
)
def test_numbers_that_no_model_has_are_refused_before_llama_cpp_sees_them(random_model: RandomModel, tmp_path: Path, name: str, value: int) -> None:
    path = changed(random_model(shape=Shape(n_layer=1)), tmp_path, name, value)
    with pytest.raises(DataError, match="damaged"):
        read_model_info(path)
    with pytest.raises(DataError, match="damaged"):
        Llama(path, n_ctx=256, verbose=False)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_numbers_of_the_header_one_after_the_other(random_model: RandomModel, tmp_path: Path, family: str) -> None:
    """In a process of its own; GEARCPP_GGUF_EVERY=1 tries them all."""
    model = random_model(family, Shape(n_layer=1))
    done = subprocess.run([sys.executable, PROCESS, model, tmp_path, str(EVERY)], capture_output=True, text=True, check=True)
    *faults, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last["attempts"] > 20
    assert faults == []
