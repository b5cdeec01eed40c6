"""Which of ggml's devices the layers of a model with a GEAR cache are on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llama_cpp

from .. import native
from ..errors import ConfigError

ARGUMENTS = ("n_gpu_layers", "split_mode", "main_gpu", "tensor_split")
CPU = "CPU"


@dataclass(frozen=True)
class Placement:
    """ggml's devices in llama.cpp's order, and each one's share of the layers; None: llama.cpp decides, by the memory that is free."""

    devices: tuple[str, ...] = (CPU,)
    shares: tuple[float, ...] | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether all layers are on the CPU."""
        return self.devices == (CPU,)

    @property
    def arguments(self) -> dict[str, Any]:
        """What llama_cpp.Llama is called with: all layers go to the devices listed."""
        shares = list(self.shares) if self.shares else None
        return {"n_gpu_layers": -1, "split_mode": llama_cpp.LLAMA_SPLIT_MODE_LAYER, "main_gpu": 0, "tensor_split": shares}


def choose_placement(given: Mapping[str, Any], n_layer: int) -> Placement:
    """Where the layers go, by llama.cpp's own arguments with llama.cpp's meaning.

    Layers that ``n_gpu_layers`` leaves on the CPU have a GEAR cache there: they are on a device of their own, which llama.cpp counts like a GPU.

    Args:
        given: the user's arguments, of which `ARGUMENTS` matter: n_gpu_layers (not given: all), split_mode (layers or none), main_gpu, tensor_split.
        n_layer: layers of the model.

    Raises:
        ConfigError: a value is out of range, or would split a layer.
        UnsupportedError: the GPUs cannot be used.
    """
    gpus = native.default_devices()
    n_gpu_layers = given.get("n_gpu_layers", -1)
    if gpus == (CPU,) or n_gpu_layers == 0:
        return Placement()
    if isinstance(n_gpu_layers, bool) or not isinstance(n_gpu_layers, int):
        raise ConfigError(f"n_gpu_layers must be a whole number, not {n_gpu_layers!r}")
    shares = _shares(given.get("tensor_split"), len(gpus))
    split_mode = given.get("split_mode", llama_cpp.LLAMA_SPLIT_MODE_LAYER)
    if split_mode == llama_cpp.LLAMA_SPLIT_MODE_NONE:
        main = given.get("main_gpu", 0)
        if not isinstance(main, int) or not 0 <= main < len(gpus):
            raise ConfigError(f"main_gpu={main!r}: the GPUs are numbered from 0 to {len(gpus) - 1}")
        gpus, shares = (gpus[main],), None
    elif split_mode != llama_cpp.LLAMA_SPLIT_MODE_LAYER:
        raise ConfigError(
            f"split_mode={split_mode!r} does not go with a GEAR cache (a layer and its cache are on one GPU); split by layers, or use kv_type='f16'"
        )
    n_cpu = n_layer + 1 - n_gpu_layers  # llama.cpp counts the output as one layer more
    if n_gpu_layers < 0 or n_cpu <= 0:
        return Placement(gpus, shares)
    shares = shares or (1.0,) * len(gpus)
    # Layer i goes to the first device whose end, the sum of shares up to it, is beyond i: half a layer away from i, no rounding matters.
    return Placement((CPU, *gpus), (n_cpu - 0.5, *((n_gpu_layers + 0.5) * share / sum(shares) for share in shares)))


def _shares(given: Any, n_gpu: int) -> tuple[float, ...] | None:
    if given is None:
        return None
    shares = tuple(float(share) for share in given)
    if len(shares) > n_gpu or not all(math.isfinite(share) and share >= 0 for share in shares):
        raise ConfigError(f"tensor_split={given!r}: each of the {n_gpu} GPUs has one share, which is 0 or more")
    if not any(shares):
        return None
    return shares + (0.0,) * (n_gpu - len(shares))
