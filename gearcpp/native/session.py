"""Sessions of the native library (native/session/format.h): what a cache holds, packed as it is, on its way to a file or to memory and back.

Of a file the old one or the whole new one is there, whatever happens: it is written under another name and renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ClosedError, DataError, GearError
from .library import check, ffi, last_error, lib

Write = Callable[[Any], object]  # takes a buffer
ReadAt = Callable[[int, int], bytes | memoryview]  # (offset, n): n bytes


class Session:
    """An open session, in a ``with`` statement."""

    def __init__(self, pointer: Any, failures: list[BaseException], write: Any = None) -> None:
        self.pointer = pointer
        self._failures = failures
        self._write = write

    def check(self, status: int) -> None:
        """Raise the error of a failed native call. What a Python callback raised comes first."""
        if self._failures:
            raise self._failures[0]
        check(status)

    @property
    def window(self) -> tuple[Any, int]:
        """Where llama.cpp writes its state to or reads it from, as a ctypes pointer, and its bytes."""
        n = ffi.new("int64_t *")
        address = int(ffi.cast("uintptr_t", lib.gear_session_window(self.pointer, n)))
        return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), n[0]

    @property
    def note(self) -> bytes:
        """What was given to `save`."""
        n = ffi.new("int64_t *")
        data = lib.gear_session_note(self.pointer, n)
        return bytes(ffi.buffer(data, n[0])) if n[0] else b""

    def attach(self, device: Any) -> None:
        """Before llama.cpp restores from the window; DataError when the device's tiles are others."""
        self.check(lib.gear_session_attach(self.pointer, device))

    def save(self, n_bytes: int, note: bytes, extra: Any = b"", n_threads: int = 1) -> None:
        """Write all of it: of the window the first ``n_bytes``, which are llama.cpp's state now. Full tiles are packed first.

        Args:
            extra: a buffer of the caller's.
        """
        more = ffi.from_buffer(extra)
        self.check(lib.gear_session_save(self.pointer, n_bytes, ffi.from_buffer(note), len(note), more, len(more), n_threads, self._write, ffi.NULL))

    def forget_others(self) -> None:
        """llama.cpp has written the window: cells that it did not name become as if they had never been written."""
        self.check(lib.gear_session_forget_others(self.pointer))

    @property
    def n_extra(self) -> int:
        """Bytes of the caller's buffer."""
        return int(lib.gear_session_extra_bytes(self.pointer))

    def restore(self, extra: Any = ffi.NULL) -> None:
        """Fill the cache, after llama.cpp has read the window.

        Args:
            extra: pointer to room for `n_extra` bytes, or NULL.
        """
        self.check(lib.gear_session_restore(self.pointer, extra, ffi.NULL))


@contextmanager
def _session(pointer: Any, failures: list[BaseException], write: Any = None) -> Iterator[Session]:
    if pointer == ffi.NULL:
        raise failures[0] if failures else last_error()
    try:
        yield Session(pointer, failures, write)
    finally:
        lib.gear_session_free(pointer)


def _callback(kind: str, function: Callable[..., object], failures: list[BaseException]) -> Any:
    """A C function that returns 0, or 1 when ``function`` raised; the exception is kept in ``failures``."""

    def keep(_: Any, failure: BaseException, __: Any) -> int:
        failures.append(failure)
        return 1

    def call(*arguments: Any) -> int:
        function(*arguments)
        return 0

    return ffi.callback(kind, call, error=1, onerror=keep)


@contextmanager
def new_session(device: Any, n_bytes: int, write: Write) -> Iterator[Session]:
    """A session to be saved through ``write``.

    Args:
        device: whose caches it holds, or NULL.
        n_bytes: the most that llama.cpp's state has.
    """
    failures: list[BaseException] = []
    function = _callback("gear_session_write", lambda _, piece, n: write(ffi.buffer(piece, n)), failures)
    with _session(lib.gear_session_new(device, n_bytes), failures, function) as session:
        yield session


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
        ffi.buffer(data, n)[:] = piece

    function = _callback("gear_session_read", read, failures)
    with _session(lib.gear_session_open(n_bytes, function, ffi.NULL, int(note_only)), failures) as session:
        yield session


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
