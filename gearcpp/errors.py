"""Every exception that gearcpp raises, and the one place where a native failure becomes one."""

from __future__ import annotations


class GearError(Exception):
    """Base of all gearcpp errors. The message says what was wrong and what to do."""


class ConfigError(GearError, ValueError):
    """An argument or a configuration that is out of range, unknown, or contradicts another one."""


class UnsupportedError(GearError):
    """A model, head size or operation that GEAR does not cover."""


class OutOfMemoryError(GearError, MemoryError):
    """The cache does not fit into memory."""


class AbiError(GearError, ImportError):
    """The installed llama-cpp-python does not look as this library expects, or the native library is missing."""


class DataError(GearError, ValueError):
    """Stored data (a model, a session, a state) are damaged, foreign, or of another model or configuration."""


class CodecError(GearError):
    """A codec given as a Python function failed."""


class ClosedError(GearError, RuntimeError):
    """The object was closed and cannot be used any more."""


class BusyError(GearError, RuntimeError):
    """Another answer took the place of this one: a `Llama` gives one at a time."""


# gear_status of native/include/gearcpp.h
_BY_STATUS: dict[int, type[GearError]] = {
    1: ConfigError,
    2: UnsupportedError,
    3: OutOfMemoryError,
    4: AbiError,
    5: DataError,
    6: CodecError,
}


def from_status(status: int, message: str) -> GearError:
    """The exception for a native status (not GEAR_OK) and its message."""
    return _BY_STATUS.get(status, GearError)(message or f"native call failed with status {status}")
