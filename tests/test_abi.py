"""The plugin's own declaration of ggml's interface against the headers of a llama.cpp tree.

Set GEARCPP_LLAMA_CPP_SOURCE to such a tree (vendor/llama.cpp in the source distribution of llama-cpp-python). Without it there are no private headers to
compare with; the run-time proof, which every load goes through, is tested either way.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gearcpp import native

ROOT = Path(__file__).parent.parent


def test_run_time_proof_accepts_the_installed_ggml() -> None:
    native.open_ggml()
    assert native.ffi.string(native.lib.gear_ggml_version()).decode() != ""


def test_declarations_equal_the_headers() -> None:
    source = os.environ.get("GEARCPP_LLAMA_CPP_SOURCE")
    if not source:
        pytest.skip("GEARCPP_LLAMA_CPP_SOURCE names no llama.cpp tree")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")
    include = [ROOT / "native", ROOT / "native/include", Path(source) / "ggml/include", Path(source) / "ggml/src"]
    command = [compiler, "-std=c++17", "-fsyntax-only", *(f"-I{path}" for path in include), str(ROOT / "tests/abi/static_abi.cpp")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
