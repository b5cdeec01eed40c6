"""Sessions: what a context holds, packed as it is, in a file or in memory.

A session holds packed tiles bit for bit and no f16 copy of them. The native library reads and writes it: native/session/format.h says what is in it, each
section under a checksum of its own (gearcpp/native/session.py). This module records which model, cache and context it belongs to.

`Llama.save_session`, `Llama.load_session`, `Llama.save_state` and `Llama.load_state` are what users call.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState

from .. import native
from ..cache.device import GearDevice
from ..cache.kv_type import KVType
from ..errors import DataError
from ..model_info import ModelInfo, file_fingerprint
from ..native.session import Session, Write, new_session, open_file, open_session, write_whole

# What else than the model decides about keys and values: members of llama_context_params.
_CONTEXT = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
    "attention_type",
    "flash_attn_type",
    "n_seq_max",
    "kv_unified",
)


class SessionLlama(Protocol):
    """What a session needs of a `Llama`."""

    kv_type: KVType
    info: ModelInfo
    model_path: str
    n_tokens: int
    n_threads: int
    input_ids: npt.NDArray[np.intc]
    context_params: Any
    _given: dict[str, Any]
    _device: GearDevice | None
    _ctx: Any
    _seed: int
    _logits_all: bool

    @property
    def ctx(self) -> Any: ...
    @property
    def _scores(self) -> npt.NDArray[np.single]: ...
    def n_ctx(self) -> int: ...
    def n_vocab(self) -> int: ...
    def _session_owner(self) -> dict[str, Any]: ...
    def _raise_failure(self) -> None: ...
    def _listening(self) -> Any: ...
    def _take_up(self, tokens: npt.NDArray[np.intc], scores: npt.NDArray[np.single], seed: int) -> None: ...


class GearState(LlamaState):
    """A state of `Llama.save_state` that holds the cache packed: the bytes of a session file.

    It can be kept, copied and pickled like llama_cpp's LlamaState, and loaded by a `gearcpp.Llama` of the same model and ``kv_type`` only.

    Attributes:
        owner: the model and cache that it belongs to, as a short text.
    """

    def __init__(self, data: bytes) -> None:
        with open_session(len(data), lambda offset, n: memoryview(data)[offset : offset + n], note_only=True) as session:
            note = note_of(session)
        tokens = np.array(note["tokens"], np.intc)
        super().__init__(
            input_ids=tokens, scores=np.zeros((1, 1), np.single), n_tokens=len(tokens), llama_state=data, llama_state_size=len(data), seed=note["seed"]
        )
        self.owner = owner_name(note["owner"])


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The owner of a session: model, cache and context
# ---------------------------------------------------------------------------------------------------------------------------------------------


def owner_of(llm: SessionLlama) -> dict[str, Any]:
    """What a session and the context that restores it must have in common, as JSON. Reads parts of the model's files."""
    kv, given = llm.kv_type, llm._given
    codec = kv.method.name if kv.method else bool(given.get("codec"))  # whose tiles are f16
    lora = given.get("lora_path")
    owner = {
        "model": [file_fingerprint(path) for path in llm.info.files],
        "lora": [file_fingerprint(Path(lora)), float(given.get("lora_scale", 1.0))] if lora else None,
        "overrides": {name: repr(value) for name, value in sorted((given.get("kv_overrides") or {}).items())},
        "cache": {"gear": kv.gear.to_dict(), "codec": codec} if kv.gear else {"types": [kv.type_k, kv.type_v]},
        "context": {name: getattr(llm.context_params, name) for name in _CONTEXT if hasattr(llm.context_params, name)},
        "llama_state": llama_cpp.LLAMA_SESSION_VERSION,
    }
    same: dict[str, Any] = json.loads(json.dumps(owner))
    return same


def owner_name(owner: dict[str, Any]) -> str:
    """A short text that is the same for the same owner."""
    return hashlib.sha256(json.dumps(owner, sort_keys=True).encode()).hexdigest()[:32]


def _check_owner(note: dict[str, Any], llm: SessionLlama) -> None:
    saved, present = note["owner"], llm._session_owner()
    if any(saved[part] != present[part] for part in ("model", "lora", "overrides")):
        raise DataError(f"it belongs to another model ({note['model']}), or to the same with another LoRA or kv_overrides; load that one")
    if saved["cache"] != present["cache"]:
        raise DataError(f"it was saved with kv_type={note['kv_type']!r} (or other settings of it), and this context has {llm.kv_type.name!r}")
    different = [name for name in present["context"] if saved["context"].get(name) != present["context"][name]]
    if different:
        values = ", ".join(f"{name}={saved['context'].get(name)}" for name in different)
        raise DataError(f"it was saved in a context of other settings: {values}; make the context with the same")
    if saved["llama_state"] != present["llama_state"]:
        raise DataError(f"it was saved by llama-cpp-python {note['llama_cpp_python']}, whose states the installed {llama_cpp.__version__} cannot read")
    if any(token >= llm.n_vocab() for token in note["tokens"]):
        raise DataError(f"it holds tokens that this model's vocabulary of {llm.n_vocab()} has not")
    if len(note["tokens"]) > llm.n_ctx():
        raise DataError(f"it holds {len(note['tokens'])} tokens; this context has room for {llm.n_ctx()} (n_ctx)")


def _check_note(note: Any) -> dict[str, Any]:
    """The note, its fields checked: checksums prove that it is undamaged, not that gearcpp.Llama wrote it."""
    kinds = {"owner": dict, "model": str, "kv_type": str, "llama_cpp_python": str, "tokens": list, "seed": int}
    sound = isinstance(note, dict) and all(isinstance(note.get(name), kind) for name, kind in kinds.items())
    sound = sound and {"model", "lora", "overrides", "cache", "context", "llama_state"} <= note["owner"].keys()
    if not sound or not isinstance(note["owner"]["context"], dict) or not all(isinstance(t, int) and 0 <= t < 2**31 for t in note["tokens"]):
        raise DataError("its header is not one that this gearcpp understands: it was written by something else")
    checked: dict[str, Any] = note
    return checked


def note_of(session: Session) -> dict[str, Any]:
    """The session's header; DataError when gearcpp.Llama did not write it."""
    try:
        return _check_note(json.loads(session.note))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError("its header is not one that this gearcpp understands: it was written by something else") from error


def write_session(llm: SessionLlama, data: Any, write: Write) -> None:
    """Write the session of a context through ``write``. Its full tiles are packed first.

    Args:
        data: of the caller, as JSON can hold it.

    Raises:
        DataError: llama.cpp could not give its state.
        TypeError, ValueError: ``data`` is nothing that JSON can hold.
    """
    note = {
        "owner": llm._session_owner(),
        "model": Path(llm.model_path).name,
        "kv_type": llm.kv_type.name,
        "llama_cpp_python": llama_cpp.__version__,
        "tokens": llm.input_ids[: llm.n_tokens].tolist(),
        "seed": int(llm._seed),
        "data": data,
    }
    header = json.dumps(note).encode()
    scores = np.ascontiguousarray(llm._scores, np.single) if llm._logits_all else np.empty(0, np.single)
    size = llama_cpp.llama_state_get_size(llm.ctx)
    with new_session(_device(llm), size, write) as session:
        window, _ = session.window
        n_bytes = llama_cpp.llama_state_get_data(llm.ctx, window, size)
        llm._raise_failure()
        if n_bytes == 0:
            raise DataError("llama.cpp could not save the state; verbose=True shows its log")
        session.save(n_bytes, header, scores, llm.n_threads)


def restore_session(llm: SessionLlama, session: Session) -> Any:
    """Restore a context. Nothing is changed before the session is known to fit; the context is empty when it fails after that.

    Returns:
        What was given to write_session as ``data``.

    Raises:
        DataError: the session belongs to another model, cache or context, or does not fit into this one.
    """
    note = note_of(session)
    _check_owner(note, llm)
    session.attach(_device(llm))
    window, size = session.window
    n_tokens, n_extra = len(note["tokens"]), session.n_extra
    takes_scores = llm._logits_all and n_extra > 0
    if takes_scores and n_extra != n_tokens * llm.n_vocab() * 4:
        raise DataError(f"it holds {n_extra} bytes of logits, which is not what {n_tokens} tokens have")
    scores = np.zeros((n_tokens, llm.n_vocab()) if takes_scores else (1, 1), np.single)
    try:
        with llm._listening() as log:
            n_read = llama_cpp.llama_state_set_data(llm.ctx, window, size)
        llm._raise_failure()
        if n_read != size:
            raise DataError(f"llama.cpp does not take its state: {explain_state(log.reason)}")
        memory = llama_cpp.llama_get_memory(llm.ctx)
        if memory and llama_cpp.llama_memory_seq_pos_max(memory, 0) < n_tokens - 1:
            raise DataError(f"its header lists {n_tokens} tokens, but its cache ends before them: it was put together from different sessions")
        extra = native.ffi.cast("void *", scores.ctypes.data) if takes_scores else native.ffi.NULL
        session.restore(extra)
    except BaseException as error:
        llm.n_tokens = 0
        llm._ctx.kv_cache_clear()
        if isinstance(error, DataError):
            raise DataError(f"{error}; the context is empty now") from error
        raise
    llm._take_up(np.array(note["tokens"], np.intc), scores, note["seed"])
    return note.get("data")


def _device(llm: SessionLlama) -> Any:
    return llm._device.handle if llm._device else native.ffi.NULL


def explain_state(reason: str) -> str:
    """What llama.cpp's reason for refusing a state means."""
    if "V transposition" in reason:
        return "one side has flash attention and the other has not, which changes the order of V; use flash_attn=True for both"
    if "mismatched" in reason and "type" in reason:
        return f"it is of another cache type ({reason}); states of GEAR caches and of f16 with flash attention fit each other"
    return reason or "it is damaged, or of another model"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------------------------------


def pack_state(llm: SessionLlama) -> GearState:
    """The context as a packed state."""
    pieces: list[bytes] = []
    write_session(llm, None, lambda piece: pieces.append(bytes(piece)))
    return GearState(b"".join(pieces))


def load_packed(llm: SessionLlama, state: GearState) -> None:
    """Go back to a packed state."""
    data = memoryview(state.llama_state)
    with open_session(len(data), lambda offset, n: data[offset : offset + n]) as session:
        restore_session(llm, session)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------------------------------------------------------


def save(llm: SessionLlama, path: Path, data: Any) -> int:
    """`Llama.save_session`."""
    return write_whole(path, lambda write: write_session(llm, data, write))


def load(llm: SessionLlama, path: Path) -> Any:
    """`Llama.load_session`."""
    with open_file(path) as session:
        return restore_session(llm, session)


def read_data(path: Path) -> Any:
    """What was saved beside the cache. Only the file's first part is read and checked.

    Raises:
        DataError: the file is missing, damaged, foreign or of another version.
    """
    with open_file(path, note_only=True) as session:
        return note_of(session).get("data")
