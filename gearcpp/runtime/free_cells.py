"""Telling the cache which cells are free.

llama.cpp gives cells back by forgetting them: the rows stay, and a cache that packs rows together would go on coding them with those that count, and take
them for young. Here the cache is told whenever cells were given back: an emptied context is a new one, bit for bit, and a sequence that gives up its end
goes on as if the end had never been.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import llama_cpp
from llama_cpp import _internals as internals

from .. import native

if TYPE_CHECKING:
    from ..cache.device import GearDevice

_ALL = -1  # sequences


def tell(context: Any, device: GearDevice) -> None:
    """Make the cells that no sequence of a context holds unwritten. To be called after llama.cpp was made to give some back.

    On GPUs only an emptied context is told: to change a store there takes a copy of it.

    Args:
        context: llama.cpp's context.
        device: what its model was loaded with.

    Raises:
        GearError: of the native library.
    """
    memory = llama_cpp.llama_get_memory(context)
    if all(llama_cpp.llama_memory_seq_pos_max(memory, i) < 0 for i in range(llama_cpp.llama_n_seq_max(context))):
        llama_cpp.llama_memory_clear(memory, True)
        return
    if not device.on_cpu:
        return
    # llama.cpp names the cells that are held when it saves them; into a session's window, which takes the names without the rows.
    size = llama_cpp.llama_state_seq_get_size(context, _ALL)
    session = native.lib.gear_session_new(device.handle, size)
    if session == native.ffi.NULL:
        raise native.last_error()
    try:
        window = int(native.ffi.cast("uintptr_t", native.lib.gear_session_window(session, native.ffi.NULL)))
        if llama_cpp.llama_state_seq_get_data(context, ctypes.cast(window, ctypes.POINTER(ctypes.c_uint8)), size, _ALL):
            native.check(native.lib.gear_session_forget_others(session))
    finally:
        native.lib.gear_session_free(session)


def can_go_back(context: Any, sequence: int, n: int) -> bool:
    """Whether a sequence can go on after its first n tokens. The cells of a sliding window may hold none of the tokens before the nth any more.

    Args:
        context: llama.cpp's context.
        sequence: its number.
    """
    n_window = llama_cpp.llama_model_n_swa(llama_cpp.llama_get_model(context))
    if n_window <= 0 or n <= 0:
        return True
    return bool(llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(context), sequence) <= max(n - n_window, 0))


class TellingContext(internals.LlamaContext):
    """llama-cpp-python's context, which tells its cache what it gives back, and does not go back to where a sliding window is lost.

    Attributes:
        device: what its model was loaded with; None: its cache is llama.cpp's own.
    """

    device: GearDevice | None

    @classmethod
    def of(cls, context: Any, device: GearDevice | None) -> None:
        """Make a context one of these."""
        context.__class__ = cls
        context.device = device

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """As the parent's, which takes a negative seq_id for the first. False, and nothing removed, where the rest would lack its sliding window."""
        sequence = max(seq_id, 0)
        has_end = llama_cpp.llama_memory_seq_pos_max(self.memory, sequence) >= max(p0, 0)
        if has_end and p1 < 0 and not can_go_back(self.ctx, sequence, p0):
            return False
        done = super().kv_cache_seq_rm(seq_id, p0, p1)
        if done and has_end and self.device:
            tell(self.ctx, self.device)
        return bool(done)

    def kv_cache_seq_keep(self, seq_id: int) -> None:
        """As the parent's."""
        super().kv_cache_seq_keep(seq_id)
        if self.device:
            tell(self.ctx, self.device)
