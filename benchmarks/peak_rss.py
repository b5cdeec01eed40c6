"""Peak memory of a process that fills a context, for every KV cache type.

    python benchmarks/peak_rss.py [--kv f16,q8_0,q4_0,gear4,gear3,gear2] [--ctx 32768] [--layers 4] [--sequences 16] [--threads N] [--json FILE]

The model has random weights and the KV heads of Llama-3-8B (8 of 128 channels), but few query heads and a narrow rest, so that the cache is nearly all
there is and filling it takes seconds. Several sequences share the context's cells, because what fills memory is cells written, whoever attends to them;
--sequences 1 fills it with one, at the cost of attention over the whole of it. Every type runs in a process of its own, which says how much memory it
ever had resident (VmHWM), before the context is made and after it is full.

Reserved but untouched memory does not count here: that is why the context has to be filled, and why the bytes that the cache itself reports stand beside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._logger import set_verbose

from gearcpp import context_params, model_params, normalize_kv_type
from gearcpp.cache import stats
from gearcpp.cli._markdown import markdown_table
from gearcpp.cli.bench._shapes import Shape, write_gguf
from gearcpp.model_info import read_model_info
from gearcpp.runtime.context import Batch

N_VOCAB = 256
N_UBATCH = 512


def peak_rss() -> int:
    """Bytes that this process ever had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def fill(model: Path, kv: str, n_ctx: int, n_sequence: int, n_threads: int) -> dict[str, Any]:
    """Fill a context in this process and say what it took."""
    set_verbose(False)
    kv_type = normalize_kv_type(kv)
    params, device = model_params(model, kv_type, n_ubatch=N_UBATCH)
    handle = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
    before = peak_rss()
    fields = {"n_ctx": n_ctx, "n_batch": N_UBATCH, "n_ubatch": N_UBATCH, "n_seq_max": n_sequence, "kv_unified": True}
    context = llama_cpp.llama_init_from_model(handle, context_params(kv_type, n_threads=n_threads, n_threads_batch=n_threads, **fields))
    if not context:
        raise SystemExit(f"{kv}: no context of {n_ctx} tokens: {device and device.take_failure()}")
    batch = Batch(N_UBATCH)
    random = np.random.default_rng(1)
    for sequence in range(n_sequence):
        for position in range(0, n_ctx // n_sequence, N_UBATCH):
            batch.clear()
            batch.add(sequence, position, random.integers(0, N_VOCAB, min(N_UBATCH, n_ctx // n_sequence - position)))
            if status := llama_cpp.llama_decode(context, batch.struct):
                raise SystemExit(f"{kv}: llama_decode failed with {status}: {device and device.take_failure()}")
    layers = stats.gear_layers(device.stats()) if device else stats.llama_layers(kv_type, read_model_info(model).layers, n_ctx, n_ctx)
    total = stats.summarize(kv_type, layers, device.scratch_bytes() if device else 0)["total"]
    return {"kv": kv, "peak_rss": peak_rss(), "peak_rss_before": before, **total}


def table(rows: list[dict[str, Any]]) -> str:
    """The figures in MiB."""

    def mib(n_bytes: float) -> str:
        return f"{n_bytes / 2**20:.1f}"

    f16 = next((row for row in rows if row["kv"] == "f16"), None)
    lines = [
        (
            row["kv"],
            mib(row["peak_rss"]),
            mib(row["peak_rss"] - row["peak_rss_before"]),
            f"{(row['peak_rss'] - row['peak_rss_before']) / (f16['peak_rss'] - f16['peak_rss_before']):.3f}" if f16 else "-",
            mib(row["bytes"]),
            f"{row['bits_per_element']:.3f}",
            f"{row['bits_per_element_all']:.3f}",
            mib(row["scratch_bytes"]),
        )
        for row in rows
    ]
    header = ("cache", "peak RSS", "of the context", "x f16", "cache bytes", "bits/element, tiles", "bits/element, all", "scratch")
    return markdown_table(header, lines)


def main() -> None:
    """Measure every type in a child process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kv", default="f16,q8_0,q4_0,gear4,gear3,gear2")
    parser.add_argument("--ctx", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "TYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(fill(Path(options.child[0]), options.child[1], options.ctx, options.sequences, options.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        write_gguf(model, "peak_rss", Shape("llama", options.layers, 256, 256, 8, 8, 128, N_VOCAB, 131072, 5e5, tied=True))
        rows = []
        for kv in options.kv.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--child", str(model), kv]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(child.stdout))
    if options.json:
        options.json.write_text(json.dumps({"options": {**vars(options), "json": str(options.json)}, "rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
