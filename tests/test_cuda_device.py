"""The device over ggml's CUDA, without a GPU: its kernels run on the CPU (native/tests/cuda_on_cpu.h), on GPUs that ggml's CPU plays
(native/tests/cuda_emulated.cpp).

What touches the memory of another GPU than it should is a fault there as on real ones.

What this cannot show: what runs at the same time, ggml-cuda's own graphs. benchmarks/cuda_gpu.sh runs those on a GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from models import Shape

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "native/tests/cuda_emulated.cpp"

# One process for each: the library is loaded once, and what it is depends on the environment.
RUN = """
import json, sys
import numpy as np
import gearcpp
arguments = json.loads(sys.argv[1])
config = gearcpp.GearConfig(tile=64, n_tail=32, n_sink=2, feedback_k=arguments.get("feedback", "auto"))
sizes = {"n_ctx": 512, "n_batch": 128, "n_ubatch": 64}
llm = gearcpp.Llama(arguments["model"], kv_type=config, **sizes, logits_all=True, verbose=True, n_threads=1, seed=1, **arguments.get("placement", {}))
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

# Scripts of tests/test_cache_operations.py: the K-shift, copies between streams, states of a context and of one sequence.
SCRIPTS = """
import json, sys
arguments = json.loads(sys.argv[1])
sys.path.insert(0, arguments["tests"])
import functools
from pathlib import Path
import gearcpp
import numpy as np
import test_cache_operations as operations
gearcpp.model_params = functools.partial(gearcpp.model_params, **arguments.get("placement", {}))
seen = {}
packed = operations.PACKED.replace(rotate_k=True, feedback_k=False)
for name, memory in arguments["scripts"]:
    driver = operations.run_script(Path(arguments["model"]), packed, getattr(operations, name), 7, **operations.MEMORIES[memory][2])
    assert driver.most_packed > 0
    seen[name + ", " + memory] = np.array(driver.logits)
np.savez(arguments["out"], **seen)
"""

# Two contexts of one model by turns, one of them cleared on the way; then each alone.
CONTEXTS = """
import json, sys
arguments = json.loads(sys.argv[1])
sys.path.insert(0, arguments["tests"])
import llama_cpp
import numpy as np
import test_cache_operations as operations

def step(driver, random):
    driver.step({s: operations.text(random, int(random.integers(1, 40))) for s in (0, 1)})

def use(driver, contexts):
    contexts = {name: {"context": None, "ends": {}, "logits": [], "random": np.random.default_rng(seed)} for name, seed in contexts}
    for turn in range(12):
        for name, c in contexts.items():
            if not c["context"]:
                c["context"] = llama_cpp.llama_init_from_model(driver.model, driver._context_params)
            kept = driver.context, driver.ends, driver.logits
            driver.context, driver.ends, driver.logits = c["context"], c["ends"], c["logits"]
            if turn == 6 and name == "b":
                driver.clear(True)
            step(driver, c["random"])
            c["ends"] = driver.ends
            driver.context, driver.ends, driver.logits = kept
    for c in contexts.values():
        llama_cpp.llama_free(c["context"])
    return {name: np.array(c["logits"]) for name, c in contexts.items()}

with operations.CacheDriver(arguments["model"], operations.PACKED.replace(rotate_k=True)) as driver:
    together = use(driver, [("a", 1), ("b", 2)])
    alone = {**use(driver, [("a", 1)]), **use(driver, [("b", 2)])}
np.savez(arguments["out"], **{name + " together": x for name, x in together.items()}, **{name + " alone": x for name, x in alone.items()})
"""

# What a program that loads the plugin by GGML_BACKEND_PATH finds.
REGISTRY = """
import ctypes, os
import llama_cpp
from gearcpp import native
native.open_ggml()
ggml = llama_cpp.llama_cpp._lib
for name in ("ggml_backend_load", "ggml_backend_reg_dev_get", "ggml_backend_dev_name", "ggml_backend_dev_description", "ggml_backend_dev_by_name",
             "ggml_backend_dev_backend_reg", "ggml_backend_reg_get_proc_address"):
    getattr(ggml, name).restype = ctypes.c_char_p if name.endswith(("dev_name", "description")) else ctypes.c_void_p
ggml.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
library = ctypes.c_void_p(ggml.ggml_backend_load(str(native.library_path()).encode()))
devices = [ctypes.c_void_p(ggml.ggml_backend_reg_dev_get(library, ctypes.c_size_t(i))) for i in range(ggml.ggml_backend_reg_dev_count(library))]
print([ggml.ggml_backend_dev_name(device).decode() for device in devices])
print([bool(ggml.ggml_backend_dev_by_name(b"GEAR%d" % i)) for i in range(3)])
split = [ggml.ggml_backend_reg_get_proc_address(ctypes.c_void_p(ggml.ggml_backend_dev_backend_reg(d)), b"ggml_backend_split_buffer_type") for d in devices]
print(split)
"""

# A session that was saved on either device is loaded, saved again, and used.
SESSION = """
import json, sys
import numpy as np
import gearcpp
arguments = json.loads(sys.argv[1])
config = gearcpp.GearConfig(tile=64, n_tail=32, n_sink=2, feedback_k=False)  # GPUs go without
sizes = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64}
llm = gearcpp.Llama(arguments["model"], kv_type=config, **sizes, verbose=False, n_threads=1, seed=1, **arguments["placement"])
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

# Weights and caches cut up over GPUs: by rows the model is not loaded, by tensors the first step fails.
CUT_UP = """
import json, sys
import llama_cpp
import gearcpp
params, device = gearcpp.model_params(sys.argv[1], "gear")
params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_ROW
assert not llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_TENSOR
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
context = llama_cpp.llama_init_from_model(model, gearcpp.context_params("gear", n_ctx=512, n_threads=1))
batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(5), 1)
print(json.dumps([llama_cpp.llama_decode(context, batch), str(device.take_failure())]))
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
    """The last line that the script printed ("log": what llama.cpp logged), and the arrays that it left."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps({**arguments, "out": str(out)})],
        env={**os.environ, "GEARCPP_SMALL_CACHE": "store", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {**json.loads((printed or ["{}"])[-1]), "log": done.stderr}, dict(np.load(out))


def on_gpu(emulated: Path, sizes: str = "4000", *, order: str = "") -> dict[str, str]:
    """The environment of a machine with GPUs of so many MiB each, which is what llama.cpp splits layers by; order "fixed": sums of floats do not depend on
    how many kernels ran before, so that two runs can agree bit for bit."""
    return {"GEARCPP_CUDA": "1", "GEARCPP_CUDA_LIBRARY": str(emulated), "GEARCPP_EMULATED_GPUS": sizes, "GEARCPP_EMULATED_ORDER": order}


def caches(log: str) -> dict[str, float]:
    """MiB of the KV cache on each device."""
    return {name: float(size) for name, size in re.findall(r"llama_kv_cache: GEAR_(\w+)_\d+_KV KV buffer size = +([\d.]+) MiB", log)}


ON_CPU = {"GEARCPP_SIMD": "scalar", "GEARCPP_CUDA": "", "GEARCPP_CUDA_LIBRARY": ""}


def test_gives_what_the_cpu_gives(emulated: Path, bundled_model: Path, tmp_path: Path) -> None:
    arguments = {"model": str(bundled_model), "n_prompt": 200, "n_decode": 8}
    stats, cpu = run(ON_CPU, tmp_path / "cpu.npz", **arguments, feedback=False)
    cuda_stats, cuda = run(on_gpu(emulated), tmp_path / "cuda.npz", **arguments, feedback="auto")  # which GPUs go without
    for name in ("n_written", "n_packed", "n_exact"):
        assert cuda_stats[name] == stats[name]
    assert cuda_stats["n_packed"] > 0
    for name in ("score_error", "value_error"):
        assert 0 < stats[name] < 1
        assert cuda_stats[name] == pytest.approx(stats[name], rel=0.02)
    for name, wanted in cpu.items():
        spread = wanted.std()
        # Products of f16, and the model's activations rounded to 8 bits after them, which makes more of small differences.
        assert np.abs(cuda[name] - wanted).max() < 0.05 * spread
        assert np.sqrt(np.square(cuda[name] - wanted).mean()) < 0.02 * spread


def test_what_llama_cpp_does_with_a_cache_leaves_it_as_on_the_cpu(emulated: Path, random_model: Callable[..., Path], tmp_path: Path) -> None:
    scripts = [("shifts", "one stream"), ("shifts", "streams"), ("shared_prefix", "streams"), ("reload", "streams")]
    arguments = {"model": str(random_model("llama")), "tests": str(ROOT / "tests"), "scripts": scripts}
    _, cpu = run(ON_CPU, tmp_path / "cpu.npz", SCRIPTS, **arguments)
    _, cuda = run(on_gpu(emulated), tmp_path / "cuda.npz", SCRIPTS, **arguments)
    assert cpu.keys() == cuda.keys()
    for name, wanted in cpu.items():
        distance = np.abs(cuda[name] - wanted).max(1) / np.abs(wanted).max(1)
        print(name, distance.max())
        assert distance.max() < 0.05, name  # a fault is beyond 0.25 (test_cache_operations.py)


# GPUs, how layers are placed, and the share of the cache of the bundled model's six layers that each device has.
PLACEMENTS = {
    "two GPUs": ("1000,1000", {}, {"CUDA0": 4, "CUDA1": 2}),  # by memory; the output counts as a layer
    "three GPUs": ("1000,1000,1000", {}, {"CUDA0": 3, "CUDA1": 2, "CUDA2": 1}),
    "unequal": ("1000,1000", {"tensor_split": [1, 6]}, {"CUDA0": 1, "CUDA1": 5}),
    "nothing on the first": ("1000,1000", {"tensor_split": [0, 1]}, {"CUDA1": 6}),
    "main GPU": ("1000,1000", {"split_mode": 0, "main_gpu": 1}, {"CUDA1": 6}),
    "some on the CPU": ("1000,1000", {"n_gpu_layers": 4, "tensor_split": [1, 1]}, {"CPU": 3, "CUDA0": 2, "CUDA1": 1}),
}


def test_layers_over_several_gpus_give_what_one_gives(emulated: Path, bundled_model: Path, tmp_path: Path) -> None:
    arguments = {"model": str(bundled_model), "n_prompt": 200, "n_decode": 4}
    _, cpu = run(ON_CPU, tmp_path / "cpu.npz", **arguments)
    one_stats, one = run(on_gpu(emulated, order="fixed"), tmp_path / "one.npz", **arguments)
    for title, (sizes, placement, layers) in PLACEMENTS.items():
        stats, several = run(on_gpu(emulated, sizes, order="fixed"), tmp_path / "several.npz", placement=placement, **arguments)
        found = caches(stats["log"])
        assert {name: round(6 * size / sum(found.values())) for name, size in found.items()} == layers, title
        # llama.cpp begins a step's next part on the first GPU while others still compute: with four copies of what goes from one to the next.
        assert ("sched copies = 4" in stats["log"]) == (len(sizes.split(",")) > 1 and not placement.keys() & {"split_mode", "n_gpu_layers"}), title
        for name in ("n_written", "n_packed", "n_exact"):
            assert stats[name] == one_stats[name], title
        for name, wanted in one.items():
            if "CPU" in layers:  # where other kernels sum in another order
                assert np.abs(several[name] - cpu[name]).max() < 0.05 * cpu[name].std(), title
            else:
                assert np.array_equal(several[name], wanted), title


def test_what_llama_cpp_does_with_a_cache_on_two_gpus(emulated: Path, random_model: Callable[..., Path], tmp_path: Path) -> None:
    scripts = [("shifts", "one stream"), ("shared_prefix", "streams"), ("reload", "streams"), ("reset_and_reuse", "one stream")]
    arguments = {"model": str(random_model("llama", Shape(n_layer=3))), "tests": str(ROOT / "tests"), "scripts": scripts}
    _, one = run(on_gpu(emulated, order="fixed"), tmp_path / "one.npz", SCRIPTS, **arguments)
    two_gpus = on_gpu(emulated, "1000,1000", order="fixed")
    _, two = run(two_gpus, tmp_path / "two.npz", SCRIPTS, **arguments)
    assert one.keys() == two.keys()
    for name, wanted in one.items():
        assert np.array_equal(two[name], wanted), name
    arguments["scripts"] = [("shifts", "one stream"), ("reload", "streams")]
    _, partly = run(two_gpus, tmp_path / "partly.npz", SCRIPTS, placement={"n_gpu_layers": 3}, **arguments)
    for name, found in partly.items():
        distance = np.abs(found - one[name]).max(1) / np.abs(one[name]).max(1)
        assert 0 < distance.max() < 0.05, name  # one layer of three has other kernels


def test_two_contexts_of_one_model_know_nothing_of_each_other(emulated: Path, random_model: Callable[..., Path], tmp_path: Path) -> None:
    arguments = {"model": str(random_model("llama", Shape(n_layer=3))), "tests": str(ROOT / "tests")}
    _, seen = run(on_gpu(emulated, "1000,1000", order="fixed"), tmp_path / "seen.npz", CONTEXTS, **arguments)
    for name in ("a", "b"):
        assert len(seen[f"{name} alone"]) == 24
        assert np.array_equal(seen[f"{name} together"], seen[f"{name} alone"])


def test_sessions_move_between_devices(emulated: Path, bundled_model: Path, tmp_path: Path) -> None:
    def session(environment: dict[str, str], load: str, save: str, placement: dict[str, Any]) -> tuple[bytes, dict[str, Any], np.ndarray]:
        files = {"load": load and str(tmp_path / load), "save": str(tmp_path / save)}
        stats, arrays = run(environment, tmp_path / "out.npz", SESSION, model=str(bundled_model), placement=placement, **files)
        return (tmp_path / save).read_bytes(), stats, arrays["logits"]

    one, two = on_gpu(emulated), on_gpu(emulated, "1000,1000")
    places: list[tuple[dict[str, str], dict[str, Any]]] = [(ON_CPU, {}), (one, {}), (two, {}), (two, {"n_gpu_layers": 4})]
    for first, others in ((0, (1, 2, 3)), (1, (0,)), (2, (0, 1))):
        saved, stats, logits = session(places[first][0], "", "first", places[first][1])
        assert stats["n_packed"] > 0
        for second in others:
            again, other_stats, other_logits = session(places[second][0], "first", "second", places[second][1])
            assert again == saved  # tiles, rows and their order, to the bit
            for name in ("n_written", "n_packed", "n_exact"):
                assert other_stats[name] == stats[name]
            assert np.abs(other_logits - logits).max() < 0.05 * logits.std()


def test_mixed_up_devices_show(emulated: Path, bundled_model: Path, tmp_path: Path) -> None:
    """The second GPU's cache on the first one: the tests above would fail."""
    environment = {**on_gpu(emulated, "1000,1000"), "GEARCPP_EMULATED_MIXUP": "1"}
    with pytest.raises(AssertionError):
        run(environment, tmp_path / "out.npz", model=str(bundled_model), n_prompt=10, n_decode=1)
    environment["GEARCPP_EMULATED_GPUS"] = "1000"  # and nothing else was wrong with it
    run(environment, tmp_path / "out.npz", model=str(bundled_model), n_prompt=10, n_decode=1)


def test_a_program_finds_a_device_for_each_gpu(emulated: Path) -> None:
    environment = {**os.environ, **on_gpu(emulated, "1000,1000")}
    done = subprocess.run([sys.executable, "-c", REGISTRY], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names, found, split = done.stdout.splitlines()
    assert (names, found) == ("['GEAR0', 'GEAR1']", "[True, True, False]")
    assert split == "[None, None]"  # llama.cpp says then that weights cannot be split by rows


def test_what_is_not_covered_is_refused_with_a_reason(emulated: Path, bundled_model: Path) -> None:
    environment = {**os.environ, "GEARCPP_SMALL_CACHE": "store", **on_gpu(emulated)}
    done = subprocess.run([sys.executable, "-c", REFUSED, str(bundled_model)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a codec of the caller's" in done.stdout


@pytest.mark.skipif(not hasattr(llama_cpp, "LLAMA_SPLIT_MODE_TENSOR"), reason="this llama-cpp-python does not split by tensors")
def test_layers_cut_up_over_gpus_are_refused_with_a_reason(emulated: Path, bundled_model: Path) -> None:
    environment = {**os.environ, "GEARCPP_SMALL_CACHE": "store", **on_gpu(emulated, "1000,1000")}
    done = subprocess.run([sys.executable, "-c", CUT_UP, str(bundled_model)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "GEAR0 does not support split buffers" in done.stderr
    status, reason = json.loads(done.stdout.splitlines()[-1])
    assert status != 0
    assert "split by layers" in reason
    assert f"gearcpp: {reason}" in done.stderr


def test_missing_library_is_an_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    code = "from gearcpp import native; print(native.text(native.lib.gear_cuda_problem()))"
    environment = {**os.environ, "GEARCPP_CUDA_LIBRARY": str(tmp_path / "absent.so")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "nvcc" in done.stdout
