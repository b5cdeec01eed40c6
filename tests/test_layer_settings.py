"""Settings of single layers: how they are written, what becomes of them in the cache, in sessions and in the plugin, and what is wrong with others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import write_family
from models import N_VOCAB, Shape
from test_model_info import write_metadata

from gearcpp import ConfigError, DataError, GearConfig, Llama, UnsupportedError, native, read_model_info
from gearcpp.cache.allocation import Allocation, allocated
from gearcpp.cache.device import GearDevice
from gearcpp.cache.kv_type import normalize_kv_type

RandomModel = Callable[..., Path]
SMALL = GearConfig(tile=64, n_tail=32)
FINE = {"bits_k": 7, "bits_v": 6}


def load(path: Path, kv_type: Any, **arguments: Any) -> Llama:
    return Llama(str(path), kv_type=kv_type, n_ctx=1024, n_batch=64, n_ubatch=64, n_threads=1, verbose=False, **arguments)


def bits(llm: Llama) -> dict[tuple[int, str], float]:
    return {(layer["il"], layer["side"]): layer["bits_per_element"] for layer in llm.kv_stats()["layers"]}


def test_forms() -> None:
    expected = GearConfig(bits_k=3, layers={0: {"bits_k": 6}, -1: {"bits_k": 6, "center_v": False}})
    for form in (
        "gear(bits_k=3, 0.bits_k=6, -1.bits_k=6, -1.center_v=False)",
        {"bits_k": 3, "layers": {0: {"bits_k": 6}, -1: {"bits_k": 6, "center_v": False}}},
        expected.to_dict(),
        json.loads(json.dumps(expected.to_dict())),
        expected.replace(bits_v=4),
    ):
        assert normalize_kv_type(form).gear == expected
    name = normalize_kv_type(expected).name
    assert name == "gear(bits_k=3,-1.bits_k=6,-1.center_v=False,0.bits_k=6)"
    assert normalize_kv_type(name).gear == expected
    assert hash(expected) == hash(expected.replace())
    assert "layers" not in GearConfig().to_dict()  # as sessions of earlier releases have it
    assert GearConfig(layers={3: {}}) == GearConfig()
    assert expected.of_layer(3, 4) == GearConfig(bits_k=6, center_v=False)
    assert expected.of_layer(0, 4) == GearConfig(bits_k=6)
    assert expected.of_layer(1, 4) == GearConfig(bits_k=3)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({0: {"bits_k": 9}}, "layer 0: bits_k must be 2, 3, 4, 5, 6 or 7"),
        ({-2: {"bit_k": 4}}, "field of layer -2: 'bit_k' .did you mean 'bits_k'"),
        ({1: {"tile": 64}}, "layer 1: tile is the same for all layers"),
        ({1: {"layers": {}}}, "layer 1: layers is the same for all layers"),
        ({"first": {"bits_k": 4}}, "'first' is not the number of a layer"),
        ({True: {"bits_k": 4}}, "True is not the number of a layer"),
        ({0: 4}, "layer 0: its settings must be fields by name"),
        ({0: {"bits_k": 4}, "0": {"bits_v": 4}}, "layer 0 has settings of its own twice"),
        (7, "layers must be a mapping"),
        ({2: {"sparsity": 0.02}}, "layer 2: center_v must be False where there are outliers"),
    ],
)
def test_settings_that_cannot_be(layers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        normalize_kv_type({"layers": layers})


@pytest.mark.parametrize("text", ["gear(x.bits_k=4)", "gear(.bits_k=4)", "gear(1.5.bits_k=4)", "gear(0.=4)"])
def test_names_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match=r"number of a layer|field of layer"):
        normalize_kv_type(text)


def test_each_layer_is_coded_as_it_is_told(random_model: RandomModel, random: np.random.Generator) -> None:
    path = random_model("llama", Shape(n_layer=3))
    tokens = [1, *random.integers(3, N_VOCAB, 399).tolist()]
    config = SMALL.replace(bits_k=3, bits_v=3, layers={0: FINE, -1: {"bits_v": 16}})
    llm = load(path, config)
    llm.eval(tokens)
    expected = {(il, side): native.bits_per_element(config.of_layer(il, 3), side, 64) for il in range(3) for side in ("k", "v")}
    assert bits(llm) == expected
    assert len(set(expected.values())) > 3
    kinds = {(layer["il"], layer["side"]): layer["kind"] for layer in llm.kv_stats()["layers"]}
    assert kinds.pop((2, "v")) == "f16: asked for"
    assert set(kinds.values()) == {"gear"}
    assert all(layer["n_packed"] > 200 for layer in llm.kv_stats()["layers"] if layer["kind"] == "gear")
    sides = allocated(normalize_kv_type(config), read_model_info(path), Allocation(1024, 64))
    assert [(side.il, side.side, side.n_bytes) for side in sides] == [(x["il"], x["side"], x["bytes"]) for x in llm.kv_stats()["layers"]]
    llm.close()


def test_finer_layers_bring_the_logits_nearer(random_model: RandomModel, random: np.random.Generator) -> None:
    path, tokens = random_model("llama", Shape(n_layer=3)), [1, *random.integers(3, N_VOCAB, 399).tolist()]
    coarse = SMALL.replace(bits_k=2, bits_v=2)
    finals = []
    for kv_type in ("f16", coarse, coarse.replace(layers={0: FINE, 1: FINE}), coarse.replace(layers={0: FINE, 1: FINE, -1: FINE})):
        llm = load(path, kv_type, logits_all=True, flash_attn=True)
        llm.eval(tokens)
        finals.append(np.array(llm.scores[200:400]))
        llm.close()
    errors = [float(np.linalg.norm(one - finals[0])) for one in finals[1:]]
    assert errors[0] > 1.2 * errors[1] > 2 * errors[2] > 0


def test_sessions_carry_them(random_model: RandomModel, random: np.random.Generator, tmp_path: Path) -> None:
    path, tokens = random_model("llama", Shape(n_layer=3)), [1, *random.integers(3, N_VOCAB, 399).tolist()]
    config = SMALL.replace(layers={0: FINE, -1: {"bits_k": 2}})
    llm, other, plain = load(path, config), load(path, config), load(path, SMALL)
    llm.eval(tokens)
    llm.save_session(tmp_path / "session")
    other.load_session(tmp_path / "session")
    logits = []
    for each in (llm, other):
        each.eval([7])
        logits.append(np.array(each._ctx.get_logits()[: each.n_vocab()]))
    np.testing.assert_array_equal(*logits)
    with pytest.raises(DataError, match=r"saved with kv_type='gear\(.*0\.bits_k=7"):
        plain.load_session(tmp_path / "session")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({7: FINE}, "layer 7 has settings of its own, but the model has layers 0 to 1"),
        ({-3: FINE}, "layer -3 has settings of its own, but the model has layers 0 to 1"),
        ({1: FINE, -1: FINE}, "layer 1 is layer -1, too"),
    ],
)
def test_layers_that_do_not_exist(layers: Any, message: str, random_model: RandomModel) -> None:
    with pytest.raises(ConfigError, match=message):
        load(random_model(), SMALL.replace(layers=layers))


def test_layers_without_a_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer 0 has settings of its own, but no KV cache of its own; those that have one: 1"):
        load(write_family(tmp_path / "m.gguf", "granite-hybrid"), SMALL.replace(layers={0: FINE}))


def test_heads_that_cannot_take_them(tmp_path: Path) -> None:
    """Settings for a layer whose heads no settings pack: that layer is named, where without settings of its own it would stay f16."""
    sizes = {"attention__key_length": 1024, "attention__value_length": 1024, "attention__key_length_swa": 64, "attention__value_length_swa": 64}
    windows = {"attention__sliding_window": 512, "attention__sliding_window_pattern": [True, True, True, False]}
    info = read_model_info(write_metadata(tmp_path / "m.gguf", "gemma4", attention__head_count_kv=1, **sizes, **windows))
    GearDevice(info, SMALL.replace(layers={0: FINE})).close()
    with pytest.raises(UnsupportedError, match=r"m\.gguf: layer -1 cannot have the settings given for it: .*1024"):
        GearDevice(info, SMALL.replace(layers={-1: FINE}))


PLUGIN = """
import ctypes, json, os, sys
os.environ["GEARCPP_KV"] = sys.argv[2]
import llama_cpp
from gearcpp import native
ggml = llama_cpp.llama_cpp._lib
ggml.ggml_backend_load.restype, ggml.ggml_backend_load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
assert ggml.ggml_backend_load(str(native.library_path()).encode())
ggml.ggml_backend_dev_by_name.restype, ggml.ggml_backend_dev_by_name.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
params = llama_cpp.llama_model_default_params()
devices = (ctypes.c_void_p * 2)(ggml.ggml_backend_dev_by_name(b"GEAR0"), None)
params.devices, params.n_gpu_layers = ctypes.addressof(devices), 99
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
context = llama_cpp.llama_context_default_params()
context.n_ctx, context.n_batch, context.n_ubatch, context.flash_attn_type = 4096, 64, 64, 1
handle = llama_cpp.llama_init_from_model(model, context)
tokens = (ctypes.c_int32 * 3)(1, 5, 9)
status = llama_cpp.llama_decode(handle, llama_cpp.llama_batch_get_one(tokens, 3)) if handle else -1
device = native.lib.gear_plugin_device()
error = native.text(native.lib.gear_device_error(device, native.ffi.NULL))
stats = native.ffi.new("gear_store_stats[]", 16)
n = native.lib.gear_device_stats(device, stats, 16) if not status else 0
print(json.dumps([status, error, [[stats[i].il, stats[i].side, stats[i].bits_per_element] for i in range(n)]]))
"""


def plugin(path: Path, settings: str) -> tuple[int, str, list[list[float]]]:
    run = subprocess.run(
        [sys.executable, "-c", PLUGIN, path, settings], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert run.returncode == 0, run.stderr
    status, error, stores = json.loads(run.stdout.splitlines()[-1])
    return status, error, stores


def test_the_plugin_carries_them(random_model: RandomModel) -> None:
    """As to_text writes them; a layer beyond the last is found when the cache is first used."""
    config = SMALL.replace(bits_k=3, layers={1: FINE})
    status, error, stores = plugin(random_model(), config.to_text())
    assert (status, error) == (0, "")
    assert {(il, "kv"[side]): bits for il, side, bits in stores} == {
        (il, side): native.bits_per_element(config.of_layer(il, 2), side, 64) for il in range(2) for side in ("k", "v")
    }
    status, error, _ = plugin(random_model(), "tile=64,2.bits_k=6")
    assert status != 0
    assert "layer 2 has settings of its own, but the last layer of this model with a KV cache is 1" in error
    with pytest.raises(ConfigError, match=r"layer -1: .* count from 0"):
        GearConfig(layers={-1: FINE}).to_text()
