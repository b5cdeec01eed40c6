"""Where layers go, without a GPU: what llama.cpp would make of the shares is computed here as llama-model.cpp does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import Shape

from gearcpp import PRESETS, ConfigError, UnsupportedError, model_params, native
from gearcpp.cache.device import GearDevice
from gearcpp.cache.placement import Placement, choose_placement
from gearcpp.model_info import read_model_info

GPUS = ("CUDA0", "CUDA1", "CUDA2")


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "default_devices", lambda: GPUS)


def layers(placement: Placement, n_layer: int) -> list[str]:
    """The device of each layer and, last, of the output (llama_model_base::load_tensors)."""
    shares = np.array(placement.shares, np.float32)
    ends = (np.cumsum(shares, dtype=np.float32) / np.sum(shares, dtype=np.float32)).astype(np.float32)
    at = [np.float32(il) / np.float32(n_layer + 1) for il in range(n_layer + 1)]
    return [placement.devices[int(np.searchsorted(ends, x, side="right"))] for x in at]


def test_all_layers_are_on_gpus_unless_it_is_said() -> None:
    assert (
        choose_placement({}, 32)
        == choose_placement({"n_gpu_layers": -1}, 32)
        == choose_placement({"n_gpu_layers": 33}, 32)
        == choose_placement({"n_gpu_layers": 99}, 32)
        == Placement(GPUS)
    )
    assert choose_placement({"tensor_split": [3, 1]}, 32) == Placement(GPUS, (3.0, 1.0, 0.0))
    assert choose_placement({"tensor_split": [0, 0, 0]}, 32) == Placement(GPUS)  # as llama.cpp takes it
    assert choose_placement({"n_gpu_layers": 0}, 32).on_cpu


def test_one_gpu() -> None:
    assert choose_placement({"split_mode": 0}, 32) == Placement(("CUDA0",))
    assert choose_placement({"split_mode": 0, "main_gpu": 2, "tensor_split": [1, 0, 0]}, 32) == Placement(("CUDA2",))
    assert choose_placement({"split_mode": 1, "main_gpu": 2}, 32) == Placement(GPUS)


@pytest.mark.parametrize("n_layer", [1, 2, 6, 7, 28, 32, 61, 80, 126])
def test_layers_left_on_the_cpu_are_the_first_ones_and_exactly_as_many(n_layer: int) -> None:
    for n_gpu_layers in range(1, n_layer + 1):
        for split in (None, [1, 1, 1], [5, 1, 2.5], [0, 1, 0], [0.1, 0.7, 0.2]):
            devices = layers(choose_placement({"n_gpu_layers": n_gpu_layers, "tensor_split": split}, n_layer), n_layer)
            n_cpu = n_layer + 1 - n_gpu_layers
            assert devices[:n_cpu] == ["CPU"] * n_cpu
            assert "CPU" not in devices[n_cpu:]
            assert devices == sorted(devices)  # GPUs in their order
    for n_gpu_layers in range(1, n_layer + 1):
        devices = layers(choose_placement({"n_gpu_layers": n_gpu_layers, "split_mode": 0, "main_gpu": 1}, n_layer), n_layer)
        assert devices == ["CPU"] * (n_layer + 1 - n_gpu_layers) + ["CUDA1"] * n_gpu_layers


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"split_mode": 2}, "a layer and its cache are on one GPU"),
        ({"split_mode": 3}, "a layer and its cache are on one GPU"),
        ({"split_mode": 0, "main_gpu": 3}, "from 0 to 2"),
        ({"tensor_split": [1, 1, 1, 1]}, "each of the 3 GPUs"),
        ({"tensor_split": [1, -1]}, "0 or more"),
        ({"tensor_split": [1, float("nan")]}, "0 or more"),
        ({"n_gpu_layers": 2.5}, "whole number"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(given: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        choose_placement(given, 32)


def test_feedback_is_on_the_cpu(random_model: Callable[..., Path]) -> None:
    for kv_type in ("gear(feedback_k=True)", "gear(-1.feedback_k=True)"):
        with pytest.raises(UnsupportedError, match="feedback_k"):
            model_params(random_model(), kv_type)


def test_latent_attention_is_on_the_cpu(random_model: Callable[..., Path]) -> None:
    info = read_model_info(random_model("deepseek2", Shape(n_head_kv=1, d_head=96, d_head_v=64)))
    with pytest.raises(UnsupportedError, match=r"latent attention \(MLA\) .*; set n_gpu_layers=0"):
        GearDevice(info, PRESETS["gear"], placement=choose_placement({}, info.n_layer))
    GearDevice(info, PRESETS["gear"], placement=choose_placement({"n_gpu_layers": 0}, info.n_layer)).close()
