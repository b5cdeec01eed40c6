"""`gearcpp bench`: speed and memory of GEAR caches beside llama.cpp's own, or of the attention op alone."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from gearcpp.cache.kv_type import KVType, normalize_kv_type, split_kv_types
from gearcpp.cli import _options as options
from gearcpp.cli import app
from gearcpp.cli._model import resolve_model
from gearcpp.cli._plot import check_writable, import_pyplot
from gearcpp.errors import ConfigError

DEFAULT_TYPES = "f16,q8_0,q4_0,gear,gear3,gear2"


class Output(str, enum.Enum):
    """How to print results."""

    md = "md"
    json = "json"
    csv = "csv"


def _numbers(text: str) -> list[int]:
    """Comma-separated whole numbers, as llama-bench takes them."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise typer.BadParameter(f"{text!r} is not a comma-separated list of whole numbers from 0")
    return numbers


def _types(text: str) -> list[KVType]:
    """Comma-separated cache types, each once."""
    types = list(dict.fromkeys(normalize_kv_type(part) for part in split_kv_types(text)))
    for kv in types:
        if kv.method:
            raise typer.BadParameter(f"{kv.name} is a method in Python, which is slow and saves no memory: there is nothing to time")
    return types


def _named_file(model: Path | None, hf: str | None) -> tuple[str, Path]:
    path = resolve_model(model, hf)
    return path.stem, path


@app.command()
def bench(
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    shape: Annotated[
        str | None, typer.Option("--shape", metavar="NAME[:LAYERS]", help="A model of random weights, such as llama-8b:4, made once.")
    ] = None,
    kv: Annotated[str, typer.Option("--kv", metavar="LIST", help="Cache types.")] = DEFAULT_TYPES,
    n_prompt: Annotated[str, typer.Option("-p", "--n-prompt", metavar="LIST", help="Tokens of a prompt; 0: no such test.")] = "512",
    n_gen: Annotated[str, typer.Option("-n", "--n-gen", metavar="LIST", help="Tokens of a generation; 0: no such test.")] = "128",
    n_depth: Annotated[str, typer.Option("-d", "--n-depth", metavar="LIST", help="Tokens in the cache before a test.")] = "0",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, metavar="N", help="Of every test.")] = 5,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    n_ubatch: Annotated[int, typer.Option("-ub", "--ubatch-size", min=1, metavar="N", help="Tokens of a batch.")] = 512,
    output: Annotated[Output, typer.Option("-o", "--output", help="Format.")] = Output.md,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw t/s against depth (needs matplotlib).")] = None,
    rss: Annotated[bool, typer.Option(help="Measure peak memory, in a process for each type.")] = True,
    op: Annotated[bool, typer.Option("--op", help="Time the attention op and packing alone, of one layer.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare cache types in one run: the same model, in turns, medians and ratios to f16 (or to the first type, if f16 is not among them)."""
    from gearcpp.cli.bench import _memory, _op, _report, _shapes, _steps

    if shape and (model or hf):
        raise ConfigError("--shape makes a model, -m and -hf name one: give one of them")
    types, depths = _types(kv), _numbers(n_depth)
    if op:
        heads = _op.heads_of(_shapes.parse_shape(shape or "llama-8b")[1]) if shape or not (model or hf) else _op.heads_of_model(resolve_model(model, hf))
        typer.echo(_op.report(_op.run(types, heads, depths, repetitions, threads), heads, output.value), nl=False)
        return

    plan = _steps.Plan(_numbers(n_prompt), _numbers(n_gen), depths, repetitions, threads, n_ubatch, swa_full)
    if not plan.tests:
        raise ConfigError("there is nothing to measure: -p and -n are both 0")
    if plot:
        import_pyplot()
        check_writable(plot)
    name, path = _shapes.named_model(shape) if shape else _named_file(model, hf)
    baseline = next((kv_type for kv_type in types if kv_type.name == "f16"), types[0])
    peaks = {kv_type.name: _memory.peak_rss(path, kv_type, plan) for kv_type in types} if rss else {}
    results = _steps.run(path, types, baseline, plan)
    for result in results:
        result.peak_rss = peaks.get(result.kv_type)
    if output is Output.md:
        text = _report.as_markdown(results, name, baseline.name, plan)
    else:
        found = _report.records(results, name, baseline.name, plan)
        text = _report.as_json(found) if output is Output.json else _report.as_csv(found)
    typer.echo(text, nl=False)
    if plot:
        _report.plot(results, name, plot)
