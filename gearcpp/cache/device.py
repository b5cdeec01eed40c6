"""A GEAR device: llama.cpp puts a model's layers on its ggml devices, and GEAR then holds their KV cache. One ggml device, or one for each GPU.

`gearcpp.Llama` makes one by itself; those who use llama.cpp's low-level API get theirs from `gearcpp.model_params`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from .. import native
from ..config import GearConfig
from ..errors import CodecError, GearError, UnsupportedError, from_status
from ..model_info import KVLayer, ModelInfo
from .placement import Placement
from .python_codec import Codec, CountedCodec

_PACKED, _USED_OTHERWISE = 0, 2  # gear_store_stats.kind


class GearDevice:
    """One native device. It must outlive every model and context that was made with it; close it after them.

    Args:
        info: the model's metadata, which hold the head table.
        config: how the cache is coded.
        n_ubatch: most tokens of one step (llama.cpp's n_ubatch).
        codec: a codec in Python instead of the native one.
        placement: which devices of ggml's the layers go to; None: all to the CPU.

    Attributes:
        codec: the codec in Python with its count of bytes; None: the native one.

    Raises:
        UnsupportedError: the model's family or all of its heads cannot have a GEAR cache.
        ConfigError, AbiError, OutOfMemoryError: as the native library says.
    """

    def __init__(
        self, info: ModelInfo, config: GearConfig, *, n_ubatch: int = 512, codec: Codec | None = None, placement: Placement | None = None
    ) -> None:
        self._device = native.ffi.NULL
        self._placement = placement or Placement()
        info.check_gear()
        config.check_layers(info.n_layer, [layer.il for layer in info.layers])
        _check_heads(info, config)
        if info.is_latent and not self._placement.on_cpu:
            raise UnsupportedError(
                f"{info.path.name}: latent attention (MLA) keeps a GEAR cache on the CPU only so far; set n_gpu_layers=0, or use kv_type='f16'"
            )
        if not self._placement.on_cpu and any(config.of_layer(layer.il, info.n_layer).feedback_k not in (False, "auto") for layer in info.layers):
            raise UnsupportedError("feedback_k is for a cache on the CPU so far: set n_gpu_layers=0, or leave feedback_k out")
        native.open_ggml()
        self._codec_failure: BaseException | None = None
        self._layers = native.ffi.new("gear_layer[]", [(layer.il, layer.n_head_kv, layer.d_head_k, layer.d_head_v) for layer in info.layers])
        self.codec = CountedCodec(codec) if codec else None
        self._callback = self._make_callback(self.codec) if self.codec else native.ffi.NULL
        params = native.ffi.new(
            "gear_device_params *",
            {
                "config": native.config_to_c(config)[0],
                "layers": self._layers,
                "n_layer": len(info.layers),
                "n_ubatch": n_ubatch,
                "device": (names := native.ffi.new("char[]", ",".join(self._placement.devices).encode())),
                "codec": self._callback,
                "exceptions": (exceptions := self._exceptions(info, config)),
                "n_exception": len(exceptions),
            },
        )
        self._device = native.lib.gear_device_new(params)
        if self._device == native.ffi.NULL:
            raise native.last_error()
        del names, exceptions  # which had to live until here
        # Both are what a llama_model_params points to.
        self._list = native.ffi.new("void *[]", [native.lib.gear_device_ggml(self._device, i) for i in range(len(self._placement.devices) + 1)])
        shares = self._placement.shares
        self._shares = (ctypes.c_float * llama_cpp.llama_max_devices())(*shares) if shares else None

    @property
    def handle(self) -> Any:
        """The ``gear_device *`` of the native library."""
        return self._device

    @property
    def on_cpu(self) -> bool:
        """Whether the whole cache is on the CPU."""
        return self._placement.on_cpu

    def attach(self, params: Any) -> None:
        """Make a llama_model_params put all layers on this device. The lists that it points to live as long as this object."""
        params.devices = int(native.ffi.cast("uintptr_t", self._list))
        arguments = self._placement.arguments
        params.n_gpu_layers, params.split_mode, params.main_gpu = arguments["n_gpu_layers"], arguments["split_mode"], arguments["main_gpu"]
        params.tensor_split = self._shares

    def take_failure(self) -> GearError | None:
        """The failure that made a llama.cpp call fail, or None; asking clears it. Ctrl-C within a codec in Python is raised as Ctrl-C."""
        if self._device == native.ffi.NULL:
            return None
        status = native.ffi.new("gear_status *")
        message = native.text(native.lib.gear_device_error(self._device, status))
        cause, self._codec_failure = self._codec_failure, None
        if status[0] == native.lib.GEAR_OK:
            return None
        if cause and not isinstance(cause, Exception):
            raise cause
        failure = CodecError(f"the codec failed: {cause!r}") if cause else from_status(status[0], message)
        failure.__cause__ = cause
        return failure

    def stats(self) -> list[dict[str, Any]]:
        """The fields of ``gear_store_stats`` for K and V of every layer of every live context on this device."""
        n = 0
        while True:
            stats = native.ffi.new("gear_store_stats[]", max(n, 1))
            count = native.lib.gear_device_stats(self._device, stats, n)
            if count < 0:
                raise native.last_error()
            if count <= n:
                return [native.struct_to_dict(stats[i]) for i in range(count)]
            n = count

    def other_use(self, il: int) -> str:
        """The operation that GEAR does not cover and llama.cpp uses on a layer's cache; "" for none."""
        return native.text(native.lib.gear_device_other_use(self._device, il))

    def scratch_bytes(self) -> int:
        """Memory of attention's and packing's scratch over all contexts of the device."""
        return int(native.lib.gear_device_scratch_bytes(self._device))

    def check_owns(self, layers: tuple[KVLayer, ...], *, is_hybrid: bool) -> None:
        """Raise UnsupportedError unless llama.cpp put the KV cache of these layers on this device.

        K and V of every layer, or K alone in latent attention, must be in its stores (in a hybrid model any layer may have no cache, but not all of
        them), and not all of them kept as f16 because llama.cpp uses them in operations that GEAR does not cover, or heads cannot be packed.
        """
        stores = self.stats()
        others = [store["il"] for store in stores if store["kind"] == _USED_OTHERWISE]
        if others and not any(store["kind"] == _PACKED for store in stores):
            operation = next(filter(None, map(self.other_use, others)), "")
            reason = f"llama.cpp uses {operation} on this model's KV cache" if operation else "no layer's heads can be packed"
            raise UnsupportedError(f"nothing of this model's KV cache could be compressed: {reason}; use kv_type='f16' for this model")
        owned = {(store["il"], store["side"]) for store in stores}
        sides = ((native.lib.GEAR_SIDE_K, "d_head_k"), (native.lib.GEAR_SIDE_V, "d_head_v"))
        absent = [layer for layer in layers if not {(layer.il, side) for side, d_head in sides if getattr(layer, d_head)} <= owned]
        lost = [layer for layer in absent if (layer.certain and not is_hybrid) or len(absent) == len(layers)]
        if lost:
            numbers = ", ".join(str(layer.il) for layer in lost)
            raise UnsupportedError(f"llama.cpp keeps the KV cache of layers {numbers} outside of GEAR; use kv_type='f16' for this model")

    def close(self) -> None:
        """Free the device. May be called twice."""
        if self._device != native.ffi.NULL:
            native.lib.gear_device_free(self._device)
            self._device = native.ffi.NULL

    @staticmethod
    def _exceptions(info: ModelInfo, config: GearConfig) -> Any:
        """The configurations of the layers that have one of their own, as the library wants them."""
        numbers = [il % info.n_layer for il, _ in config.layers]
        return native.ffi.new("gear_layer_config[]", [(il, native.config_to_c(config.of_layer(il, info.n_layer))[0]) for il in numbers])

    def _make_callback(self, codec: Codec) -> Any:
        ffi = native.ffi

        def array(pointer: Any, shape: tuple[int, ...], dtype: type) -> npt.NDArray[Any]:
            return np.frombuffer(ffi.buffer(pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)

        def keep(kind: Any, failure: BaseException, traceback: Any) -> float:
            self._codec_failure = self._codec_failure or failure
            return -1.0

        @ffi.callback("gear_codec_callback", error=-1.0, onerror=keep)  # type: ignore[untyped-decorator]
        def call(_: Any, il: int, side: int, head: int, n_token: int, d_head: int, x: Any, written: Any, cells: Any, xhat: Any) -> float:
            shape = (n_token, d_head)
            reconstruction, n_bytes = codec(
                il, "kv"[side], head, array(x, shape, np.float32), array(written, (n_token,), np.bool_), array(cells, (n_token,), np.int64)
            )
            array(xhat, shape, np.float32)[:] = np.asarray(reconstruction, np.float32)
            return float(n_bytes)

        return call


def _check_heads(info: ModelInfo, config: GearConfig) -> None:
    """Raise UnsupportedError when no layer's heads can be packed; a family with heads of several sizes keeps those that cannot as f16."""
    failures: list[UnsupportedError] = []
    own = {il % info.n_layer: il for il, _ in config.layers}
    kinds = {(config.of_layer(layer.il, info.n_layer), layer.d_head_k, layer.d_head_v, own.get(layer.il)) for layer in info.layers}
    for settings, d_head_k, d_head_v, il in kinds:
        try:
            native.check_heads(settings, d_head_k, d_head_v or d_head_k)
        except UnsupportedError as error:
            if il is not None:
                raise UnsupportedError(f"{info.path.name}: layer {il} cannot have the settings given for it: {error}") from None
            failures.append(error)
    if kinds and len(failures) == len(kinds):
        raise UnsupportedError(f"{info.path.name}: {failures[0]}; use kv_type='f16' for this model")
