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

from gearcpp import AbiError, native

LIBRARIES = Path(os.environ.get("LLAMA_CPP_LIB_PATH", Path(llama_cpp.__file__).parent / "lib"))

OPEN = """
import ctypes, sys
import llama_cpp
from gearcpp import AbiError, native
stand_in = ctypes.CDLL(sys.argv[1])
try:
    native.check(native.lib.gear_open(native.ffi.cast("void *", stand_in._handle)))
except AbiError as error:
    print(error)
    native.open_ggml()  # the real one, afterwards, as ever
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


def test_another_place_of_the_device_in_a_buffer_type_is_refused(tmp_path: Path) -> None:
    """As after a table that grew by other members than those of interface 3."""
    message = refused(tmp_path, "void * ggml_backend_buft_get_device(void ** type) { return type[7]; }")
    assert "ggml_backend_buffer_type.device" in message


def test_a_table_of_the_other_interface_is_refused(tmp_path: Path) -> None:
    """Where ggml reads a buffer type of ours as interface 3 has it, but has none of its functions."""
    message = refused(tmp_path, "void * ggml_backend_buft_get_device(void ** type) { return type[8]; }")
    assert "ggml_backend_buffer_type_i" in message


TWO_COPIES = """
import ctypes, sys
import llama_cpp
from gearcpp import AbiError, native
ctypes.CDLL(sys.argv[1])
try:
    native.check(native.lib.gear_open(native.ffi.NULL))
except AbiError as error:
    print(error)
native.open_ggml()  # a handle says which one is meant
try:
    native.check(native.lib.gear_open(native.ffi.cast("void *", ctypes.CDLL(sys.argv[1])._handle)))
except AbiError as error:
    print(error)
native.check(native.lib.gear_open(native.ffi.NULL))
"""


def test_of_two_ggmls_the_one_that_is_named_is_taken(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    other = tmp_path / "another_name.so"
    (tmp_path / "other.c").write_text("void * ggml_init(void) { return 0; }")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(other), str(tmp_path / "other.c")], check=True)
    result = subprocess.run([sys.executable, "-c", TWO_COPIES, str(other)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    which, second = result.stdout.splitlines()
    assert "2 copies of ggml" in which and str(other) in which and "libggml" in which
    assert "gearcpp is bound to that of" in second and f"{other} asks with another" in second


# A program that loads plugins as GGML_BACKEND_PATH has it do, and goes on without those that it cannot use.
LOADS = """
import ctypes, sys
import llama_cpp
model, *plugins = sys.argv[1:]
ggml = llama_cpp.llama_cpp._lib
ggml.ggml_backend_load.restype = ctypes.c_void_p
print([bool(ggml.ggml_backend_load(plugin.encode())) for plugin in plugins])
ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
print(ggml.ggml_backend_dev_count())
llm = llama_cpp.Llama(model, n_ctx=64, n_threads=1, verbose=False)
print(llm.create_completion("The", max_tokens=1)["usage"]["completion_tokens"])
"""


def load(model: Path, *plugins: str | Path, **environment: str) -> tuple[list[str], str]:
    """What the program printed (which plugins were taken, how many devices there are, tokens written), and its stderr."""
    command = [sys.executable, "-c", LOADS, str(model), *map(str, plugins)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


def test_a_plugin_is_loaded_and_may_be_named_twice(bundled_model: Path) -> None:
    plugin = native.library_path()
    printed, _ = load(bundled_model, plugin, plugin)
    assert printed == ["[True, True]", "2", "1"]  # the CPU and GEAR0


def test_a_second_plugin_is_refused_with_a_reason(bundled_model: Path, tmp_path: Path) -> None:
    plugin = native.library_path()
    printed, errors = load(bundled_model, plugin, shutil.copy(plugin, tmp_path / "libgearcpp-copy.so"))
    assert printed == ["[True, False]", "2", "1"]
    assert "gearcpp: another gearcpp is loaded in this process already" in errors


def test_a_wrong_setting_is_refused_with_a_reason(bundled_model: Path) -> None:
    printed, errors = load(bundled_model, native.library_path(), GEARCPP_KV="bits_k=40")
    assert printed == ["[False]", "1", "1"]
    assert "gearcpp: bits" in errors


@pytest.mark.parametrize("damage", ["absent", "cut off", "another machine's", "two in one path", "text"])
def test_what_is_no_plugin_stops_no_program(damage: str, bundled_model: Path, tmp_path: Path) -> None:
    plugin, made = native.library_path(), tmp_path / "libgearcpp.so"
    data = plugin.read_bytes()
    if damage == "cut off":
        made.write_bytes(data[:50])  # further on, it is the system's loader that dies: `library_path` looks before that
    elif damage == "another machine's":
        if sys.platform != "linux":
            pytest.skip("changes the header of an ELF file")
        made.write_bytes(data[:18] + (0x15).to_bytes(2, "little") + data[20:])  # e_machine: PowerPC64
    elif damage == "text":
        made.write_text("no library")
    printed, _ = load(bundled_model, f"{plugin}:{plugin}" if damage == "two in one path" else made)
    assert printed == ["[False]", "1", "1"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_cut_off_library_is_found_out(share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plugin = native.library_path()
    data = plugin.read_bytes()
    (tmp_path / plugin.name).write_bytes(data[: int(len(data) * share)])
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(AbiError, match="is cut off; install gearcpp again"):
        native.library_path()
