"""What ``--verify`` does: no weight is NaN or infinite, the file holds what was read, and llama.cpp's tokenizer agrees with the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gearcpp.errors import DataError

from .container import OutputTensor
from .rows import BLOCK_ELEMENTS, Block, Rows

# Kinds of text, compared one by one so that a difference has a name.
_PROBES = {
    "English": "The quick brown fox didn't jump; they'll SAY it's lazy.  Two  spaces.\n\n\nNew paragraph\t\ttabs \r\n",
    "code": "def f(x):\n    return x**2 + [1, 22, 333][0]  # 4444 55555 \\n <b>&amp;</b> https://a.b/c?d=1\n\tsnake_case CamelCase",
    "accents": "Größe, naïve, Ångström, déjà vu, ΑΒΓ αβγ, Привет мир",
    "Chinese, Japanese and Korean": "今天天气很好。東京タワー、한국어 문장",
    "Hebrew and Arabic": "שלום עולם السلام عليكم",
    "scripts with combining marks (Hindi, Thai ...)": "हिन्दी में लिखना ภาษาไทย",
    "emoji": "🙂👍🏽👩‍🚀🏴‍☠️ ❤️",
}
_MUST_AGREE = ("English", "code")


class Finite(Rows):
    """A tensor that is searched for NaN and infinity while it is read."""

    def __init__(self, name: str, source: Rows) -> None:
        self._name = name
        self._source = source
        self.shape = source.shape

    def read(self, start: int, stop: int) -> Block:
        block = self._source.read(start, stop)
        if not np.isfinite(block).all():
            row = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise DataError(f"{self._name} has a NaN or an infinity in row {row}: the checkpoint is damaged")
        return block


def check_file(path: Path, tensors: list[OutputTensor]) -> None:
    """Read every tensor back and compare it, block by block, with what the source gives.

    Raises:
        DataError: the file differs.
    """
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in tensors:
        offset = written[tensor.name].data_offset
        for encoded in tensor.encoded_blocks():
            stored = np.fromfile(path, np.uint8, encoded.nbytes, offset=offset)
            if stored.tobytes() != encoded.tobytes():
                raise DataError(f"{tensor.name} in {path} is not what was written: the disk or the memory is faulty")
            offset += encoded.nbytes


def check_finite(path: Path) -> None:
    """Search the tensors of a GGUF file for NaN and infinity, in pieces.

    Raises:
        DataError: one has them.
    """
    for tensor in gguf.GGUFReader(path).tensors:
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, BLOCK_ELEMENTS // rows.shape[1])
        for start in range(0, len(rows), step):
            if not np.isfinite(gguf.dequantize(rows[start : start + step], tensor.tensor_type)).all():
                raise DataError(f"{tensor.name} has a NaN or an infinity: the checkpoint is damaged")


def check_tokens(path: Path, folder: Path) -> list[str]:
    """Compare llama.cpp's tokens with those of tokenizer.json; the kinds of text that differ, if any.

    Raises:
        DataError: plain English or code is among them.
    """
    if not (folder / "tokenizer.json").is_file():
        return []
    from tokenizers import Tokenizer

    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    converted = llama_tokens(path, list(_PROBES.values()), add_special=False)
    differing = [kind for (kind, text), ids in zip(_PROBES.items(), converted, strict=True) if original.encode(text, add_special_tokens=False).ids != ids]
    if any(kind in _MUST_AGREE for kind in differing):
        raise DataError(f"llama.cpp gives other tokens than tokenizer.json for {', '.join(differing)}: the pre-tokenizer is not the right one")
    return [f"llama.cpp gives other tokens than tokenizer.json for {kind}" for kind in differing]


def llama_tokens(path: Path, texts: list[str], *, add_special: bool) -> list[list[int]]:
    """Token ids of texts by llama.cpp, with the tokenizer of a GGUF file; special tokens in the text are recognised.

    Raises:
        DataError: llama.cpp cannot load the file.
    """
    from llama_cpp import llama_cpp

    from gearcpp.runtime.llama_log import LlamaLog

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with LlamaLog() as log:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise DataError(f"llama.cpp cannot load the tokenizer of {path}: {log.reason}")
    try:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [_tokenize(vocab, text.encode(), add_special) for text in texts]
    finally:
        llama_cpp.llama_model_free(model)


def _tokenize(vocab: Any, text: bytes, add_special: bool) -> list[int]:
    from llama_cpp import llama_cpp

    room = (llama_cpp.llama_token * (len(text) + 8))()  # no more tokens than bytes, a space before, BOS and EOS
    count = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), add_special, True)
    return list(room[:count])
