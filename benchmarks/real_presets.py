"""What every preset does to real models, held against the other forms of its rotation and against llama.cpp's own types: run it before a preset changes.

    python benchmarks/real_presets.py [--models FOLDER] --text wiki.test.raw --log FILE [--only gemma-3-270m] [--kv gear,gear2] [-c 4096] [--chunks 4]
    python benchmarks/real_presets.py --log FILE --plot PNG        # nothing is measured: KLD over bits a number, one panel a model

FOLDER, by default the one that GEARCPP_MODELS names, has GGUF files with f16 weights, NAME-f16.gguf (quantized weights put a floor under every
divergence). Each cache and chunk length of each model is a line of the log, JSON; what is there already is not measured again, so a run may be stopped
and taken up. The table and what breaks the rules is printed at the end: a preset that another one of fewer bits beats, one that is more than 10 % worse
than one of its two fixed forms, a perplexity more than 3 % above f16's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from gearcpp import PRESETS
from gearcpp.cache.kv_type import split_kv_types
from gearcpp.cli._plot import import_pyplot
from gearcpp.evaluation.perplexity import Measurement, Settings
from gearcpp.evaluation.text import read_text
from gearcpp.model_files import WAYS, real_models

NAMES = ("smollm2-135m", "qwen2.5-coder-0.5b", "gemma-3-270m", "qwen2.5-coder-1.5b")
RIVALS = ("q8_0", "q4_0", "q4_0+tail128")
FIXED_FORMS = ("rotate_k=True", "rotate_k=False")
PRESETS_HELD = ("gear", "gear3", "gear2")  # against their fixed forms
FORM_SLACK, MOST_PERPLEXITY = 1.10, 1.03


def wanted_types() -> list[str]:
    presets = [name for name in PRESETS if name != "gear4"]
    return [*RIVALS, *presets, *(f"{name}({form})" for name in PRESETS_HELD for form in FIXED_FORMS)]


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["n_ctx"], row["n_chunks"], row["kv"]


def measure(model: Path, kv: list[str], arguments: argparse.Namespace, *, floor: bool) -> None:
    # Whole windows, so that all layers are packed: a window of 512 would stay f16.
    settings = Settings(
        n_ctx=arguments.ctx, n_chunks=arguments.chunks, n_threads=arguments.threads, n_models=arguments.in_memory, floor=floor, swa_full=True
    )
    measurement = Measurement(model, read_text(arguments.text), ",".join(kv), settings)
    last = 0.0
    for step in measurement.run():
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{model.stem}: {step.n_done} of {step.n_total} tokens, {', '.join(step.labels)}", file=sys.stderr, flush=True)
    with arguments.log.open("a") as log:
        for row in measurement.rows():
            line = {"model": model.stem, "n_ctx": arguments.ctx, "n_chunks": arguments.chunks, **row.to_dict()}
            log.write(json.dumps(line) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| cache | bits/element | PPL | KLD in 1e-6 | same top |", "|---|---:|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: -row["bits_per_element"]):
        lines.append(
            f"| {row['kv']} | {row['bits_per_element']:.3f} | {row['ppl']:.3f} | {1e6 * row['kld_mean']:.0f} ± {1e6 * row['kld_se']:.0f} "
            f"| {100 * row['same_top']:.1f} % |"
        )
    return "\n".join(lines)


def complaints(rows: list[dict[str, Any]]) -> list[str]:
    """What breaks the rules among the rows of one model."""
    by_name = {row["kv"]: row for row in rows}
    found = []
    for name in PRESETS:
        row = by_name.get(name)
        if not row:
            continue
        for other in PRESETS:
            better = by_name.get(other)
            if better and better["bits_per_element"] < row["bits_per_element"] and better["kld_mean"] < row["kld_mean"]:
                found.append(f"{name} is dominated by {other}, which has fewer bits and {better['kld_mean'] / row['kld_mean']:.2f} of its divergence")
        for form in FIXED_FORMS:
            fixed = by_name.get(f"{name}({form})")
            if fixed and row["kld_mean"] > FORM_SLACK * fixed["kld_mean"]:
                found.append(f"{name} has {row['kld_mean'] / fixed['kld_mean']:.2f} times the divergence of its form {form}")
        if row["ppl"] > MOST_PERPLEXITY * by_name["f16"]["ppl"]:
            found.append(f"{name}: perplexity {row['ppl']:.3f} where f16 has {by_name['f16']['ppl']:.3f}")
    return found


PRESETS_DRAWN, TYPES_DRAWN = ("gear", "gear3", "gear2"), ("q8_0", "q5_1", "q5_0", "q4_0")


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """KLD over bits a number: GEAR's presets as one line, llama.cpp's types as another, and f16 read in other pieces as what both are held against."""
    pyplot = import_pyplot()
    models = [name for name in NAMES if any(row["model"] == f"{name}-f16" for row in rows)]
    figure, panels = pyplot.subplots(1, len(models), figsize=(3.2 * len(models), 3.2), sharey=True, squeeze=False, layout="constrained")
    for panel, name in zip(panels[0], models, strict=True):
        of_model = {row["kv"]: row for row in rows if row["model"] == f"{name}-f16"}
        for label, names, style in (("GEAR", PRESETS_DRAWN, "o-"), ("llama.cpp's types", TYPES_DRAWN, "s--")):
            points = [of_model[kv] for kv in names if kv in of_model]
            panel.errorbar(
                [row["bits_per_element"] for row in points],
                [row["kld_mean"] for row in points],
                [row["kld_se"] for row in points],
                fmt=style,
                label=label,
                capsize=2,
            )
            for row in points:
                panel.annotate(row["kv"], (row["bits_per_element"], row["kld_mean"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
        for row in of_model.values():
            if row["kv"].startswith("f16, -ub"):
                panel.axhline(row["kld_mean"], color="gray", linestyle=":", label="f16, other kernel")
        panel.set(title=name, xlabel="bits a number", yscale="log", xlim=(2, 9))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("KLD from f16, nat")
    panels[0][-1].legend(fontsize=7)
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of NAME-f16.gguf; default: GEARCPP_MODELS")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what the log has for --ctx and --chunks, and measure nothing")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=NAMES, help="measure this model only; may be given again")
    parser.add_argument("--kv", help="caches to measure in place of all, as `gearcpp perplexity --kv` takes them")
    parser.add_argument("-c", "--ctx", type=int, default=4096)
    parser.add_argument("--chunks", type=int, default=4, help="4 of 4096 score 8,188 tokens")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--in-memory", type=int, default=8, help="models in memory at once")
    arguments = parser.parse_args()
    if arguments.plot:
        draw([row for row in read_log(arguments.log) if (row["n_ctx"], row["n_chunks"]) == (arguments.ctx, arguments.chunks)], arguments.plot)
        return
    if not arguments.text:
        parser.error("--text is needed to measure")
    found = real_models(arguments.models)
    for name in arguments.only or NAMES:
        model = found.get(f"{name}-f16")
        if not model:
            print(f"{name}: left out, there is no {name}-f16.gguf: {WAYS}")
            continue
        done = {key(row) for row in read_log(arguments.log)}
        kv = split_kv_types(arguments.kv) if arguments.kv else wanted_types()
        missing = [cache for cache in kv if (model.stem, arguments.ctx, arguments.chunks, cache) not in done]
        has_floor = any(name == model.stem and kv.startswith("f16, -ub") for name, *_, kv in done)
        for i in range(0, len(missing), arguments.in_memory - 1):  # in pieces, so that little is lost when a run is stopped
            measure(model, missing[i : i + arguments.in_memory - 1], arguments, floor=i == 0 and not has_floor)
        rows = {
            row["kv"]: row
            for row in read_log(arguments.log)
            if (row["model"], row["n_ctx"], row["n_chunks"]) == (model.stem, arguments.ctx, arguments.chunks)
        }
        print(f"\n{name}, {arguments.chunks} chunks of {arguments.ctx} tokens\n\n{table(list(rows.values()))}\n")
        for line in complaints(list(rows.values())):
            print(f"- {line}")


if __name__ == "__main__":
    main()
