"""The CUDA wrapper without a GPU: its kernels run on the CPU (native/tests/cuda_on_cpu.h), and ggml's CPU plays the wrapped device.

What this cannot show: streams, events, ggml-cuda's own graphs. benchmarks/cuda_gpu.sh runs those on a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "native/tests/cuda_emulated.cpp"

# One process for each: the library is loaded once, and what it is depends on the environment.
RUN = """
import json, sys
import numpy as np
import gearcpp
arguments = json.loads(sys.argv[1])
config = gearcpp.GearConfig(tile=64, n_tail=32, n_sink=2)
llm = gearcpp.Llama(arguments["model"], kv_type=config, n_ctx=512, n_batch=64, n_ubatch=64, logits_all=True, verbose=False, n_threads=1, seed=1)
text = llm.tokenize(("The old man looked at the sea and said nothing for a long while. " * 30).encode())[: arguments["n_prompt"]]
llm.eval(text)
for token in text[: arguments["n_decode"]]:
    llm.eval([token])
scores = llm.scores[: llm.n_tokens].astype(np.float64)
stats = llm.kv_stats()["total"]
llm.reset()
llm._ctx.kv_cache_clear()
llm.eval(text[:70])
np.savez(arguments["out"], scores=scores, again=llm.scores[:70].astype(np.float64))
print(json.dumps(stats))
llm.close()
"""

# What the wrapper does not cover is an error with its reason, and the cache works again once it is cleared.
REFUSED = """
import sys
import gearcpp
llm = gearcpp.Llama(sys.argv[1], kv_type=gearcpp.GearConfig(tile=64, n_tail=32, n_sink=2), n_ctx=256, n_batch=64, n_ubatch=64, verbose=False, n_threads=1)
text = llm.tokenize(("The old man looked at the sea. " * 20).encode())[:150]

def refusal(what):
    try:
        what()
    except gearcpp.UnsupportedError as error:
        return str(error)
    raise AssertionError("not refused")

def clear():
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval(text[:100])

llm.eval(text)
assert "ROPE" in refusal(lambda: llm.shift_context(4, 40))
clear()
state = llm.save_state()
assert "restoring" in refusal(lambda: llm.load_state(state))
clear()
llm.close()
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not SOURCE.exists():
        pytest.skip("no C++ compiler (or no source tree) to build the kernels for the CPU with")
    library = tmp_path_factory.mktemp("cuda") / "libgearcpp-cuda-emulated.so"
    includes = [f"-I{ROOT / folder}" for folder in ("native", "native/include", "native/tests")]
    subprocess.run([compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", *includes, str(SOURCE), "-o", str(library)], check=True)
    return library


def run(environment: dict[str, str], out: Path, **arguments: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps({**arguments, "out": str(out)})],
        env={**os.environ, "GEARCPP_SMALL_CACHE": "store", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), dict(np.load(out))


def test_wrapper_gives_what_the_cpu_gives(emulated: Path, bundled_model: Path, tmp_path: Path) -> None:
    arguments = {"model": str(bundled_model), "n_prompt": 200, "n_decode": 8}
    stats, cpu = run({"GEARCPP_SIMD": "scalar"}, tmp_path / "cpu.npz", **arguments)
    cuda_stats, cuda = run({"GEARCPP_CUDA": "1", "GEARCPP_CUDA_LIBRARY": str(emulated)}, tmp_path / "cuda.npz", **arguments)
    for name in ("n_written", "n_packed", "n_exact"):
        assert cuda_stats[name] == stats[name]
    assert cuda_stats["n_packed"] > 0
    for name, wanted in cpu.items():
        spread = wanted.std()
        # Products of f16, and the model's activations rounded to 8 bits after them, which makes more of small differences.
        assert np.abs(cuda[name] - wanted).max() < 0.05 * spread
        assert np.sqrt(np.square(cuda[name] - wanted).mean()) < 0.02 * spread


def test_what_is_not_covered_is_refused_with_a_reason(emulated: Path, bundled_model: Path) -> None:
    environment = {**os.environ, "GEARCPP_SMALL_CACHE": "store", "GEARCPP_CUDA": "1", "GEARCPP_CUDA_LIBRARY": str(emulated)}
    done = subprocess.run([sys.executable, "-c", REFUSED, str(bundled_model)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_missing_library_is_an_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    code = "from gearcpp import _native; print(_native.text(_native.lib.gear_cuda_problem()))"
    environment = {**os.environ, "GEARCPP_CUDA_LIBRARY": str(tmp_path / "absent.so")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "nvcc" in done.stdout
