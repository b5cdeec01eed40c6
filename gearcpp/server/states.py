"""States of slots as GEAR holds them, in llama.cpp's prompt cache and in its slot files.

llama.cpp's server takes a slot's state through its own public functions (llama_state_seq_*), as rows of f16, and its context cannot be had from outside.
But the server calls them through its library's table of imported functions. `Packed` puts functions of its own there, for which llama.cpp's are the means:
they hold sessions (gearcpp/native/session.py), tiles as they are. So the server's own accounts of --cache-ram are right, too.

A state that returns is what it was, in any slot: its stream is emptied first, and native/session/store_image.cpp puts tiles into an empty stream as they
are.

A library that has no such table (it is of ELF, so of Linux) is left alone, and its states are f16.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gearcpp.errors import DataError, GearError
from gearcpp.native.session import Session, new_session, open_session, write_whole

_MAGIC, _HEAD = b"GEARSLOT", struct.Struct("<8sQ")  # before a session: the magic and its bytes, since more may follow it
_MOST_SAVED = 8  # of 16 bits GEAR keeps 2 at the least
_Size, _Data = ctypes.c_size_t, ctypes.c_void_p
_STATE = (_Size, _Data, _Data, _Size, ctypes.c_int32, ctypes.c_uint32)  # context, state, bytes, sequence, flags
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_state_seq_get_size_ext": (_Size, _Data, ctypes.c_int32, ctypes.c_uint32),
    "llama_state_seq_get_data_ext": _STATE,
    "llama_state_seq_set_data_ext": _STATE,
    "llama_state_seq_save_file": (_Size, _Data, ctypes.c_char_p, ctypes.c_int32, _Data, _Size),
    "llama_state_seq_load_file": (_Size, _Data, ctypes.c_char_p, ctypes.c_int32, _Data, _Size, ctypes.POINTER(_Size)),
}
_MEANS: dict[str, tuple[Any, ...]] = {
    "llama_get_memory": (_Data, _Data),
    "llama_memory_seq_pos_min": (ctypes.c_int32, _Data, ctypes.c_int32),
    "llama_memory_seq_pos_max": (ctypes.c_int32, _Data, ctypes.c_int32),
    "llama_memory_seq_rm": (ctypes.c_bool, _Data, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
    "llama_memory_clear": (None, _Data, ctypes.c_bool),
    "llama_n_seq_max": (ctypes.c_uint32, _Data),
    "llama_state_get_size": (_Size, _Data),
    "llama_state_get_data": (_Size, _Data, _Data, _Size),
}


class Packed:
    """Takes the place of llama.cpp's state functions in a library until `close`.

    Args:
        library: of xllamacpp.
        device: the plugin's.
        owner: what sessions and the model must have in common, as any text.
        n_threads: that pack.

    Attributes:
        works: whether the library calls its functions in a way that is understood. If not, nothing was changed.
        limit: bytes of the prompt cache; what cannot be in it is not packed to find that out. 0: no limit.
    """

    def __init__(self, library: ctypes.CDLL, device: Any, owner: str, n_threads: int) -> None:
        self.limit = 0
        self._device, self._n_threads = device, n_threads
        self._owner = hashlib.sha256(owner.encode()).hexdigest()
        self._fresh: tuple[tuple[int, int], bytes] | None = None  # what was packed to tell its size: it is asked for next
        self._sizes: dict[tuple[int, int], tuple[tuple[int, ...], int]] = {}
        self._llama = library
        for name, (result, *arguments) in (_FUNCTIONS | _MEANS).items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._table = _imported(library) if sys.platform == "linux" else {}
        self.works = _FUNCTIONS.keys() <= self._table.keys()
        self._lock = threading.Lock()
        if not self.works:
            return
        ours: tuple[Callable[..., int], ...] = (self._get_size, self._get_data, self._set_data, self._save_file, self._load_file)
        self._functions = [ctypes.CFUNCTYPE(*kinds)(self._locked(function)) for kinds, function in zip(_FUNCTIONS.values(), ours, strict=True)]
        for name, function in zip(_FUNCTIONS, self._functions, strict=True):
            _put(self._table[name], function)

    def close(self) -> None:
        """Give llama.cpp its functions back. To be called before the server ends: it waits for its thread, which must not wait for Python then."""
        with self._lock:
            for name in _FUNCTIONS if self.works else ():
                _put(self._table[name], getattr(self._llama, name))

    def _locked(self, function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            with self._lock:
                return function(*arguments)

        return call

    # In memory. Flags: parts of a state, which are not rows of GEAR's, or states that stay on a device.

    def _get_size(self, context: int, sequence: int, flags: int) -> int:
        nominal: int = self._llama.llama_state_seq_get_size_ext(context, sequence, flags)
        if flags or (self.limit and nominal > _MOST_SAVED * self.limit):
            self._sizes.pop((context, sequence), None)
            return nominal
        key, self._fresh = (context, sequence), None
        memory = self._llama.llama_get_memory(context)
        ends = [function(memory, sequence) for function in (self._llama.llama_memory_seq_pos_min, self._llama.llama_memory_seq_pos_max)]
        seen, size = self._sizes.get(key, ((), 0))
        if seen != (nominal, *ends):  # the server asks for all idle slots before every request
            if (packed := _said(lambda: self._packed(context, sequence))) is None:
                self._sizes.pop(key, None)
                return nominal
            size, self._fresh = len(packed), (key, packed)
            self._sizes[key] = ((nominal, *ends), size)
        return size

    def _get_data(self, context: int, data: int, size: int, sequence: int, flags: int) -> int:
        key, fresh, self._fresh = (context, sequence), self._fresh, None
        if flags or key not in self._sizes:
            return int(self._llama.llama_state_seq_get_data_ext(context, data, size, sequence, flags))
        packed = fresh[1] if fresh and fresh[0] == key else _said(lambda: self._packed(context, sequence))
        if packed is None or len(packed) > size:  # another prompt of as many tokens: what is there now, _set_data refuses
            ctypes.memset(data, 0, min(size, _HEAD.size))
            return 0
        ctypes.memmove(data, packed, len(packed))
        return size

    def _set_data(self, context: int, data: int, size: int, sequence: int, flags: int) -> int:
        n_bytes = 0 if flags else _session_bytes(ctypes.string_at(data, min(size, _HEAD.size)))
        if not n_bytes:
            return int(self._llama.llama_state_seq_set_data_ext(context, data, size, sequence, flags))

        def load() -> int:
            with open_session(n_bytes, lambda offset, n: ctypes.string_at(data + _HEAD.size + offset, n)) as session:
                self._restore(session, context, sequence)
            return size

        return _said(load) or 0

    # In files, to which the server may append what it knows of the slot: the number that is returned is where that begins.

    def _save_file(self, context: int, path: bytes, sequence: int, tokens: int, n_tokens: int) -> int:
        note = json.dumps({"owner": self._owner, "tokens": [*(ctypes.c_int32 * n_tokens).from_address(tokens)] if n_tokens else []}).encode()
        return _said(lambda: write_whole(Path(os.fsdecode(path)), lambda write: write(self._packed(context, sequence, note)))) or 0

    def _load_file(self, context: int, path: bytes, sequence: int, tokens: int | None, n_most: int, n_tokens: Any) -> int:
        def load() -> int:
            with open(path, "rb", buffering=0) as file:
                n_bytes = _session_bytes(file.read(_HEAD.size))
                if not n_bytes:  # of a server without GEAR
                    return int(self._llama.llama_state_seq_load_file(context, path, sequence, tokens, n_most, n_tokens))
                with open_session(n_bytes, lambda offset, n: os.pread(file.fileno(), n, _HEAD.size + offset), note_only=tokens is None) as session:
                    note = json.loads(session.note)
                    if note["owner"] != self._owner:
                        raise DataError("it is of another model, or of another --kv")
                    n_tokens[0] = len(note["tokens"])
                    if tokens is not None:
                        if n_tokens[0] > n_most:
                            raise DataError(f"it holds {n_tokens[0]} tokens, more than {n_most}")
                        self._restore(session, context, sequence)
                        (ctypes.c_int32 * n_tokens[0]).from_address(tokens)[:] = note["tokens"]
            return _HEAD.size + n_bytes

        return _said(load) or 0

    # Both

    def _packed(self, context: int, sequence: int, note: bytes = b"") -> bytes:
        data = bytearray(_HEAD.size)
        size = self._llama.llama_state_seq_get_size_ext(context, sequence, 0)
        with new_session(self._device, size, data.extend) as session:
            n_bytes = self._llama.llama_state_seq_get_data_ext(context, session.window[0], size, sequence, 0)
            if not n_bytes:
                raise GearError("llama.cpp could not save the state of a slot")
            session.save(n_bytes, note, n_threads=self._n_threads)
        _HEAD.pack_into(data, 0, _MAGIC, len(data) - _HEAD.size)
        return bytes(data)

    def _restore(self, session: Session, context: int, sequence: int) -> None:
        self._empty(context, sequence)
        session.attach(self._device)
        window, size = session.window
        if self._llama.llama_state_seq_set_data_ext(context, window, size, sequence, 0) != size:
            raise DataError("llama.cpp does not take it back: there is no room for it, or it is of another release")
        session.restore()

    def _empty(self, context: int, sequence: int) -> None:
        """Make a sequence's stream as if nothing had ever been written to it: tiles come back as they were only there."""
        llama = self._llama
        memory = llama.llama_get_memory(context)
        llama.llama_memory_seq_rm(memory, sequence, -1, -1)
        if all(llama.llama_memory_seq_pos_max(memory, other) < 0 for other in range(llama.llama_n_seq_max(context))):
            llama.llama_memory_clear(memory, True)
            return
        size = llama.llama_state_get_size(context)
        with new_session(self._device, size, len) as session:
            if llama.llama_state_get_data(context, session.window[0], size):
                session.forget_others()


def _session_bytes(head: bytes) -> int:
    """How long the session is that a head announces; 0: it is none of ours."""
    magic, n_bytes = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0)
    return n_bytes if magic == _MAGIC else 0


def _said(work: Callable[[], Any]) -> Any:
    """What comes of work, or None: llama.cpp cannot be told why, but its log can."""
    try:
        return work()
    except (GearError, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        print(f"gearcpp E state: {error}", file=sys.stderr, flush=True)
        return None


# ---------------------------------------------------------------------------------------------------------------------------------------------
# ELF: the table of the functions that a loaded library calls by name
# ---------------------------------------------------------------------------------------------------------------------------------------------

_DYNAMIC, _STRTAB, _SYMTAB, _PLTRELSZ, _JMPREL = 2, 5, 6, 2, 23
_DYN, _RELA = struct.Struct("<QQ"), struct.Struct("<QQq")
_PROGRAM, _SYMBOL_BYTES = struct.Struct("<IIQQQQQQ"), 24


class _Where(ctypes.Structure):
    _fields_ = (("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p))


def _imported(library: ctypes.CDLL) -> dict[str, int]:
    """Where the addresses of the state functions lie that are called by name."""
    where = _Where()
    ctypes.CDLL(None).dladdr(ctypes.cast(library.llama_state_seq_save_file, ctypes.c_void_p), ctypes.byref(where))
    base = where.base or 0
    if not base or ctypes.string_at(base, 6) != b"\x7fELF\x02\x01":
        return {}
    (programs,) = struct.unpack("<Q", ctypes.string_at(base + 32, 8))
    size, n = struct.unpack("<HH", ctypes.string_at(base + 54, 4))
    headers = [_PROGRAM.unpack(ctypes.string_at(base + programs + i * size, _PROGRAM.size)) for i in range(n)]
    dynamic = next(((header[3], header[6]) for header in headers if header[0] == _DYNAMIC), None)
    if not dynamic:
        return {}
    tags = dict(_DYN.iter_unpack(ctypes.string_at(base + dynamic[0], dynamic[1])))

    def address(tag: int) -> int:
        value: int = tags.get(tag, 0)
        return value if value >= base else base + value  # glibc has made it absolute, musl has not

    found = {}
    for place, info, _ in _RELA.iter_unpack(ctypes.string_at(address(_JMPREL), tags.get(_PLTRELSZ, 0))):
        (name,) = struct.unpack("<I", ctypes.string_at(address(_SYMTAB) + (info >> 32) * _SYMBOL_BYTES, 4))
        found[ctypes.string_at(address(_STRTAB) + name).decode()] = base + place
    return {name: found[name] for name in _FUNCTIONS if name in found}


def _put(place: int, function: Any) -> None:
    """Write a function's address into the table, which may be read-only."""
    page = place // mmap.PAGESIZE * mmap.PAGESIZE
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), _Size(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE):
        raise GearError("the table of xllamacpp's functions cannot be written")
    ctypes.c_void_p.from_address(place).value = ctypes.cast(function, ctypes.c_void_p).value
