"""The native library itself: loading it, its errors, and what it says about the process and the machine.

``lib`` and ``ffi`` are cffi's (the declarations come from native/include/gearcpp.h at build time).
"""

from __future__ import annotations

import struct
import sys
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import AbiError, GearError, from_status

Side = Literal["k", "v"]
F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]
U8 = npt.NDArray[np.uint8]

_files = ExitStack()  # keeps a library that had to be unpacked from a zip until the process ends


def library_path() -> Path:
    """The native library, which is also the plugin for ``GGML_BACKEND_PATH``.

    Found through the import system, because an editable install keeps it apart from the Python sources.

    Raises:
        AbiError: it is not there, or cut off.
    """
    name = "libgearcpp.dylib" if sys.platform == "darwin" else "libgearcpp.so"
    for folder in (resources.files("gearcpp"), *map(Path, sys.modules["gearcpp"].__path__)):
        if (folder / name).is_file():
            path = _files.enter_context(resources.as_file(folder / name))
            if _is_cut_off(path):
                raise AbiError(f"the native library {path} is cut off; install gearcpp again: pip install --force-reinstall --no-deps gearcpp")
            return path
    raise AbiError(f"the native library {name} is missing from the gearcpp package; install it again: pip install --force-reinstall --no-deps gearcpp")


def _is_cut_off(path: Path) -> bool:
    """Whether a library lacks its end. Of an ELF file that is the table of sections: the system's loader, which does not look, would die of it."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return True
    if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return False
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, n = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + size * n


def _load() -> tuple[Any, Any]:
    try:
        from .._binding import ffi
    except ImportError as error:
        raise AbiError("gearcpp was not built (gearcpp/_binding.py is missing); install it with pip install .") from error
    path = library_path()
    try:
        return ffi, ffi.dlopen(str(path))
    except OSError as error:
        raise AbiError(f"the native library {path} cannot be loaded: {error}") from error


ffi, lib = _load()


def text(pointer: Any) -> str:
    """A C string as str."""
    return ffi.string(pointer).decode("utf-8", "replace")


def last_error() -> GearError:
    """The exception for this thread's last failed call."""
    return from_status(lib.gear_last_status(), text(lib.gear_last_error()))


def check(status: int) -> None:
    """Raise the exception that belongs to a gear_status, unless it is GEAR_OK."""
    if status != lib.GEAR_OK:
        raise last_error()


def open_ggml() -> None:
    """Bind the native library to the ggml that llama-cpp-python has loaded, and have it prove that ggml's structures are as it expects.

    The handle of libllama leads to exactly that ggml; loading any file of llama_cpp/lib by its path would load a second one.

    Raises:
        AbiError: llama-cpp-python is missing, or its ggml is laid out differently.
    """
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise AbiError(f"llama-cpp-python cannot be imported: {error}") from error
    check(lib.gear_open(ffi.cast("void *", llama_cpp._lib._handle)))


def default_devices() -> tuple[str, ...]:
    """ggml's devices that a GEAR cache is put on: the CPU, or all CUDA devices where GEARCPP_CUDA=1 asks for them. Opens ggml.

    Raises:
        UnsupportedError: the library of CUDA kernels that the environment names cannot be used.
    """
    open_ggml()
    names = text(lib.gear_default_devices())
    if not names:
        raise last_error()
    return tuple(names.split(","))


def versions() -> dict[str, str]:
    """Versions of everything that takes part: gearcpp's library, llama-cpp-python, ggml and its commit. Opens ggml."""
    import llama_cpp

    open_ggml()
    return {
        "gearcpp": text(lib.gear_version()),
        "llama_cpp_python": llama_cpp.__version__,
        "ggml": text(lib.gear_ggml_version()),
        "ggml_commit": text(lib.gear_ggml_commit()),
    }


def available_memory() -> int:
    """Bytes that new allocations can have without swapping."""
    return int(lib.gear_available_memory())


def simd_levels() -> list[str]:
    """Kernel levels that this machine can run, best first."""
    levels: list[str] = []
    while (name := lib.gear_simd_name(len(levels))) != ffi.NULL:
        levels.append(text(name))
    return levels


def simd_level() -> str:
    """The kernel level in use."""
    return text(lib.gear_simd_current())


def select_simd(name: str | None) -> None:
    """Use a kernel level by name for the whole process; None: the best. ConfigError when this machine cannot run it."""
    check(lib.gear_simd_select(name.encode() if name else ffi.NULL))


def side_number(side: Side) -> int:
    """The library's number of a side."""
    return {"k": lib.GEAR_SIDE_K, "v": lib.GEAR_SIDE_V}[side]


def struct_to_dict(struct: Any) -> dict[str, Any]:
    """The fields of a C struct by name; arrays become lists."""
    return {name: list(value) if isinstance(value := getattr(struct, name), ffi.CData) else value for name, _ in ffi.typeof(struct).fields}


def pointer(array: npt.NDArray[Any] | None, c_type: str) -> Any:
    """The address of an array's numbers as a C pointer; NULL for None."""
    return ffi.NULL if array is None else ffi.cast(c_type, array.ctypes.data)
