"""Allocations that fail inside of a process with llama.cpp: finding ggml, making a device, registering it, a model's cache, its first graph, and what
follows. Each allocation of libgearcpp's fails once: that is a GearError, nothing is left over, and the same call then succeeds.

    GEARCPP_ALLOCATION_STEP=1 pytest tests/test_out_of_memory.py        every allocation; by default every fourth (every one of the short operations)

The library that fails them is compiled and preloaded here (native/tests/fail_allocations.cpp). What llama.cpp allocates for itself is left alone;
`below` means what ggml allocates while it does something for libgearcpp. native/tests/test_out_of_memory.cpp drives the store and the codec.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "native/tests/fail_allocations.cpp"
STEP = os.environ.get("GEARCPP_ALLOCATION_STEP", "4")
SHORT = ["opening", "device", "registering", "statistics"]
OPERATIONS = [*SHORT, "construction", "first_graph", "prompt", "shift", "save", "load", "state"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not SOURCE.exists() or not sys.platform.startswith("linux"):
        pytest.skip("no C++ compiler, source tree or LD_PRELOAD to make allocations fail with")
    path = tmp_path_factory.mktemp("failing") / "libfail_allocations.so"
    subprocess.run([compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{SOURCE.parent}", str(SOURCE), "-o", str(path), "-ldl"], check=True)
    return path


def run(library: Path, operation: str, model: Path, *mode: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/out_of_memory_process.py"), operation, str(model), "--step", "1" if operation in SHORT else STEP, *mode],
        env={**os.environ, "LD_PRELOAD": str(library), "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert result["failed"] > 0
    assert all(error.startswith("OutOfMemoryError: ") for error in result["errors"]), result["errors"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_allocation(operation: str, library: Path, random_model: Callable[..., Path], tmp_path: Path) -> None:
    run(library, operation, _copy(random_model(), tmp_path))


@pytest.mark.parametrize("operation", ["device", "construction", "first_graph", "prompt"])
def test_an_allocation_and_all_that_follow(operation: str, library: Path, random_model: Callable[..., Path], tmp_path: Path) -> None:
    run(library, operation, _copy(random_model(), tmp_path), "--follow")


@pytest.mark.parametrize("operation", ["opening", "construction", "prompt"])
def test_an_allocation_of_ggml_for_libgearcpp(operation: str, library: Path, bundled_model: Path, tmp_path: Path) -> None:
    """With the bundled model, whose q8_0 weights make ggml want more work space for a prompt than for a token."""
    run(library, operation, _copy(bundled_model, tmp_path), "--below")


def _copy(model: Path, folder: Path) -> Path:
    """Sessions are saved beside it."""
    return Path(shutil.copy(model, folder))
