"""`gearcpp check`: whether a model stands a compressed KV cache, and which preset it stands."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gearcpp.cli import _options as options
from gearcpp.cli import app
from gearcpp.cli._console import notice
from gearcpp.cli._model import default_threads, resolve_model
from gearcpp.cli._plot import check_plot
from gearcpp.cli.perplexity import _draw, _run
from gearcpp.errors import ConfigError


@app.command()
def check(
    text: Annotated[Path | None, typer.Argument(metavar="[TEXT]", help="Text file to read, UTF-8; default: some of this package's own.")] = None,
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    kv: options.KvType = "gear",
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", min=1, metavar="N", help="Tokens to read.")] = 2048,
    threads: options.Threads = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also what the cache says of each layer: the error of scores and values.")] = False,
    swa_full: options.SwaFull = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the sentences.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw KL divergence over bits per element (PNG, SVG, PDF).")] = None,
    verbose: options.Verbose = False,
) -> None:
    """Say in plain words whether a model stands a compressed KV cache, and which preset is the smallest that it stands."""
    check_plot(plot_file)
    from llama_cpp._logger import set_verbose

    from gearcpp.evaluation.check import Verdict, judge, layer_lines, next_preset, own_text, smallest
    from gearcpp.evaluation.perplexity import F16, Measurement, Row, Settings, parse_cache
    from gearcpp.evaluation.text import read_text

    set_verbose(verbose)
    if "," in kv:
        raise ConfigError(f"--kv {kv}: check is asked about one cache; `gearcpp perplexity` compares several")
    chosen = parse_cache(kv)
    if chosen.kv_type == F16:
        raise ConfigError("f16 is what the others are held against: give another cache, such as --kv gear")
    path, data = resolve_model(model, hf), read_text(text) if text else own_text()
    settings = Settings(n_ctx=ctx_size, n_ubatch=min(128, ctx_size), n_chunks=1, n_threads=threads or default_threads(), floor=False, swa_full=swa_full)
    rows: list[Row] = []
    verdicts: dict[str, Verdict] = {}
    name: str | None = chosen.label
    interrupted = False
    while name and not interrupted:
        measurement = Measurement(path, data, name, settings)
        interrupted = not _run(measurement, lambda: None)
        if measurement.is_complete:
            rows += [row for row in measurement.rows() if row.label == name]
            verdicts[name] = judge(rows[-1])
            if not as_json:
                typer.echo(str(verdicts[name]))
                if layers and name == chosen.label:
                    typer.echo("\n".join(layer_lines(rows[-1])))
        if not interrupted:
            name = next_preset(chosen.label, verdicts)

    best = smallest(verdicts)
    if as_json:
        tried = [
            {**asdict(verdict), "outcome": verdict.outcome.name.lower(), "stands": verdict.stands, "score_error": row.score_error, "layers": row.layers}
            for verdict, row in zip(verdicts.values(), rows, strict=True)
        ]
        record = {"model": str(path), "kv": chosen.label, "n_scored": measurement.n_scored, "complete": not interrupted, "smallest": best, "tried": tried}
        # nan is not JSON.
        typer.echo(json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None), indent=2))
    elif not interrupted:
        typer.echo(f"the smallest preset that this model stands: {best}" if best else "this model stands none of the presets tried: use f16")
    if plot_file and rows:
        _draw(plot_file, rows, measurement)
    if interrupted:
        notice("interrupted: the presets not named were not read to the end")
        raise typer.Exit(130)
