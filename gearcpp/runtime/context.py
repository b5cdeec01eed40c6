"""llama.cpp's model, context and batch, for those who decode batches of their own: `Model`, `Context` and `Batch`."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..cache.device import GearDevice
from ..errors import DataError, GearError, UnsupportedError
from ..model_info import ModelInfo
from .llama_log import LlamaLog

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


class Model:
    """A loaded model; its layers are on a GEAR device if one is given, which has to outlive it."""

    def __init__(self, info: ModelInfo, params: llama_cpp.llama_model_params, device: GearDevice | None = None) -> None:
        self.info, self.device = info, device
        with LlamaLog() as log:
            self.handle = llama_cpp.llama_model_load_from_file(str(info.path).encode(), params)
        if not self.handle:
            raise self.failure(DataError(f"llama.cpp cannot load {info.path}: {log.reason or '-v shows its log'}"))
        self.vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        """Free the model."""
        llama_cpp.llama_model_free(self.handle)

    def failure(self, otherwise: GearError) -> GearError:
        """Why a call of llama.cpp failed: what the device says, if it was the device."""
        return (self.device and self.device.take_failure()) or otherwise

    def tokenize(self, text: bytes) -> I32:
        """The tokens of a text, with the special tokens that the model wants around it: i32 [n]."""
        tokens = np.empty(len(text) + 2, np.int32)
        n = self._tokenize(text, tokens)
        if n < 0:  # a tokenizer may make several tokens of a byte; this is how many
            tokens = np.empty(-n, np.int32)
            n = self._tokenize(text, tokens)
        if n < 0:
            raise DataError("llama.cpp cannot tokenize a text of this size; give a shorter one")
        return tokens[:n].copy()

    def _tokenize(self, text: bytes, tokens: I32) -> int:
        pointer = tokens.ctypes.data_as(llama_cpp.llama_token_p)
        return int(llama_cpp.llama_tokenize(self.vocab, text, len(text), pointer, len(tokens), True, False))

    def bos(self) -> int | None:
        """The token that every chunk starts with, None for models without."""
        if not llama_cpp.llama_vocab_get_add_bos(self.vocab):
            return None
        bos = llama_cpp.llama_vocab_bos(self.vocab)
        if bos < 0:
            raise DataError("this model asks for a BOS token and has none: its GGUF lacks tokenizer.ggml.bos_token_id; convert it again")
        return bos


class Context:
    """A context of a model.

    Args:
        model: which has to outlive it.
        params: as from `gearcpp.context_params`.
        label: what its cache is called in messages.

    Raises:
        UnsupportedError: llama.cpp cannot make it, or keeps a layer's cache outside of GEAR.
    """

    def __init__(self, model: Model, params: llama_cpp.llama_context_params, label: str) -> None:
        self.model, self.label = model, label
        with LlamaLog() as log:
            self.handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self.handle:
            reason = log.reason or "-v shows llama.cpp's log"
            raise model.failure(UnsupportedError(f"no context of {params.n_ctx} tokens with a {label} cache can be made: {reason}"))
        try:
            if model.device:
                model.device.check_owns(model.info.layers, is_hybrid=llama_cpp.llama_model_is_hybrid(model.handle))
        except GearError:
            self.close()
            raise

    def close(self) -> None:
        """Free the context."""
        llama_cpp.llama_free(self.handle)

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.handle), True)

    def decode(self, batch: Batch) -> None:
        """Evaluate a batch.

        Raises:
            GearError: why the cache failed, or that llama.cpp did.
        """
        if status := llama_cpp.llama_decode(self.handle, batch.struct):
            first = batch.struct.pos[0]
            raise self.model.failure(GearError(f"{self.label}: llama_decode failed with {status} at position {first}; -v shows llama.cpp's log"))

    def logits(self, n: int) -> F32:
        """Those of the n tokens of the last batch for which they were wanted, [n, n_vocab]; valid until the next batch."""
        if n == 0:
            return np.empty((0, self.model.n_vocab), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.handle), (n, self.model.n_vocab))


class Batch:
    """A llama_batch over arrays of its own, one sequence for each token.

    Args:
        capacity: most tokens.

    Attributes:
        struct: what llama_decode takes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tokens, self._positions, self._ids = (np.zeros(capacity, np.int32) for _ in range(3))
        self._counts = np.ones(capacity, np.int32)
        self._logits = np.zeros(capacity, np.int8)
        integers = ctypes.POINTER(ctypes.c_int32)
        address, step = self._ids.ctypes.data, self._ids.itemsize
        self._id_pointers = (integers * capacity)(*(ctypes.cast(address + i * step, integers) for i in range(capacity)))
        self.struct = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(integers),
            pos=self._positions.ctypes.data_as(integers),
            n_seq_id=self._counts.ctypes.data_as(integers),
            seq_id=self._id_pointers,
            logits=self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        """Take all tokens out."""
        self.struct.n_tokens = 0

    def add(self, sequence_id: int, position: int, tokens: npt.ArrayLike, *, logits: bool | npt.NDArray[np.int64] = False) -> None:
        """Append tokens of one sequence.

        Args:
            position: of the first of them; the others follow.
            logits: whether they are wanted of the last token, or of which tokens [n], counted from the first one added here.
        """
        added = np.asarray(tokens, np.int32)
        first, end = self.struct.n_tokens, self.struct.n_tokens + len(added)
        self._tokens[first:end] = added
        self._positions[first:end] = np.arange(position, position + len(added))
        self._ids[first:end] = sequence_id
        self._logits[first:end] = 0
        if isinstance(logits, np.ndarray):
            self._logits[first + logits] = 1
        elif logits:
            self._logits[end - 1] = 1
        self.struct.n_tokens = end
