"""Sessions: what a context holds, packed as it is, in a file or in memory.

A session holds packed tiles bit for bit and no f16 copy of them. The native library reads and writes it: native/session/format.h says what is in it, each
section under a checksum of its own. This module records which model, cache and context it belongs to, and puts it on disk: it writes a temporary file and
renames it, so that whatever happens the file is the old one or the whole new one.

`Llama.save_session`, `Llama.load_session`, `Llama.save_state` and `Llama.load_state` are what users call.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState

from .. import native
from ..cache.device import GearDevice
from ..cache.kv_type import KVType
from ..errors import ClosedError, DataError, GearError
from ..model_info import ModelInfo

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

Write = Callable[[Any], object]  # takes a buffer
ReadAt = Callable[[int, int], bytes | memoryview]  # (offset, n): n bytes


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
            note = session.note
        tokens = np.array(note["tokens"], np.intc)
        super().__init__(
            input_ids=tokens, scores=np.zeros((1, 1), np.single), n_tokens=len(tokens), llama_state=data, llama_state_size=len(data), seed=note["seed"]
        )
        self.owner = owner_name(note["owner"])


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The owner of a session: model, cache and context
# ---------------------------------------------------------------------------------------------------------------------------------------------


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file's size, its first MiB (metadata) and 64 samples of 64 KiB spread over it: fast for models of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        n_bytes = file.seek(0, os.SEEK_END)
        digest.update(struct.pack("<Q", n_bytes))
        for offset, length in [(0, 2**20), *((i * n_bytes // 64, 2**16) for i in range(64))]:
            file.seek(offset)
            digest.update(file.read(length))
    return digest.hexdigest()


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


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The native session
# ---------------------------------------------------------------------------------------------------------------------------------------------


class Session:
    """An open session, in a ``with`` statement."""

    def __init__(self, pointer: Any, failures: list[BaseException]) -> None:
        self.pointer = pointer
        self._failures = failures

    def check(self, status: int) -> None:
        """Raise the error of a failed native call. What a Python callback raised comes first."""
        if self._failures:
            raise self._failures[0]
        native.check(status)

    @property
    def window(self) -> tuple[Any, int]:
        """Where llama.cpp writes its state to or reads it from, as a ctypes pointer, and its bytes."""
        n = native.ffi.new("int64_t *")
        address = int(native.ffi.cast("uintptr_t", native.lib.gear_session_window(self.pointer, n)))
        return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), n[0]

    @property
    def note(self) -> dict[str, Any]:
        """The session's header; DataError when gearcpp.Llama did not write it."""
        n = native.ffi.new("int64_t *")
        data = native.lib.gear_session_note(self.pointer, n)
        try:
            return _check_note(json.loads(bytes(native.ffi.buffer(data, n[0])) if n[0] else b""))
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError("its header is not one that this gearcpp understands: it was written by something else") from error


@contextmanager
def _session(pointer: Any, failures: list[BaseException]) -> Iterator[Session]:
    if pointer == native.ffi.NULL:
        raise failures[0] if failures else native.last_error()
    try:
        yield Session(pointer, failures)
    finally:
        native.lib.gear_session_free(pointer)


def _callback(kind: str, function: Callable[..., object], failures: list[BaseException]) -> Any:
    """A C function that returns 0, or 1 when ``function`` raised; the exception is kept in ``failures``."""

    def keep(_: Any, failure: BaseException, __: Any) -> int:
        failures.append(failure)
        return 1

    def call(*arguments: Any) -> int:
        function(*arguments)
        return 0

    return native.ffi.callback(kind, call, error=1, onerror=keep)


@contextmanager
def open_session(n_bytes: int, read_at: ReadAt, *, note_only: bool = False) -> Iterator[Session]:
    """A saved session, all of it checked (``note_only``: only its note).

    Raises:
        DataError: it is damaged, cut off, foreign, or of another version.
    """
    failures: list[BaseException] = []

    def read(_: Any, offset: int, data: Any, n: int) -> None:
        piece = read_at(offset, n)
        if len(piece) != n:
            raise DataError(f"it is cut off: {len(piece)} of {n} bytes could be read from byte {offset} on")
        native.ffi.buffer(data, n)[:] = piece

    function = _callback("gear_session_read", read, failures)
    with _session(native.lib.gear_session_open(n_bytes, function, native.ffi.NULL, int(note_only)), failures) as session:
        yield session


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
    failures: list[BaseException] = []
    function = _callback("gear_session_write", lambda _, piece, n: write(native.ffi.buffer(piece, n)), failures)
    size = llama_cpp.llama_state_get_size(llm.ctx)
    with _session(native.lib.gear_session_new(_device(llm), size), failures) as session:
        window, _ = session.window
        n_bytes = llama_cpp.llama_state_get_data(llm.ctx, window, size)
        llm._raise_failure()
        if n_bytes == 0:
            raise DataError("llama.cpp could not save the state; verbose=True shows its log")
        ffi = native.ffi
        extra = ffi.cast("void *", scores.ctypes.data)
        session.check(
            native.lib.gear_session_save(
                session.pointer, n_bytes, ffi.from_buffer(header), len(header), extra, scores.nbytes, llm.n_threads, function, ffi.NULL
            )
        )


def restore_session(llm: SessionLlama, session: Session) -> Any:
    """Restore a context. Nothing is changed before the session is known to fit; the context is empty when it fails after that.

    Returns:
        What was given to write_session as ``data``.

    Raises:
        DataError: the session belongs to another model, cache or context, or does not fit into this one.
    """
    note = session.note
    _check_owner(note, llm)
    session.check(native.lib.gear_session_attach(session.pointer, _device(llm)))
    window, size = session.window
    n_tokens, n_extra = len(note["tokens"]), int(native.lib.gear_session_extra_bytes(session.pointer))
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
        session.check(native.lib.gear_session_restore(session.pointer, extra, native.ffi.NULL))
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
        return session.note.get("data")


@contextmanager
def open_file(path: Path, *, note_only: bool = False) -> Iterator[Session]:
    """The session of a file. Errors name its path."""
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            with open_session(n_bytes, lambda offset, n: os.pread(file.fileno(), n, offset), note_only=note_only) as session:
                yield session
    except ClosedError:
        raise
    except GearError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def write_whole(path: Path, write_all: Callable[[Write], object]) -> int:
    """Write a file under another name beside it, then rename it. What killed processes left behind is removed.

    Returns:
        Bytes written.

    Raises:
        GearError: it cannot be written.
    """
    try:
        _remove_leftovers(path)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise GearError(f"cannot save to {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # marks it as being written
            write_all(file.write)
            file.flush()
            os.fsync(file.fileno())
            n_bytes = file.tell()
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise GearError(f"cannot save to {path}: {error.strerror}") from error
        raise
    with contextlib.suppress(OSError):  # so that the new name survives a power failure, where the file system supports it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return n_bytes


def _remove_leftovers(path: Path) -> None:
    for temporary in path.parent.glob(f".{_escaped(path.name)}.*.part"):
        with contextlib.suppress(OSError), temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while somebody writes it
            temporary.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
