"""The CUDA wrapper without a GPU: its kernels run on the CPU (native/tests/cuda_on_cpu.h), and ggml's CPU plays the wrapped device.

What this cannot show: streams, events, ggml-cuda's own graphs. benchmarks/cuda_gpu.sh runs those on a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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

# Lives of tests/test_cache_life.py: the K-shift, copies between streams, states of a context and of one sequence.
LIVES = """
import json, sys
arguments = json.loads(sys.argv[1])
sys.path.insert(0, arguments["tests"])
from pathlib import Path
import numpy as np
import test_cache_life as lives
seen = {}
for name, memory in arguments["lives"]:
    life = lives.lead(Path(arguments["model"]), lives.PACKED, getattr(lives, name), 7, **lives.MEMORIES[memory][2])
    assert life.most_packed > 0
    seen[name + ", " + memory] = np.array(life.logits)
np.savez(arguments["out"], **seen)
"""

# A session that was saved on either device is loaded, saved again, and used.
SESSION = """
import json, sys
import numpy as np
import gearcpp
arguments = json.loads(sys.argv[1])
config = gearcpp.GearConfig(tile=64, n_tail=32, n_sink=2)
llm = gearcpp.Llama(arguments["model"], kv_type=config, n_ctx=512, n_batch=64, n_ubatch=64, verbose=False, n_threads=1, seed=1)
text = llm.tokenize(("The old man looked at the sea and said nothing for a long while. " * 30).encode())[:300]
if arguments["load"]:
    llm.eval(text[:150])  # what was there goes
    llm.load_session(arguments["load"])
else:
    llm.eval(text)
llm.save_session(arguments["save"])
before = llm.kv_stats()["total"]
llm.eval([text[5]])
logits = llm._ctx.get_logits_ith(-1)
np.savez(arguments["out"], logits=np.array(logits[: llm.n_vocab()]))
print(json.dumps(before))
llm.close()
"""

REFUSED = """
import sys
import gearcpp
for arguments in ({"codec": lambda il, side, head, x, written, cells: (x, x.nbytes)},):
    try:
        gearcpp.Llama(sys.argv[1], n_ctx=256, verbose=False, n_threads=1, **arguments)
    except gearcpp.UnsupportedError as error:
        print(error)
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


def run(environment: dict[str, str], out: Path, script: str = RUN, **arguments: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The last line that the script printed, and the arrays that it left."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps({**arguments, "out": str(out)})],
        env={**os.environ, "GEARCPP_SMALL_CACHE": "store", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((done.stdout.splitlines() or ["{}"])[-1]), dict(np.load(out))


def on_gpu(emulated: Path) -> dict[str, str]:
    return {"GEARCPP_CUDA": "1", "GEARCPP_CUDA_LIBRARY": str(emulated)}


ON_CPU = {"GEARCPP_SIMD": "scalar", "GEARCPP_CUDA": "", "GEARCPP_CUDA_LIBRARY": ""}


def test_wrapper_gives_what_the_cpu_gives(emulated: Path, bundled_model: Path, tmp_path: Path) -> None:
    arguments = {"model": str(bundled_model), "n_prompt": 200, "n_decode": 8}
    stats, cpu = run(ON_CPU, tmp_path / "cpu.npz", **arguments)
    cuda_stats, cuda = run(on_gpu(emulated), tmp_path / "cuda.npz", **arguments)
    for name in ("n_written", "n_packed", "n_exact"):
        assert cuda_stats[name] == stats[name]
    assert cuda_stats["n_packed"] > 0
    for name, wanted in cpu.items():
        spread = wanted.std()
        # Products of f16, and the model's activations rounded to 8 bits after them, which makes more of small differences.
        assert np.abs(cuda[name] - wanted).max() < 0.05 * spread
        assert np.sqrt(np.square(cuda[name] - wanted).mean()) < 0.02 * spread


def test_what_llama_cpp_does_with_a_cache_leaves_it_as_on_the_cpu(emulated: Path, random_model: Callable[..., Path], tmp_path: Path) -> None:
    lives = [("shifts", "one stream"), ("shifts", "streams"), ("shared_prefix", "streams"), ("reload", "streams")]
    arguments = {"model": str(random_model("llama")), "tests": str(ROOT / "tests"), "lives": lives}
    _, cpu = run(ON_CPU, tmp_path / "cpu.npz", LIVES, **arguments)
    _, cuda = run(on_gpu(emulated), tmp_path / "cuda.npz", LIVES, **arguments)
    assert cpu.keys() == cuda.keys()
    for name, wanted in cpu.items():
        distance = np.abs(cuda[name] - wanted).max(1) / np.abs(wanted).max(1)
        print(name, distance.max())
        assert distance.max() < 0.05, name  # a fault is beyond 0.25 (test_cache_life.py)


def test_sessions_move_between_devices(emulated: Path, bundled_model: Path, tmp_path: Path) -> None:
    def session(environment: dict[str, str], load: str, save: str) -> tuple[bytes, dict[str, Any], np.ndarray]:
        files = {"load": load and str(tmp_path / load), "save": str(tmp_path / save)}
        stats, arrays = run(environment, tmp_path / "out.npz", SESSION, model=str(bundled_model), **files)
        return (tmp_path / save).read_bytes(), stats, arrays["logits"]

    gpu = on_gpu(emulated)
    for first, second in ((ON_CPU, gpu), (gpu, ON_CPU)):
        saved, stats, logits = session(first, "", "first")
        again, other_stats, other_logits = session(second, "first", "second")
        assert again == saved  # tiles, rows and their order, to the bit
        assert stats["n_packed"] > 0
        for name in ("n_written", "n_packed", "n_exact"):
            assert other_stats[name] == stats[name]
        assert np.abs(other_logits - logits).max() < 0.05 * logits.std()


def test_what_is_not_covered_is_refused_with_a_reason(emulated: Path, bundled_model: Path) -> None:
    environment = {**os.environ, "GEARCPP_SMALL_CACHE": "store", **on_gpu(emulated)}
    done = subprocess.run([sys.executable, "-c", REFUSED, str(bundled_model)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a codec of the caller's" in done.stdout


def test_missing_library_is_an_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    code = "from gearcpp import _native; print(_native.text(_native.lib.gear_cuda_problem()))"
    environment = {**os.environ, "GEARCPP_CUDA_LIBRARY": str(tmp_path / "absent.so")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "nvcc" in done.stdout
