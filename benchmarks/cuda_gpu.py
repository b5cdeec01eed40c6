"""The parts of cuda_gpu.sh that are easier in Python: models of random weights, a ballast on the GPU, and the table.

cuda_gpu.py model FILE SHAPE                       write a GGUF of random weights (needs gguf and numpy)
cuda_gpu.py bench NAME JSONL MEMORY EXTRA TEXT     llama-batched-bench's lines with the cache's name and the peak memory, as JSON lines
cuda_gpu.py perplexity DEVICE LOG                  the perplexity that llama-perplexity's log ends with, as a JSON line
cuda_gpu.py agree RESULTS                          fail unless the perplexities on GEAR0 and CUDA0 agree
cuda_gpu.py ballast GIB                            take all memory of the GPU but so much, and keep it (needs torch)
cuda_gpu.py table RESULTS                          print what the stages have left in this file as one table
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
import types
from pathlib import Path
from typing import Any


def write_model(path: str, shape: str) -> None:
    """A model of random weights by the bench command's own code, loaded without the rest of gearcpp, which need not be installed."""
    for name in ("gearcpp", "gearcpp.cli", "gearcpp.cli._console", "gearcpp.errors"):
        sys.modules[name] = types.ModuleType(name)
    console, errors = sys.modules["gearcpp.cli._console"], sys.modules["gearcpp.errors"]
    console.mib = console.notice = str  # type: ignore[attr-defined]
    errors.ConfigError = errors.GearError = ValueError  # type: ignore[attr-defined]
    source = Path(__file__).parents[1] / "gearcpp/cli/bench/_shapes.py"
    spec = importlib.util.spec_from_file_location("shapes", source)
    assert spec and spec.loader
    shapes = sys.modules["shapes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    shapes.write_gguf(Path(path), shape, shapes.SHAPES[shape])
    print(f"{path}: {Path(path).stat().st_size / 2**30:.2f} GiB")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none when it is not there. Other lines are passed by."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("{"):
            lines.append(json.loads(line))
    return lines


def print_bench(name: str, jsonl: str, memory: str, extra: str, text: str) -> None:
    """One line for each of llama-batched-bench's, with the peak of the memory in use."""
    used = [int(line) for line in Path(memory).read_text().split() if line.isdigit()]
    model = next((Path(word).stem for word in text.split() if word.endswith(".gguf")), "")
    for line in read_lines(Path(jsonl)):
        print(json.dumps({"cache": name, "model": model, "peak_mib": max(used, default=0), **json.loads("{" + extra.rstrip(", ") + "}"), **line}))


def print_perplexity(device: str, log: str) -> None:
    """The last estimate in a log."""
    found = re.findall(r"Final estimate: PPL = ([0-9.]+)", Path(log).read_text())
    if not found:
        sys.exit(f"{device}: llama-perplexity did not come to its end")
    print(json.dumps({"what": "perplexity", "device": device, "ppl": float(found[-1])}))


def require_agreement(results: str) -> None:
    """A cache of 4 bits costs a trained model a few parts in a thousand, and on two GPUs the same as on one."""
    seen = {line["device"]: line["ppl"] for line in read_lines(Path(results)) if line["what"] == "perplexity"}
    ratio = seen["GEAR0"] / seen["CUDA0"]
    print(f"perplexity: f16 {seen['CUDA0']:.4f}, GEAR {seen['GEAR0']:.4f}, ratio {ratio:.4f}")
    if not 0.99 < ratio < 1.02:
        sys.exit("they do not agree: what follows measures something that is wrong")
    two = seen.get("GEAR0,GEAR1")
    if two and abs(two / seen["GEAR0"] - 1) > 1e-3:
        sys.exit(f"layers split over two GPUs give another perplexity, {two:.4f}")


def hold_ballast(gib: str) -> None:
    """Leave `gib` GiB of the GPU to others."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - int(float(gib) * 2**30)), dtype=torch.uint8, device="cuda")
    print(f"holding {ballast.numel() / 2**30:.1f} GiB", flush=True)
    while True:
        time.sleep(60)


def print_table(results: str) -> None:
    """Everything measured, as Markdown. What a stage did not leave is not there."""
    lines = read_lines(Path(results))

    def of(what: str) -> list[dict[str, Any]]:
        return [line for line in lines if line["what"] == what]

    stages = {line["name"]: line["status"] for line in of("stage")}
    words = {0: "ok", 124: "out of time", 3: "out of time", "skipped": "skipped"}
    print("stages: " + ", ".join(f"{name} {words.get(status, f'status {status}')}" for name, status in stages.items()))
    ppl = {line["device"]: line["ppl"] for line in of("perplexity")}
    if ppl:
        print("\nperplexity: " + ", ".join(f"{device} {value:.4f}" for device, value in ppl.items()))

    if of("probe"):
        print("\n| a step of 32 layers without attention | ggml's own CUDA graphs | us |\n|---|---|---|")
        for line in of("probe"):
            print(f"| {line['name']} | {line.get('ggml_graphs', '')} | {line.get('us', line.get('error'))} |")

    for line in of("copy")[-1:]:
        print(f"\n{line['device']} (sm_{line['sm']}): copies {line['gb_per_s']:.0f} GB/s, read and written")
    cases: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for line in of("attention"):
        cases.setdefault((line["shape"], line["n_query"], line["batch"], line["depth"]), {})[line["cache"]] = line["us"]
    if cases:
        names = ["f16", "q8_0", "q4_0", "gear", "gear3", "gear2"]
        print("\nattention alone, one layer, us (and f16's time by it; 0: did not fit)\n\n| shape | queries | batch | depth | " + " | ".join(names) + " |")
        print("|---" * (4 + len(names)) + "|")
        for (shape, n_query, batch, depth), times in sorted(cases.items()):
            base = times.get("f16") or 0
            cells = (f"{times[n]:.1f} ({base / times[n]:.2f})" if times.get(n) else "0" for n in names)
            print(f"| {shape} | {n_query} | {batch} | {depth} | " + " | ".join(cells) + " |")

    for title, what in (("whole models", "decode"), ("in a budget of memory", "budget")):
        if of(what):
            print(f"\n{title}: tokens per second\n\n| model | cache | n_ctx | batch | depth | prompt | generation | peak MiB |")
            print("|---" * 8 + "|")
        for line in of(what):
            n_ctx = line.get("n_ctx", line.get("n_kv_max", ""))
            speeds = f"{line['speed_pp']:.0f} | {line['speed_tg']:.1f}"
            print(f"| {line['model']} | {line['cache']} | {n_ctx} | {line['pl']} | {line['pp']} | {speeds} | {line['peak_mib']} |")


if __name__ == "__main__":
    commands = {
        "model": write_model,
        "bench": print_bench,
        "perplexity": print_perplexity,
        "agree": require_agreement,
        "ballast": hold_ballast,
        "table": print_table,
    }
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
