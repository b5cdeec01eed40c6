"""`gearcpp perplexity`: how far the answers of a model move when its KV cache is compressed."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from gearcpp.cli import _options as options
from gearcpp.cli import app
from gearcpp.cli._console import notice, stderr
from gearcpp.cli._markdown import markdown_table
from gearcpp.cli._model import default_threads, resolve_model
from gearcpp.cli._plot import check_plot, check_writable, import_pyplot, save_figure
from gearcpp.errors import DataError

if TYPE_CHECKING:
    from gearcpp.evaluation.perplexity import Measurement, Row, Step

_OUTPUT = "Output"


@app.command()
def perplexity(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Text to read, UTF-8; by convention WikiText-2's test part, wiki.test.raw.")],
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            metavar="TYPE,...",
            help="KV caches to hold against f16: presets, llama.cpp's types, sim:METHOD of gearcpp.reference; +tailN gives each an exact tail.",
        ),
    ] = "f16,q8_0,q4_0,gear",
    ctx_size: Annotated[int | None, typer.Option("-c", "--ctx-size", min=1, metavar="N", help="Tokens of a chunk; default 4096.")] = None,
    ubatch_size: Annotated[
        int | None,
        typer.Option("-ub", "--ubatch-size", "-b", "--batch-size", min=1, metavar="N", help="Tokens read at once, at most a tile; default 128."),
    ] = None,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, metavar="N", help="Chunks to read; default: all.")] = None,
    models: Annotated[
        int, typer.Option("--models", min=2, metavar="N", help="Models in memory at once: f16 reads the text once for every N - 1 GEAR types.")
    ] = 2,
    like_llama: Annotated[
        bool, typer.Option("--like-llama-perplexity", help="llama-perplexity's defaults (-c 512, -ub 512) and refusals, and no row of f16 against itself.")
    ] = False,
    seed: Annotated[int | None, typer.Option("-s", "--seed", min=0, metavar="N", help="Of GEAR's power iteration; default: the preset's.")] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", metavar="TEXT_FILE", help="Text that sim:kvquantN and sim:cq-NcMb learn from first; another one than FILE."),
    ] = None,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.", rich_help_panel=_OUTPUT)] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the table as CSV, too.", rich_help_panel=_OUTPUT)] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw KL divergence over bits per element (PNG, SVG, PDF).", rich_help_panel=_OUTPUT)
    ] = None,
    verbose: options.Verbose = False,
) -> None:
    """Perplexity of a model under several KV caches, and how far each moves its predictions away from f16's.

    Scored are the predictions in the second half of each chunk. KL divergence is in nat, +- is a standard error over the scored tokens.
    """
    check_writable(csv_file)
    check_plot(plot_file)
    from llama_cpp._logger import set_verbose

    from gearcpp.evaluation.perplexity import Measurement, Settings
    from gearcpp.evaluation.text import read_text

    set_verbose(verbose)
    default_ctx, default_ubatch = (512, 512) if like_llama else (4096, 128)
    n_ctx = ctx_size or default_ctx
    settings = Settings(
        n_ctx=n_ctx,
        n_ubatch=ubatch_size or min(default_ubatch, n_ctx),
        n_chunks=chunks,
        n_threads=threads or default_threads(),
        seed=seed,
        n_models=models,
        like_llama=like_llama,
        swa_full=swa_full,
    )
    path, text = resolve_model(model, hf), read_text(file)
    if calibrate:
        notice(f"calibrating on {calibrate}")
    measurement = Measurement(path, text, kv, settings, calibrate)
    for note in measurement.notes:
        notice(f"note: {note}")
    output = _WholeFile(sys.stdout) if as_json else None
    interrupted = not _run(measurement, lambda: output.write(_json(measurement, file)) if output else None)

    rows = measurement.rows()
    if as_json:
        assert output
        output.write(_json(measurement, file), last=True)
    else:
        typer.echo(table(rows))
        notice(_scored_line(measurement))
    if csv_file:
        _write_csv(csv_file, rows)
    if plot_file:
        _draw(plot_file, rows, measurement)
    if interrupted:
        done = ", ".join(f"{row.label} {row.summary.n_tokens}" for row in rows) or "none"
        notice(f"interrupted: these figures are of a part of the text (of {measurement.n_scored} tokens to score: {done})")
        raise typer.Exit(130)


def _json(measurement: Measurement, file: Path) -> str:
    return json.dumps(_record(measurement, file), indent=2)


class _WholeFile:
    """Standard output that holds one text, which a later one replaces: so that a run that is killed leaves what it had. Where that cannot be (a pipe, a
    terminal, an appended file) only the last one is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start: int | None = None
        with contextlib.suppress(OSError, ValueError):
            descriptor = stream.fileno()
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
                self._start = os.lseek(descriptor, 0, os.SEEK_CUR)

    def write(self, text: str, *, last: bool = False) -> None:
        """The text as it is now."""
        if self._start is None:
            if last:
                typer.echo(text)
            return
        descriptor, data = self._stream.fileno(), f"{text}\n".encode()
        os.ftruncate(descriptor, self._start)
        os.lseek(descriptor, self._start, os.SEEK_SET)
        while data:
            data = data[os.write(descriptor, data) :]


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run(measurement: Measurement, on_chunk: Callable[[], object]) -> bool:
    """Measure with a progress bar, or, where errors go to no terminal, a line for each chunk; False when Ctrl-C or SIGTERM ended it.

    Args:
        on_chunk: called after each chunk.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        n_done, is_main = 0, threading.current_thread() is threading.main_thread()
        earlier = signal.signal(signal.SIGTERM, _stop) if is_main else None
        try:
            with closing(measurement.run()) as steps:
                for step in steps:
                    progress.update(task, description=", ".join(step.labels), completed=step.n_done, total=step.n_total)
                    if step.n_done > n_done and step.n_done % measurement.settings.n_ctx == 0:
                        n_done = step.n_done
                        on_chunk()
                        if not stderr.is_terminal:
                            notice(_chunk_line(measurement, step))
        except KeyboardInterrupt:
            return False
        finally:
            if is_main:
                signal.signal(signal.SIGTERM, earlier)
    return True


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------------------------------


def _chunk_line(measurement: Measurement, step: Step) -> str:
    figures = ", ".join(f"{row.label} PPL {row.summary.ppl:.4f}" for row in measurement.rows() if row.label in step.labels)
    n_ctx = measurement.settings.n_ctx
    return f"chunk {step.n_done // n_ctx} of {step.n_total // n_ctx}: {figures}"


_HEADER = ("cache", "bits/element", "packed", "tail + sinks", "PPL", "KLD mean", "KLD median", "KLD 99 %", "KLD 99.9 %", "KLD max", "RMS Δp", "same top")


def table(rows: Sequence[Row]) -> str:
    """The figures as a Markdown table."""
    return markdown_table(_HEADER, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    s = row.summary
    against_f16 = (
        f"{s.kld_mean:.2e} ± {s.kld_se:.0e}",
        *(f"{value:.2e}" for value in (s.kld_median, s.kld_99, s.kld_999, s.kld_max)),
        f"{100 * s.delta_p_rms:.3f} %",
        f"{100 * s.same_top:.2f} ± {100 * s.same_top_se:.2f} %",
    )
    return (
        row.label,
        f"{row.bits_per_element:.3f}",
        "-" if row.packed_share is None else f"{100 * row.packed_share:.1f} %",
        "-" if row.n_tail is None else f"{row.n_tail} + {row.n_sink}",
        f"{s.ppl:.4f} ± {s.ppl_se:.4f}",
        *(["-"] * len(against_f16) if row.label == "f16" else against_f16),
    )


def _scored_line(measurement: Measurement) -> str:
    settings = measurement.settings
    return (
        f"{measurement.n_scored} scored tokens: positions {settings.scored.start} to {settings.scored.stop - 1} of {len(measurement.chunks)} chunks of "
        f"{settings.n_ctx}, read in ubatches of {settings.n_ubatch}"
    )


def _record(measurement: Measurement, file: Path) -> dict[str, Any]:
    """All that was measured, as JSON can hold it."""
    import llama_cpp

    from gearcpp import __version__

    return {
        "model": str(measurement.info.path),
        "file": str(file),
        "settings": asdict(measurement.settings),
        "n_chunks": len(measurement.chunks),
        "n_scored": measurement.n_scored,
        "complete": measurement.is_complete,
        "notes": measurement.notes,
        "gearcpp": __version__,
        "llama_cpp_python": llama_cpp.__version__,
        "rows": [row.to_dict() for row in measurement.rows()],
    }


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    records = [row.to_dict() for row in rows]
    try:
        with path.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(records[0]) if records else [])
            writer.writeheader()
            writer.writerows(records)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def _draw(path: Path, rows: Sequence[Row], measurement: Measurement) -> None:
    """Mean KL divergence over bits per element, with the floor as a line."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        mean, error = row.summary.kld_mean, row.summary.kld_se
        if row.label.startswith("f16, "):
            axes.axhline(mean, color="gray", linestyle=":", label=f"f16 against itself ({row.label})")
        elif row.label != "f16":
            axes.errorbar(row.bits_per_element, mean, yerr=error, fmt="o", capsize=3)
            axes.annotate(row.label, (row.bits_per_element, mean), xytext=(6, 4), textcoords="offset points")
    axes.set_yscale("log")
    axes.margins(x=0.15)  # room for the names
    axes.set_xlabel("bits per element of a packed tile or block")
    axes.set_ylabel("mean KL divergence from f16, nat")
    axes.set_title(f"{measurement.info.path.name}, {measurement.n_scored} tokens, chunks of {measurement.settings.n_ctx}", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)
