"""Prompt caches that hold packed states: `GearRAMCache` and `GearDiskCache`, for `Llama.set_cache`.

They have the interface of llama-cpp-python's own caches. What they hold is bytes of sessions (`.sessions`), several times smaller than its states.
A cache may serve several models and kinds of KV cache: each context sees only what is its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

from ..errors import ConfigError, DataError, GearError
from . import sessions
from .sessions import GearState

Tokens = npt.NDArray[np.intc]

_SUFFIX = ".gearstate"


class PackedCache(BaseLlamaCache):
    """A prompt cache whose states are packed. `Llama.save_state` gives packed states to a context that has one."""

    @abstractmethod
    def get(self, tokens: Sequence[int], owner: str | None) -> GearState:
        """The state that shares the longest prefix with ``tokens``; KeyError when none shares the first token.

        Args:
            owner: of that model and cache only (`GearState.owner`); None: of any.
        """

    @abstractmethod
    def has(self, tokens: Sequence[int], owner: str | None) -> bool:
        """Whether `get` would find a state."""

    @abstractmethod
    def put(self, state: LlamaState) -> None:
        """Keep a state under the tokens that it holds, and drop those that were not used for the longest time until all fit into ``capacity_bytes``. A
        state that is larger than that by itself is not kept."""

    def of_owner(self, owner: str) -> PackedCache:
        """This cache for one model and kind of KV cache."""
        return _OwnersView(self, owner)

    def __getitem__(self, key: Sequence[int]) -> GearState:
        return self.get(key, None)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, Sequence) and self.has(key, None)

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        self.put(value)  # by what it holds: the parent's key has one token more, the last one, which no state holds


class _OwnersView(PackedCache):
    def __init__(self, cache: PackedCache, owner: str) -> None:
        super().__init__(cache.capacity_bytes)
        self.cache, self.owner = cache, owner

    @property
    def cache_size(self) -> int:
        return int(self.cache.cache_size)

    def get(self, tokens: Sequence[int], owner: str | None) -> GearState:
        return self.cache.get(tokens, owner or self.owner)

    def has(self, tokens: Sequence[int], owner: str | None) -> bool:
        return self.cache.has(tokens, owner or self.owner)

    def put(self, state: LlamaState) -> None:
        self.cache.put(state)


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens both have in common from their start."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _packed(state: LlamaState, cache: str) -> GearState:
    if not isinstance(state, GearState):
        raise ConfigError(f"a {cache} holds packed states: use it with gearcpp.Llama (set_cache), or give it save_state(packed=True)")
    return state


# ---------------------------------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------------------------------


class GearRAMCache(PackedCache):
    """A prompt cache in memory.

    Args:
        capacity_bytes: most bytes that all states together may have; those not used for the longest time are dropped first.
    """

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        super().__init__(capacity_bytes)
        self._states: OrderedDict[tuple[str, bytes], GearState] = OrderedDict()  # by owner and tokens, the last used last

    @property
    def cache_size(self) -> int:
        """Bytes of all states and the tokens that they are found by."""
        return sum(_size(tokens, state) for (_, tokens), state in self._states.items())

    def get(self, tokens: Sequence[int], owner: str | None) -> GearState:
        """See `PackedCache.get`."""
        key = self._find(tokens, owner)
        if key is None:
            raise KeyError("no state begins with these tokens")
        self._states.move_to_end(key)
        return self._states[key]

    def has(self, tokens: Sequence[int], owner: str | None) -> bool:
        """See `PackedCache.has`."""
        return self._find(tokens, owner) is not None

    def put(self, state: LlamaState) -> None:
        """See `PackedCache.put`."""
        packed = _packed(state, "GearRAMCache")
        key = (packed.owner, packed.input_ids.tobytes())
        self._states.pop(key, None)
        if _size(key[1], packed) > self.capacity_bytes:
            return
        self._states[key] = packed
        while self.cache_size > self.capacity_bytes:
            self._states.popitem(last=False)

    def _find(self, tokens: Sequence[int], owner: str | None) -> tuple[str, bytes] | None:
        wanted = np.array(tokens, np.intc)
        best, longest = None, 0
        for key in self._states:
            n = _common(np.frombuffer(key[1], np.intc), wanted) if owner in (None, key[0]) else 0
            if n > longest:
                best, longest = key, n
        return best


def _size(tokens: bytes, state: GearState) -> int:
    return len(tokens) + len(state.llama_state) + state.input_ids.nbytes


# ---------------------------------------------------------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    owner: str
    tokens: Tokens
    n_bytes: int


class GearDiskCache(PackedCache):
    """A prompt cache in a folder, one file for each state, which the next process finds again. Several processes may share it.

    A state is written under another name and renamed, so that a crash leaves whole files only. One that is damaged all the same is removed when it is
    found out, with a warning, and counts as not there. A state that cannot be written (a full disk) is dropped with a warning.

    Args:
        cache_dir: the folder; made if it is not there.
        capacity_bytes: most bytes that all files together may have; those not used for the longest time are removed first.

    Raises:
        GearError: the folder cannot be made.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] = ".cache/gear_cache", capacity_bytes: int = 2 << 30) -> None:
        super().__init__(capacity_bytes)
        self.folder = Path(cache_dir)
        self._entries: dict[str, _Entry | None] = {}  # by file name; None: not a state that can be used
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GearError(f"cannot make the folder {self.folder}: {error.strerror}") from error

    @property
    def cache_size(self) -> int:
        """Bytes of all files."""
        return sum(status.st_size for _, status in self._files())

    def get(self, tokens: Sequence[int], owner: str | None) -> GearState:
        """See `PackedCache.get`."""
        while (name := self._find(tokens, owner)) is not None:
            path = self.folder / name
            try:
                data = path.read_bytes()
                with sessions.open_session(len(data), lambda offset, n: memoryview(data)[offset : offset + n]):  # noqa: B023
                    state = GearState(data)
            except DataError as error:
                self._remove(name)
                warnings.warn(f"{path} was removed from the prompt cache: {error}", RuntimeWarning, stacklevel=2)
                continue
            except OSError:  # another process removed it
                self._entries[name] = None
                continue
            with contextlib.suppress(OSError):
                os.utime(path)
            return state
        raise KeyError("no state begins with these tokens")

    def has(self, tokens: Sequence[int], owner: str | None) -> bool:
        """See `PackedCache.has`."""
        return self._find(tokens, owner) is not None

    def put(self, state: LlamaState) -> None:
        """See `PackedCache.put`."""
        packed = _packed(state, "GearDiskCache")
        if len(packed.llama_state) > self.capacity_bytes:
            return
        name = hashlib.sha256(packed.owner.encode() + packed.input_ids.tobytes()).hexdigest()[:32] + _SUFFIX
        try:
            sessions.write_whole(self.folder / name, lambda write: write(packed.llama_state))
        except GearError as error:
            warnings.warn(f"a state was not kept in the prompt cache: {error}", RuntimeWarning, stacklevel=2)
            return
        self._entries[name] = _Entry(packed.owner, packed.input_ids, len(packed.llama_state))
        self._trim()

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        with contextlib.suppress(OSError), os.scandir(self.folder) as files:
            for file in files:
                if file.name.endswith(_SUFFIX) and not file.name.startswith("."):
                    with contextlib.suppress(OSError):
                        yield file.name, file.stat()

    def _find(self, tokens: Sequence[int], owner: str | None) -> str | None:
        self._look()
        wanted = np.array(tokens, np.intc)
        best, longest = None, 0
        for name, entry in self._entries.items():
            n = _common(entry.tokens, wanted) if entry and owner in (None, entry.owner) else 0
            if n > longest:
                best, longest = name, n
        return best

    def _look(self) -> None:
        """Update the list of files, those of other processes included. Of a new file only the first part is read."""
        there = {name: status.st_size for name, status in self._files()}
        for name in [name for name in self._entries if name not in there]:
            del self._entries[name]
        for name, n_bytes in there.items():
            entry = self._entries.get(name)
            if name in self._entries and (entry is None or entry.n_bytes == n_bytes):
                continue
            try:
                with sessions.open_file(self.folder / name, note_only=True) as session:
                    note = sessions.note_of(session)
                self._entries[name] = _Entry(sessions.owner_name(note["owner"]), np.array(note["tokens"], np.intc), n_bytes)
            except GearError:  # damaged, or of another version: it is ignored, and removed when it is the oldest
                self._entries[name] = None

    def _trim(self) -> None:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        excess = sum(status.st_size for _, status in files) - self.capacity_bytes
        for name, status in files:
            if excess <= 0:
                return
            self._remove(name)
            excess -= status.st_size

    def _remove(self, name: str) -> None:
        self._entries.pop(name, None)
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()
