"""A ggml that is not laid out as the plugin expects is refused with an error that says so, and the process goes on.

Stand-ins are small libraries, linked to the installed llama.cpp, that say one thing otherwise: what they define is found before what they depend on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

LIBRARIES = Path(os.environ.get("LLAMA_CPP_LIB_PATH", Path(llama_cpp.__file__).parent / "lib"))

OPEN = """
import ctypes, sys
import llama_cpp
from gearcpp import AbiError, _native
stand_in = ctypes.CDLL(sys.argv[1])
try:
    _native.check(_native.lib.gear_open(_native.ffi.cast("void *", stand_in._handle)))
except AbiError as error:
    print(error)
    _native.open_ggml()  # the real one, afterwards, as ever
    print("then opened")
"""


def refused(folder: Path, source: str, *, is_linked: bool = True) -> str:
    """What a process is told that opens a stand-in made of this C source."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    (folder / "stand_in.c").write_text(f"#include <stddef.h>\n{source}")
    linked = [f"-L{LIBRARIES}", "-Wl,--no-as-needed", "-lllama", f"-Wl,-rpath,{LIBRARIES}"] if is_linked else []
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "stand_in.so"), str(folder / "stand_in.c"), *linked]
    subprocess.run(command, check=True)
    result = subprocess.run([sys.executable, "-c", OPEN, str(folder / "stand_in.so")], capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "then opened"
    return lines[0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("size_t ggml_tensor_overhead(void) { return 400; }", "the size of ggml_tensor"),
        ('const char * ggml_op_name(int op) { return "OTHER"; }', "the op of a NONE node"),
        ('const char * ggml_type_name(int type) { return "other"; }', "there is no tensor type f32"),
        ("size_t ggml_nbytes(const void * tensor) { return 2047; }", "ggml_tensor.nb"),
        ('const char * ggml_get_name(const void * tensor) { return "cache_k_l0"; }', "ggml_tensor.name"),
        ("void * ggml_backend_dev_by_type(int type) { return NULL; }", "there is no CPU device"),
        ("void * ggml_backend_dev_backend_reg(void * device) { return NULL; }", "ggml_backend_device.reg"),
        ('const char * ggml_backend_buft_name(void * type) { return "other"; }', "ggml_backend_buffer_type_i.get_name"),
        ("size_t ggml_backend_buffer_get_size(void * buffer) { return 4095; }", "ggml_backend_buffer.size"),
        ("int ggml_graph_n_nodes(void * graph) { return 2; }", "ggml_cgraph"),
    ],
)
def test_another_layout_is_refused(source: str, reason: str, tmp_path: Path) -> None:
    message = refused(tmp_path, f'const char * ggml_version(void) {{ return "9.9.9"; }}\n{source}')
    assert reason in message
    assert "version 9.9.9" in message
    assert "Tested with ggml 0.15.3 to 0.26.0" in message


def test_a_library_without_ggml_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, "int nothing;", is_linked=False)
    assert "no usable ggml in this process" in message
    assert "ggml_init" in message


def test_a_ggml_that_lacks_functions_is_refused(tmp_path: Path) -> None:
    """As a release before those that have everything would be: the message names what is missing, after what to do."""
    message = refused(tmp_path, 'void * ggml_init(void) { return NULL; }\nconst char * ggml_version(void) { return "0.1.2"; }', is_linked=False)
    assert "this ggml (version 0.1.2) is not one that gearcpp" in message
    assert "Install a tested llama.cpp" in message
    assert "lacks ggml_commit, ggml_op_name" in message
