"""Attention of one token over a deep cache, by head size: llama.cpp's flash attention on f16 against GEAR, one layer, no model.

    python benchmarks/head_sizes.py --depth 8192

Sizes take turns, round after round. All of them hold the same bytes and take the same products. Seconds are the processor's, not the clock's, so that what
else runs on the machine counts little. Of ggml the libraries that llama-cpp-python has loaded are called, with the node that llama.cpp makes.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import llama_cpp
import numpy as np

from gearcpp import PRESETS, native

F32, F16 = 0, 1  # ggml_type
ELEMENTS = 1024  # of a K row of all heads
N_SHARE = 4  # query heads of a KV head


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class FlashAttention:
    """FLASH_ATTN_EXT of one query on f16 K and V, as llama.cpp's graph has it."""

    def __init__(self, d_k: int, d_v: int, n_cell: int, random: np.random.Generator) -> None:
        self.ggml = ctypes.CDLL("llama.cpp", handle=llama_cpp.llama_cpp._lib._handle)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for name, result, arguments in (
            ("ggml_init", pointer, [_InitParams]),
            ("ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int, number, number, number, number]),
            ("ggml_permute", pointer, [pointer, pointer, *[ctypes.c_int] * 4]),
            ("ggml_flash_attn_ext", pointer, [*[pointer] * 5, *[ctypes.c_float] * 3]),
            ("ggml_new_graph", pointer, [pointer]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_get_data", pointer, [pointer]),
            ("ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
            ("ggml_free", None, [pointer]),
        ):
            function = getattr(self.ggml, name)
            function.restype, function.argtypes = result, arguments
        n_kv = ELEMENTS // d_k
        bytes_of_rows = 2 * n_cell * n_kv * (d_k + d_v)
        self.context = self.ggml.ggml_init(_InitParams(bytes_of_rows + (64 << 20), None, False))
        q = self._tensor(F32, (d_k, 1, N_SHARE * n_kv), random)
        k = self.ggml.ggml_permute(self.context, self._tensor(F16, (d_k, n_kv, n_cell), random), 0, 2, 1, 3)
        v = self.ggml.ggml_permute(self.context, self._tensor(F16, (d_v, n_kv, n_cell), random), 0, 2, 1, 3)
        mask = self._tensor(F16, (n_cell, 1, 1), None)
        node = self.ggml.ggml_flash_attn_ext(self.context, q, k, v, mask, d_k**-0.5, 0.0, 0.0)
        self.graph = self.ggml.ggml_new_graph(self.context)
        self.ggml.ggml_build_forward_expand(self.graph, node)

    def _tensor(self, kind: int, size: tuple[int, int, int], random: np.random.Generator | None) -> int:
        made: int = self.ggml.ggml_new_tensor_4d(self.context, kind, *size, 1)
        values = np.zeros(size, np.float32) if random is None else random.standard_normal(size, np.float32)
        data = values.astype(np.float16 if kind == F16 else np.float32)
        ctypes.memmove(self.ggml.ggml_get_data(made), data.ctypes.data, data.nbytes)
        return made

    def run(self) -> None:
        """Compute it with one thread."""
        if self.ggml.ggml_graph_compute_with_ctx(self.context, self.graph, 1) != 0:
            raise RuntimeError("ggml could not compute")


def gear(preset: str, d_k: int, d_v: int, n_cell: int, random: np.random.Generator) -> Callable[[], object]:
    """The same op on a cache that is packed as a whole."""
    n_kv = ELEMENTS // d_k
    cache = native.Cache(PRESETS[preset], n_head_kv=n_kv, d_head_k=d_k, d_head_v=d_v, n_cell=n_cell, n_ubatch=512)
    query = random.standard_normal((N_SHARE * n_kv, 1, d_k), np.float32)
    for first in range(0, n_cell, 512):
        for side, d in (("k", d_k), ("v", d_v)):
            cache.write(side, np.arange(first, first + 512), random.standard_normal((512, n_kv * d), np.float32))
        cache.attend(query, n_kv=first + 512, n_threads=1)
    for side in ("k", "v"):
        cache.flush(side)
    return lambda: cache.attend(query, n_threads=1)


def seconds_of(operation: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    operation()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=8192)
    parser.add_argument("--kv", default="gear")
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    random = np.random.default_rng(1)
    sizes = [(128, 128), (256, 256), (512, 512)]
    operations = {d: (FlashAttention(*d, given.depth, random).run, gear(given.kv, *d, given.depth, random)) for d in sizes}
    found: dict[tuple[tuple[int, int], int], list[float]] = {(d, which): [] for d in sizes for which in (0, 1)}
    for _ in range(given.rounds + 1):
        for d in sizes:
            for which, operation in enumerate(operations[d]):
                found[d, which].append(seconds_of(operation))
    print(f"{given.kv}, {native.simd_level()} kernels, {given.depth} cells, {N_SHARE} query heads a KV head, 1 thread\n")
    print("| heads | f16, ms | GEAR, ms | f16 / GEAR |\n| ---: | ---: | ---: | ---: |")
    for d in sizes:
        f16, packed = (statistics.median(found[d, which][1:]) for which in (0, 1))  # the first round warms up
        print(f"| {ELEMENTS // d[0]} of {d[0]} | {1e3 * f16:.2f} | {1e3 * packed:.2f} | {f16 / packed:.1f} |")


if __name__ == "__main__":
    main()
