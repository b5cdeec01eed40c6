"""GEAR in llama.cpps of other people's making, as they come: those that install in seconds, with the bundled model.

benchmarks/prebuilt_builds.py has the rest, and a real model. A build that cannot be installed here (no network, no node) is skipped with the reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
INTERFACE_2, INTERFACE_3, NODE = "xllamacpp==2026.9.11063", "xllamacpp==2026.10.11549", "node-llama-cpp==3.22.1"
TOO_OLD = "xllamacpp==2026.4.8672"  # ggml 0.9.11, whose buffers have fewer functions


@pytest.fixture(scope="module")
def builds() -> ModuleType:
    if not (BENCHMARKS / "prebuilt_builds.py").exists():
        pytest.skip("benchmarks/ is not here (it is in the repository)")
    sys.path.insert(0, str(BENCHMARKS))
    import prebuilt_builds

    return prebuilt_builds


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where builds are installed, once for all tests."""
    return tmp_path_factory.mktemp("builds")


@pytest.mark.parametrize(("build", "interface"), [(INTERFACE_2, "2"), (INTERFACE_3, "3"), (NODE, "2")])
def test_the_cache_of_a_prebuilt_llama_cpp_is_gear(build: str, interface: str, builds: ModuleType, work: Path, bundled_model: Path) -> None:
    options = argparse.Namespace(model=bundled_model, threads=1)
    row = builds.examine(build, options, work, builds.texts_of(4000))
    if row.verdict == "not run":
        pytest.skip(f"{build}: {row.reason}")
    assert row.verdict == "ran", row.reason
    assert row.interface == interface
    assert row.cache.startswith("12 of 12 tensors")
    agrees, length = (int(word) for word in row.text.split(" characters")[0].split(" of "))
    assert agrees > length / 4, row.text  # a model of six million parameters soon comes to words that are as likely as others


def test_the_tables_of_the_readme_and_of_the_docs_agree(builds: ModuleType, tmp_path: Path) -> None:
    root = BENCHMARKS.parent
    long, short = (builds.between_marks((root / page).read_text()) for page in ("docs/unmodified-programs.md", "README.md"))
    rows = []
    for line in long.splitlines()[2:]:
        build, ggml, interface, verdict, cache, text = (cell.strip() for cell in line.strip("|").split("|"))
        verdict, _, reason = verdict.partition(": ")
        rows.append(builds.Row(build, verdict, ggml, interface, cache, text, reason))
    assert builds.table(rows) == long
    assert builds.short_table(rows) == short and len(short.splitlines()) > 4
    page = tmp_path / "page.md"
    page.write_text("before\n" + "".join(builds.MARKS) + "after\n")
    builds.write_between_marks(page, "table\n")
    assert page.read_text() == "before\n" + "table\n".join(builds.MARKS) + "after\n"
    page.write_text("no table\n")
    with pytest.raises(ValueError, match="has no lines"):
        builds.write_between_marks(page, "table\n")


# In one process: the first that asks has the plugin, the other is told so and goes on without.
TWO_LLAMA_CPPS = """
import sys
import llama_cpp, xllamacpp
import gearcpp, gearcpp.xllamacpp
model, first = sys.argv[1:]

def ask_llama_cpp():
    llm = gearcpp.Llama(model, n_ctx=64, n_threads=1, verbose=False)
    print("llama_cpp", llm.create_completion("The", max_tokens=1)["usage"]["completion_tokens"])

def ask_xllamacpp():
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port, params.warmup = model, 256, 1, 0, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(gearcpp.xllamacpp.use(params))
    usage = server.handle_completions({"prompt": "The", "n_predict": 1})["usage"]
    print("xllamacpp", usage["completion_tokens"], len(gearcpp.xllamacpp.kv_stats()["layers"]))

both = [ask_llama_cpp, ask_xllamacpp]
for ask in both if first == "llama_cpp" else both[::-1]:
    try:
        ask()
    except gearcpp.AbiError as error:
        print("refused:", error)
llm = llama_cpp.Llama(model, n_ctx=64, n_threads=1, verbose=False)
print("goes on", llm.create_completion("The", max_tokens=1)["usage"]["completion_tokens"])
"""


@pytest.mark.parametrize("first", ["llama_cpp", "xllamacpp"])
@pytest.mark.parametrize("build", [INTERFACE_2, INTERFACE_3])
def test_the_second_of_two_llama_cpps_in_a_process_is_refused(build: str, first: str, builds: ModuleType, work: Path, bundled_model: Path) -> None:
    installed = builds.Xllamacpp(build.split("==")[1], work, argparse.Namespace())
    try:
        installed.install()
    except builds.NotInstalledError as error:
        pytest.skip(f"{build}: {error}")
    status, stdout, stderr = builds.call(
        [sys.executable, "-c", TWO_LLAMA_CPPS, str(bundled_model), first], folder=work, environment={"PYTHONPATH": str(installed.folder)}
    )
    assert status == 0, stderr
    lines = stdout.splitlines()
    assert lines[0] == {"llama_cpp": "llama_cpp 1", "xllamacpp": "xllamacpp 1 12"}[first]
    assert lines[1].startswith("refused: ") and "two copies of ggml" in lines[1]
    assert lines[2] == "goes on 1"


REFUSED = """
import sys
import xllamacpp, gearcpp, gearcpp.xllamacpp
def parameters():
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port, params.warmup = sys.argv[1], 256, 1, 0, False
    params.cpuparams.n_threads = 1
    return params
try:
    gearcpp.xllamacpp.use(parameters())
except gearcpp.AbiError as error:
    print(error)
server = xllamacpp.Server(parameters())
print(server.handle_completions({"prompt": "The", "n_predict": 1})["usage"]["completion_tokens"])
"""


def test_a_ggml_that_is_too_old_goes_on_without_the_plugin(builds: ModuleType, work: Path, bundled_model: Path) -> None:
    installed = builds.Xllamacpp(TOO_OLD.split("==")[1], work, argparse.Namespace())
    try:
        installed.install()
    except builds.NotInstalledError as error:
        pytest.skip(f"{TOO_OLD}: {error}")
    command = [sys.executable, "-c", REFUSED, str(bundled_model)]
    status, stdout, stderr = builds.call(command, folder=work, environment={"PYTHONPATH": str(installed.folder)})
    assert status == 0, stderr
    message, n_tokens = stdout.splitlines()
    assert "this ggml (version 0.9.11" in message and "gearcpp 0." in message and "Tested with ggml" in message
    assert n_tokens == "1"


# The context that llama.cpp's memory fit chooses for so much memory. The same device both times: with 16 bits its cache is plain f16.
FIT = """
import sys
import xllamacpp, gearcpp.xllamacpp as gear
model, bits = sys.argv[1], int(sys.argv[2])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port, params.warmup = model, 0, 1, 0, False
params.n_batch = params.n_ubatch = 128
params.cpuparams.n_threads = 1
params.fit_params, params.fit_params_min_ctx = True, 256
gear.use(params, {"bits_k": bits, "bits_v": bits})
free = next(device["memory_free"] for device in xllamacpp.get_device_info() if device["name"] == "GEAR0")
params.fit_params_target = [free - (10 << 20), *params.fit_params_target[1:]]
server = xllamacpp.Server(params)
print(gear.kv_stats()["layers"][0]["n_cell"], gear.kv_stats()["total"]["bytes"])
"""


@pytest.mark.parametrize("build", [INTERFACE_2, INTERFACE_3])
def test_a_longer_context_fits_into_the_same_memory(build: str, builds: ModuleType, work: Path, bundled_model: Path) -> None:
    installed = builds.Xllamacpp(build.split("==")[1], work, argparse.Namespace())
    try:
        installed.install()
    except builds.NotInstalledError as error:
        pytest.skip(f"{build}: {error}")
    seen = {}
    for bits in (16, 4):
        command = [sys.executable, "-c", FIT, str(bundled_model), str(bits)]
        status, stdout, stderr = builds.call(command, folder=work, environment={"PYTHONPATH": str(installed.folder)})
        assert status == 0, stderr
        seen[bits] = tuple(map(int, stdout.split()))
    (n_f16, bytes_f16), (n_gear, bytes_gear) = seen[16], seen[4]
    assert n_gear > 1.2 * n_f16
    assert bytes_gear < 10 << 20 and bytes_f16 < 10 << 20


def test_what_contradicts_gear_is_an_error_in_xllamacpp(builds: ModuleType, work: Path) -> None:
    installed = builds.Xllamacpp(INTERFACE_3.split("==")[1], work, argparse.Namespace())
    try:
        installed.install()
    except builds.NotInstalledError as error:
        pytest.skip(f"{INTERFACE_3}: {error}")
    source = """
import sys, xllamacpp, gearcpp, gearcpp.xllamacpp as gear
assert "llama_cpp" not in sys.modules
def refused(**settings):
    params = xllamacpp.CommonParams()
    kv_type = settings.pop("kv_type", "gear")
    for name, value in settings.items():
        setattr(params, name, value)
    try:
        gear.use(params, kv_type)
    except gearcpp.ConfigError as error:
        print(error)
refused(kv_type="q8_0")
refused(cache_type_k=xllamacpp.ggml_type.GGML_TYPE_Q8_0)
refused(no_kv_offload=True)
gear.use(xllamacpp.CommonParams(), "gear")
gear.use(xllamacpp.CommonParams(), "gear4")
refused(kv_type="gear2")
try:
    gear.use(None)
except gearcpp.ConfigError as error:
    print(error)
assert "llama_cpp" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", source], env={"PYTHONPATH": str(installed.folder)}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kind, type_k, offload, other, params = result.stdout.splitlines()
    assert "is not a cache of the plugin's" in kind
    assert "cache_type_k must stay at f16" in type_k
    assert "no_kv_offload must stay False" in offload
    assert "has kv_type 'gear' already" in other
    assert "must be an xllamacpp.CommonParams, not NoneType" in params
