"""`gearcpp bench --op`: one layer's attention and packing without llama.cpp, and how near they come to the memory's speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gearcpp import native
from gearcpp.cache.kv_type import KVType
from gearcpp.cli._console import notice
from gearcpp.cli._markdown import markdown_table
from gearcpp.cli._model import default_threads
from gearcpp.cli.bench._report import as_csv, as_json, cpu_name
from gearcpp.cli.bench._shapes import Shape
from gearcpp.config import GearConfig
from gearcpp.errors import ConfigError
from gearcpp.model_info import read_model_info

_SIDES: tuple[Literal["k", "v"], ...] = ("k", "v")
_BANDWIDTH_BYTES = 2**30  # far beyond any cache
_LEAST_SECONDS = 0.3  # attention of a millisecond is measured often enough for its median to mean something


@dataclass(frozen=True)
class Heads:
    """Heads of a layer."""

    n_head: int
    n_head_kv: int
    d_head: int


@dataclass(frozen=True)
class Measurement:
    """One operation on one cache type.

    Attributes:
        op: "attend" (one query, every cell read), "attend exact" (the same while all cells are f16 rows) or "pack" (every tile encoded, K and V).
        n_cell: cells in the cache.
        seconds: median.
        n_bytes: touched: what attention reads of the cache, or the rows that packing reads and the tiles that it writes.
        bandwidth: bytes a second that this machine's memory gave just before, read from end to end by the same number of threads.
    """

    kv_type: str
    op: str
    n_cell: int
    n_threads: int
    simd: str
    seconds: float
    n_bytes: int
    bandwidth: float

    @property
    def rate(self) -> float:
        """Bytes touched a second."""
        return self.n_bytes / self.seconds


def heads_of(shape: Shape) -> Heads:
    """A shape's heads."""
    return Heads(shape.n_head, shape.n_head_kv, shape.d_head)


def heads_of_model(path: Path) -> Heads:
    """The heads of a model's first layer with a KV cache. ConfigError when it has none."""
    info = read_model_info(path)
    if not info.layers:
        raise ConfigError(f"{path.name} has no KV cache to measure")
    return Heads(info.n_head, info.layers[0].n_head_kv, info.layers[0].d_head_k)


def run(types: Sequence[KVType], heads: Heads, depths: Sequence[int], repetitions: int, n_threads: int | None) -> list[Measurement]:
    """Measure the GEAR types among `types` at every depth.

    Raises:
        ConfigError: there is no GEAR type, or no depth above 0.
    """
    chosen = [kv for kv in types if kv.gear]
    if not chosen or not any(depths):
        raise ConfigError("--op measures GEAR's own operations: give at least one preset with --kv and a depth with -d, such as -d 8192")
    threads = n_threads or default_threads()
    found = []
    for depth in sorted(depth for depth in set(depths) if depth):
        for kv in chosen:
            assert kv.gear
            notice(f"measuring {kv.name} at {depth} cells")
            bandwidth = memory_bandwidth(threads)  # each time anew: other machines on the same host may use it, too
            found += [
                Measurement(kv.name, op, depth, threads, native.simd_level(), seconds, n_bytes, bandwidth)
                for op, seconds, n_bytes in _measure(kv.gear, heads, depth, repetitions, threads)
            ]
    return found


def _measure(config: GearConfig, heads: Heads, n_cell: int, repetitions: int, n_threads: int) -> list[tuple[str, float, int]]:
    """(op, median seconds, bytes) of every operation."""
    random = np.random.default_rng(1)
    n_embd = heads.n_head_kv * heads.d_head
    rows = random.standard_normal((n_cell, n_embd), np.float32)  # [n_cell, n_embd]
    query = random.standard_normal((heads.n_head, 1, heads.d_head), np.float32)  # [n_head, 1, d_head]
    packing, exact_seconds, exact_bytes = [], 0.0, 0
    # A pool as large as the context keeps every row exact until flush, which thus packs everything at once and nothing else.
    with native.Cache(config, n_head_kv=heads.n_head_kv, d_head_k=heads.d_head, n_cell=n_cell, n_ubatch=n_cell) as cache:
        for repetition in range(repetitions):
            cache.clear()
            for side in _SIDES:
                cache.write(side, np.arange(n_cell), rows, n_threads)
            if repetition == 0:
                exact_seconds = _median_seconds(lambda: cache.attend(query, n_threads=n_threads), repetitions)
                exact_bytes = _bytes_read(cache, n_embd)
            start = time.perf_counter()
            for side in _SIDES:
                cache.flush(side, n_threads)
            packing.append(time.perf_counter() - start)
        packed_seconds = _median_seconds(lambda: cache.attend(query, n_threads=n_threads), repetitions)
        stats = [cache.stats(side) for side in _SIDES]
        packed_bytes = sum(2 * side["n_packed"] * n_embd + side["bytes_tiles_used"] for side in stats)
        return [
            ("attend exact", exact_seconds, exact_bytes),
            ("attend", packed_seconds, _bytes_read(cache, n_embd)),
            ("pack", statistics.median(packing), packed_bytes),
        ]


def _bytes_read(cache: native.Cache, n_embd: int) -> int:
    """What attention over all cells reads: the tiles in use and the exact f16 rows."""
    return sum(side["bytes_tiles_used"] + 2 * side["n_exact"] * n_embd for side in map(cache.stats, _SIDES))


def _median_seconds(operation: Callable[[], object], repetitions: int) -> float:
    operation()  # warm-up
    seconds: list[float] = []
    while len(seconds) < repetitions or sum(seconds) < _LEAST_SECONDS:
        start = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def memory_bandwidth(n_threads: int) -> float:
    """Bytes a second when `n_threads` threads each read their part of a GiB: the best of five passes.

    The largest element of a byte array is found with a few instructions for 64 bytes, so that memory is what limits it.
    """
    parts = np.array_split(np.zeros(_BANDWIDTH_BYTES, np.int8), n_threads)
    for part in parts:
        part.fill(1)  # untouched pages would all be one
    with ThreadPoolExecutor(n_threads) as pool:
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return _BANDWIDTH_BYTES / best


def report(found: Sequence[Measurement], heads: Heads, output: str) -> str:
    """The measurements as "md", "json" or "csv"."""
    records = [{"cpu": cpu_name(), **asdict(heads), **asdict(m), "bytes_per_second": m.rate, "bandwidth_share": m.rate / m.bandwidth} for m in found]
    if output != "md":
        return as_json(records) if output == "json" else as_csv(records)
    first = found[0]
    about = (
        f"{heads.n_head} query and {heads.n_head_kv} KV heads of {heads.d_head}, {first.n_threads} threads of {cpu_name()}, {first.simd} kernels, "
        f"memory read at {min(m.bandwidth for m in found) / 1e9:.1f} to {max(m.bandwidth for m in found) / 1e9:.1f} GB/s"
    )
    header = ["kv", "op", "cells", "ms", "MiB touched", "GB/s", "of memory"]
    lines = [
        [m.kv_type, m.op, str(m.n_cell), f"{m.seconds * 1e3:.3f}", f"{m.n_bytes / 2**20:.1f}", f"{m.rate / 1e9:.2f}", f"{m.rate / m.bandwidth:.0%}"]
        for m in found
    ]
    return f"{about}\n\n{markdown_table(header, lines)}\n"
