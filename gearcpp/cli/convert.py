"""`gearcpp convert`: a model of transformers to GGUF; `gearcpp inspect`: what is in a GGUF file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gearcpp.cli import _options as options
from gearcpp.cli import app
from gearcpp.cli._console import mib, notice, stderr

if TYPE_CHECKING:
    from gearcpp.convert import Conversion, Inspection


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_REPO", help="Model folder of transformers, or USER/REPO of the Hugging Face hub.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="GGUF file to write; default NAME-TYPE.gguf here.")] = None,
    outtype: Annotated[str, typer.Option("--outtype", metavar="TYPE", help="f32, f16, bf16, q8_0, or auto: as the checkpoint.")] = "auto",
    quantize: Annotated[str | None, typer.Option("--quantize", metavar="TYPE", help="Then quantize by llama.cpp: Q4_K_M, IQ3_XS, ...")] = None,
    imatrix: Annotated[Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix for --quantize and --recover-rank.")] = None,
    recover_rank: Annotated[
        int | None, typer.Option("--recover-rank", min=1, metavar="R", help="Also write FILE-lora.gguf: rank R of the quantization error.")
    ] = None,
    recover_rounds: Annotated[int, typer.Option("--recover-rounds", min=1, metavar="N", help="Find it and the quantization in turn, N times.")] = 1,
    pre: Annotated[str | None, typer.Option("--pre", metavar="NAME", help="llama.cpp's pre-tokenizer, where the rules are not recognised.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Refuse NaN, read everything back, compare tokens.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing, say what would be written.")] = False,
    upstream: Annotated[
        Path | None, typer.Option("--upstream", metavar="DIR", help="Checkout of llama.cpp: run its own converter, in an environment made for it.")
    ] = None,
    upstream_python: Annotated[bool, typer.Option("--upstream-python", help="Run it by this Python, without an environment of its own.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert a Hugging Face model to GGUF."""
    from llama_cpp._logger import set_verbose

    from gearcpp.convert import convert_model

    set_verbose(verbose)
    path = output or Path(f"{Path(source).resolve().name}-{quantize or outtype}.gguf".replace("-auto", ""))
    with _progress() as progress:
        conversion = convert_model(
            source,
            path,
            outtype=outtype,
            quantize=quantize,
            imatrix=imatrix,
            recover_rank=recover_rank,
            recover_rounds=recover_rounds,
            pre=pre,
            verify=verify,
            dry_run=dry_run,
            upstream=upstream,
            upstream_python=upstream_python,
            progress=progress,
            report=notice,
        )
    _print_conversion(conversion, dry_run)


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.")],
    ctx: Annotated[int | None, typer.Option("-c", "--ctx", min=1, metavar="N", help="Context for the KV cache; default, the trained one.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    swa_full: options.SwaFull = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: everything.")] = False,
) -> None:
    """Metadata, tensors and sizes of a GGUF file, and what its KV cache would need."""
    from gearcpp.convert import inspect_model

    inspection = inspect_model(file, ctx, swa_full=swa_full)
    if as_json:
        typer.echo(json.dumps(inspection.to_dict(), indent=2))
    else:
        _print_inspection(inspection, tensors)


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.progress import DownloadColumn, Progress, TextColumn

    with Progress(DownloadColumn(), TextColumn("{task.fields[tensor]}"), console=stderr, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("convert", total=None, tensor="")
        yield lambda name, n_bytes: bar.update(task, advance=n_bytes, tensor=name)


def _print_conversion(conversion: Conversion, dry_run: bool) -> None:
    for line in conversion.notices:
        notice(f"note: {line}")
    if dry_run:
        for name, (kind, shape) in conversion.tensors.items():
            typer.echo(f"{name:36} {kind:5} {list(shape)}")
    facts = f"{conversion.architecture}, {conversion.n_parameters / 1e6:.1f}M parameters, {conversion.outtype}, {mib(conversion.n_bytes)}"
    typer.echo(f"{'would write' if dry_run else 'wrote'} {conversion.path} ({facts})")
    if recovery := conversion.recovery:
        errors = f"error {recovery.error_before:.4f} without, {recovery.error_after:.4f} with it"
        typer.echo(f"wrote {recovery.adapter} (rank {recovery.rank}, {recovery.n_matrices} matrices, {mib(recovery.adapter_bytes)}; {errors})")


def _print_inspection(inspection: Inspection, every_tensor: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            made.add_column(column, justify="right" if index else "left", overflow="fold")
        return made

    for key, value in inspection.metadata.items():
        console.print(f"{key:44} {value!r}", markup=False, soft_wrap=True)
    types = table(f"\n{len(inspection.tensors)} tensors, {inspection.n_parameters / 1e6:.1f}M parameters", "type", "parameters", "size", "bits each")
    for kind, (count, n_bytes) in inspection.by_type().items():
        types.add_row(kind, f"{count:,}", mib(n_bytes), f"{8 * n_bytes / count:.2f}")
    console.print(types)
    if every_tensor:
        for tensor in inspection.tensors:
            console.print(f"{tensor.name:36} {tensor.type:6} {list(tensor.shape)!s:22} {mib(tensor.n_bytes)}", markup=False, soft_wrap=True)
    if inspection.kv:
        f16 = next((need.n_bytes for need in inspection.kv if need.kv_type == "f16"), math.nan)
        windows = " with --swa-full" if inspection.swa_full and inspection.n_window else ""
        needs = table(f"\nKV cache for {inspection.n_ctx} tokens{windows}", "kv type", "size", "of f16")
        for need in inspection.kv:
            needs.add_row(need.kv_type, mib(need.n_bytes), f"{need.n_bytes / f16:.1%}")
        console.print(needs)
        gear = next(need for need in inspection.kv if need.kv_type == "gear")
        console.print(f"layers with gear: {gear.summary}", markup=False, soft_wrap=True)
