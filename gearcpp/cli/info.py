"""`gearcpp info` and `gearcpp plugin-path`: what is installed, what works here, what the presets cost."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gearcpp.cli import _options as options
from gearcpp.cli import app
from gearcpp.cli._console import mib
from gearcpp.config import PRESETS
from gearcpp.errors import AbiError

HEAD_SIZES = (64, 128)
CUDA_HINT = 'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir llama-cpp-python'


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    model: Annotated[Path | None, typer.Option("-m", "--model", metavar="FILE", help="Say what becomes of this model's layers, too.")] = None,
    kv: options.KvType = "gear",
    ctx_size: options.CtxSize = None,
    swa_full: options.SwaFull = False,
) -> None:
    """Versions, plugin, SIMD level, devices, and the presets with their bits per element; with -m what the layers of a model become."""
    facts = collect()
    if model:
        facts["model"] = model_facts(model, kv, ctx_size, swa_full=swa_full)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


@app.command("plugin-path")
def plugin_path() -> None:
    """Print the plugin's path, for GGML_BACKEND_PATH and unmodified llama.cpp programs."""
    from gearcpp import native

    typer.echo(native.library_path())


def collect() -> dict[str, Any]:
    """All that `info` knows, as JSON can hold it.

    Raises:
        AbiError: the native library or llama-cpp-python is missing.
    """
    import llama_cpp

    from gearcpp import __version__, native

    devices = ggml_devices()
    return {
        "gearcpp": __version__,
        "python": sys.version.split()[0],
        "llama_cpp_python": llama_cpp.__version__,
        **_abi_proof(),
        "plugin": str(native.library_path()),
        "simd": {"current": native.simd_level(), "available": native.simd_levels()},
        "devices": devices,
        "cuda": (cuda := any(device["name"].startswith("CUDA") for device in devices)),
        "cuda_kernels": _cuda_kernels(cuda),
        "presets": {name: {"config": config.to_dict(), "bits_per_element": _bits(config)} for name, config in PRESETS.items()},
    }


def model_facts(path: Path, kv: str, n_ctx: int | None, *, swa_full: bool = False) -> dict[str, Any]:
    """What llama.cpp will allocate for a model and what its layers become, told from its metadata.

    Args:
        path: GGUF file.
        kv: name of a ``kv_type``.
        n_ctx: context, 0: what the model was trained for; None: that, but at most what chat takes.
        swa_full: sliding windows get as many cells as that.

    Raises:
        DataError, ConfigError, UnsupportedError: of the file, the name, or the family.
    """
    from gearcpp.cache import allocation as a
    from gearcpp.cache.kv_type import normalize_kv_type
    from gearcpp.cli._model import default_ctx
    from gearcpp.model_info import read_model_info

    found, kv_type = read_model_info(path), normalize_kv_type(kv)
    if kv_type.gear:
        found.check_gear()
    context = default_ctx(found.n_ctx_train, n_ctx)
    allocation = a.Allocation(context, min(a.default_ubatch(found, swa_full=swa_full), context), swa_full=swa_full)
    sides = a.allocated(kv_type, found, allocation)
    groups = a.group_layers([(side.il, side.kind, side.n_bytes) for side in sides], found, allocation)
    return {
        "path": str(path),
        "architecture": found.arch,
        "kv_type": kv_type.name,
        "n_ctx": context,
        "bytes": sum(side.n_bytes for side in sides),
        "bytes_f16": sum(side.f16_bytes for side in sides),
        "state_bytes": a.state_bytes(found, allocation),
        "summary": a.describe(groups),
        "groups": [group.to_dict() for group in groups],
    }


def _abi_proof() -> dict[str, Any]:
    """Whether this ggml is laid out as the plugin expects, and why not."""
    from gearcpp import native

    try:
        versions = native.versions()
    except AbiError as error:
        return {"ggml": "unknown", "ggml_commit": "unknown", "abi": {"passed": False, "reason": str(error)}}
    return {"ggml": versions["ggml"], "ggml_commit": versions["ggml_commit"], "abi": {"passed": True, "reason": ""}}


def _cuda_kernels(has_device: bool) -> dict[str, Any]:
    """Whether gearcpp's own CUDA kernels are there. They are loaded, and so proved, only where llama.cpp has a CUDA device."""
    from gearcpp import native

    library = native.library_path()
    is_built = library.with_name(library.name.replace("libgearcpp", "libgearcpp-cuda")).exists()
    problem = native.text(native.lib.gear_cuda_problem()) if has_device else ""
    return {"built": is_built, "problem": problem}


def _cuda_line(kernels: dict[str, Any]) -> str:
    if kernels["problem"]:
        return f"cannot be used: {kernels['problem']}"
    if not kernels["built"]:
        return "not built: there was no nvcc when gearcpp was installed; to get them: install gearcpp where nvcc (11.8 or later) is on PATH"
    return "built; not proven on a GPU yet, so the cache stays on the CPU unless GEARCPP_CUDA=1 (docs/cuda.md)"


def _bits(config: Any) -> dict[str, dict[str, float]]:
    """Bits per element of a packed tile by head size: K, V and their mean, everything in the tile counted."""
    from gearcpp import native

    bits = {}
    for d_head in HEAD_SIZES:
        k, v = (native.bits_per_element(config, side, d_head) for side in ("k", "v"))
        bits[str(d_head)] = {"k": k, "v": v, "mean": (k + v) / 2}
    return bits


def ggml_devices() -> list[dict[str, Any]]:
    """Name, description and memory of every device that llama.cpp sees."""
    from llama_cpp import llama_cpp

    ggml = llama_cpp._lib  # libllama depends on ggml: its handle finds ggml's functions, too
    device_get, name_of, describe, memory = (getattr(ggml, f"ggml_backend_dev_{name}") for name in ("get", "name", "description", "memory"))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    device_get.argtypes, device_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    for function in (name_of, describe):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    memory.argtypes, memory.restype = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)], None

    devices = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = device_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, free, total)
        devices.append({"name": name_of(device).decode(), "description": describe(device).decode(), "bytes_free": free.value, "bytes_total": total.value})
    return devices


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False)

    def line(name: str, value: str) -> None:
        console.print(f"{name:17} {value}", markup=False, soft_wrap=True)

    line("gearcpp", f"{facts['gearcpp']} (Python {facts['python']})")
    line("llama-cpp-python", f"{facts['llama_cpp_python']}, ggml {facts['ggml']} ({facts['ggml_commit']})")
    line("ABI proof", "passed" if facts["abi"]["passed"] else f"failed: {facts['abi']['reason']}")
    line("plugin", facts["plugin"])
    line("SIMD", f"{facts['simd']['current']} (available: {', '.join(facts['simd']['available'])})")
    for device in facts["devices"]:
        line("device", f"{device['name']}: {device['description']}, {device['bytes_total'] / 2**30:.1f} GiB")
    line("CUDA", "present" if facts["cuda"] else f"absent from this llama-cpp-python; to get it: {CUDA_HINT}")
    line("CUDA kernels", _cuda_line(facts["cuda_kernels"]))

    if model := facts.get("model"):
        line("model", f"{model['path']}: {model['architecture']}, {model['kv_type']}, context {model['n_ctx']}")
        states = f", recurrent states {mib(model['state_bytes'])}" if model["state_bytes"] else ""
        line("KV cache", f"{mib(model['bytes'])} (f16: {mib(model['bytes_f16'])}){states}")
        line("layers", model["summary"] or "none has a KV cache")

    presets = Table("preset", title="Bits per element of a packed tile (f16: 16)", title_justify="left", box=None, pad_edge=False)
    for d_head in HEAD_SIZES:
        for column in ("K", "V", "mean"):
            presets.add_column(f"{column} d={d_head}", justify="right")
    for name, preset in facts["presets"].items():
        presets.add_row(name, *(f"{preset['bits_per_element'][str(d_head)][column]:.3f}" for d_head in HEAD_SIZES for column in ("k", "v", "mean")))
    console.print()
    console.print(presets)
