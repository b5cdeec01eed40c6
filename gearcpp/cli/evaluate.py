"""`gearcpp eval`: what a compressed KV cache does to the text that a model writes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gearcpp.cli import _options as options
from gearcpp.cli import app
from gearcpp.cli._console import notice, stderr
from gearcpp.cli._markdown import markdown_table
from gearcpp.cli._model import DEFAULT_CTX, default_threads, resolve_model
from gearcpp.cli._plot import check_plot, import_pyplot, save_figure
from gearcpp.errors import ConfigError

if TYPE_CHECKING:
    from gearcpp import Llama
    from gearcpp.evaluation.perplexity import CacheSpec
    from gearcpp.evaluation.structured import Judged, Request
    from gearcpp.evaluation.tasks import Answer, Search, Solved

eval_app = typer.Typer(help="What a compressed KV cache does to the text that a model writes, next to f16.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")

Seed = Annotated[int, typer.Option("-s", "--seed", metavar="N", help="Of what is asked.")]
KvTypes = Annotated[str, typer.Option("--kv", metavar="TYPE,...", help="KV caches, as in `gearcpp perplexity`; f16 is always among them.")]
Json = Annotated[bool, typer.Option("--json", help="Everything that was written, as one JSON object.")]
TextFile = Annotated[Path, typer.Argument(metavar="FILE", help="Text, UTF-8.")]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="FILE", help="Keep every answer in FILE as it comes, and go on from those that a stopped run left there."),
]
AnswerLength = Annotated[int, typer.Option("-n", "--predict", min=1, metavar="N", help="Most tokens of an answer.")]


@eval_app.command()
def gsm8k(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GSM8K's test.jsonl.")],
    shots: Annotated[
        Path | None, typer.Option("--shots", metavar="FILE", help="Where the eight worked examples come from (train.jsonl); default: the file's first.")
    ] = None,
    problems: Annotated[int, typer.Option("--problems", min=1, metavar="N", help="Problems to solve.")] = 100,
    predict: AnswerLength = 256,
    kv: KvTypes = "f16,gear",
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    resume: Resume = None,
    as_json: Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Grade-school arithmetic, eight worked examples in the prompt."""
    from gearcpp.evaluation import tasks

    listed = tasks.read_problems(file)
    examples = tasks.read_problems(shots) if shots else listed
    if len(examples) < tasks.N_SHOTS or not (asked := (listed if shots else listed[tasks.N_SHOTS :])[:problems]):
        raise ConfigError(f"{shots or file} has too few problems: {tasks.N_SHOTS} are worked examples in the prompt, and at least one is to be solved")

    def solve(llm: Llama, start: int) -> Iterator[Solved]:
        return tasks.gsm8k(llm, examples[: tasks.N_SHOTS], asked[start:], predict)

    settings = {"task": "gsm8k", "problems": len(asked), "text": _digest([examples[: tasks.N_SHOTS], asked]), "predict": predict}
    task = Task(solve, tasks.Solved, len(asked), settings)
    results = _run(task, kv, resolve_model(model, hf), ctx_size, threads, swa_full, resume, verbose)
    lines = []
    for spec, solved in results.by_cache.items():
        agreeing = mean(one.result == f16.result for one, f16 in zip(solved, results.f16, strict=False))
        lines.append((spec.label, *_shared_cells(spec, [one.answer for one in solved]), _share([one.is_right for one in solved]), _percent(agreeing)))
    _report(("cache", "answers", "packed", "right", "same number as f16"), lines, results, as_json)


@eval_app.command()
def needle(
    file: TextFile,
    lengths: Annotated[str, typer.Option("--lengths", metavar="N,...", help="Tokens of the haystack.")] = "1024,2048,4000",
    depths: Annotated[int, typer.Option("--depths", min=2, metavar="N", help="Places for the needle, from the start to the end.")] = 5,
    seed: Seed = 1,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the grid of every cache (PNG, SVG, PDF).")] = None,
    kv: KvTypes = "f16,gear",
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    resume: Resume = None,
    as_json: Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Find a number that stands somewhere in a long text."""
    from gearcpp.evaluation import tasks
    from gearcpp.evaluation.text import read_text

    check_plot(plot_file)
    text, sizes = read_text(file), _numbers(lengths)
    fractions = [i / (depths - 1) for i in range(depths)]

    def search(llm: Llama, start: int) -> Iterator[Search]:
        return tasks.needle(llm, text, sizes, fractions, seed, start)

    settings = {"task": "needle", "text": _digest(text), "lengths": lengths, "depths": depths, "seed": seed}
    task = Task(search, tasks.Search, len(sizes) * depths, settings)
    results = _run(task, kv, resolve_model(model, hf), ctx_size, threads, swa_full, resume, verbose)
    lines = []
    for spec, searches in results.by_cache.items():
        by_length = [[one.is_found for one in searches if one.length == length] for length in sizes]
        lines.append((spec.label, *_shared_cells(spec, [one.answer for one in searches]), *(f"{sum(found)}/{len(found)}" for found in by_length)))
    _report(("cache", "answers", "packed", *(f"{length} tokens" for length in sizes)), lines, results, as_json)
    if plot_file:
        _draw_grids(plot_file, results, sizes, fractions)


@eval_app.command()
def drift(
    file: TextFile,
    prompts: Annotated[int, typer.Option("--prompts", min=1, metavar="N", help="Prompts, spread evenly over the text.")] = 8,
    prompt_size: Annotated[int, typer.Option("--prompt-size", min=1, metavar="N", help="Tokens of a prompt.")] = 1024,
    predict: AnswerLength = 256,
    kv: KvTypes = "f16,gear",
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    resume: Resume = None,
    as_json: Json = False,
    verbose: options.Verbose = False,
) -> None:
    """How far greedy text follows f16's: first difference, positions with the same token, repetition, length."""
    from gearcpp.evaluation import tasks
    from gearcpp.evaluation.text import read_text

    text = read_text(file)

    def write(llm: Llama, start: int) -> Iterator[Answer]:
        return (tasks.answer(llm, prompt, predict) for prompt in tasks.split_prompts(llm, text, prompts, prompt_size)[start:])

    settings = {"task": "drift", "text": _digest(text), "prompts": prompts, "prompt_size": prompt_size, "predict": predict}
    results = _run(Task(write, tasks.Answer, prompts, settings), kv, resolve_model(model, hf), ctx_size, threads, swa_full, resume, verbose)
    lines = []
    for spec, answers in results.by_cache.items():
        drifts = [tasks.compare_answers(one.tokens, f16.tokens) for one, f16 in zip(answers, results.f16, strict=False)]
        lines.append(
            (
                spec.label,
                *_shared_cells(spec, answers),
                f"{sum(d.is_same for d in drifts)}/{len(drifts)}",
                f"{median(d.first_difference for d in drifts):g}",
                _percent(mean(d.same_share for d in drifts)),
                _percent(mean(d.repetition for d in drifts)),
                f"{mean(d.length_ratio for d in drifts):.2f}",
            )
        )
    header = ("cache", "answers", "packed", "same as f16", "first difference (median)", "same tokens", "repetition", "length / f16")
    _report(header, lines, results, as_json)


@eval_app.command()
def tools(
    problems: Annotated[int, typer.Option("--problems", min=1, metavar="N", help="Requests, each for a call of one function.")] = 50,
    seed: Seed = 1,
    predict: AnswerLength = 96,
    kv: KvTypes = "f16,gear",
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    resume: Resume = None,
    as_json: Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Call one of twelve functions, as a sentence asks: valid JSON, the right function, the right arguments."""
    from gearcpp.evaluation import structured

    given = structured.call_prefix(), structured.call_requests(problems, seed)
    columns = ("valid calls", "right function", "right arguments")
    _structured(
        "tools", *given, structured.judge_call, columns, predict, kv, resolve_model(model, hf), ctx_size, threads, swa_full, resume, as_json, verbose
    )


@eval_app.command()
def schemas(
    problems: Annotated[int, typer.Option("--problems", min=1, metavar="N", help="Texts with a schema.")] = 50,
    seed: Seed = 1,
    predict: AnswerLength = 128,
    kv: KvTypes = "f16,gear",
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    resume: Resume = None,
    as_json: Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write what a text says as JSON that follows a schema: valid JSON, one that follows it, the right values."""
    from gearcpp.evaluation import structured

    given = structured.object_prefix(), structured.object_requests(problems, seed)
    columns = ("valid JSON", "follows the schema", "right values")
    _structured(
        "schemas", *given, structured.judge_object, columns, predict, kv, resolve_model(model, hf), ctx_size, threads, swa_full, resume, as_json, verbose
    )


def _structured(
    name: str,
    prefix: str,
    requests: Sequence[Request],
    judge: Callable[[Request, Answer], Judged],
    columns: tuple[str, str, str],
    predict: int,
    kv: str,
    path: Path,
    n_ctx: int | None,
    n_threads: int | None,
    swa_full: bool,
    resume: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Both tasks with JSON: ask, and report three shares and how often the JSON is f16's."""
    from gearcpp.evaluation import structured

    def write(llm: Llama, start: int) -> Iterator[Judged]:
        return structured.ask(llm, prefix, requests[start:], predict, judge)

    settings = {"task": name, "problems": len(requests), "text": _digest([prefix, requests]), "predict": predict}
    results = _run(Task(write, structured.Judged, len(requests), settings), kv, path, n_ctx, n_threads, swa_full, resume, verbose)
    lines = []
    for spec, judged in results.by_cache.items():
        agreeing = [one.answer.text == f16.answer.text for one, f16 in zip(judged, results.f16, strict=False)]
        shares = (_share([getattr(one, what) for one in judged]) for what in ("is_valid", "fits", "is_right"))
        lines.append((spec.label, *_shared_cells(spec, [one.answer for one in judged]), *shares, _percent(mean(agreeing))))
    _report(("cache", "answers", "packed", *columns, "same as f16"), lines, results, as_json)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """What every cache wrote, f16 first; of an interrupted run as far as it came, caches without any answer left out."""

    by_cache: dict[CacheSpec, list[Any]] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def f16(self) -> list[Any]:
        return next(iter(self.by_cache.values()))


@dataclass(frozen=True)
class Task:
    """What a command has every cache do.

    Attributes:
        ask: the answers of a model from case ``start`` on.
        kind: the dataclass of an answer.
        n_cases: how many there are.
        settings: what answers depend on besides the model and its context.
    """

    ask: Callable[[Llama, int], Iterator[Any]]
    kind: type[Any]
    n_cases: int
    settings: dict[str, Any]


def _digest(what: Any) -> str:
    """A few digits that stand for a text, or for whatever has a `repr`."""
    return hashlib.sha256(what if isinstance(what, bytes) else repr(what).encode()).hexdigest()[:12]


def _run(
    task: Task,
    kv: str,
    path: Path,
    n_ctx: int | None,
    n_threads: int | None,
    swa_full: bool,
    resume: Path | None,
    verbose: bool,
) -> Results:
    """Do the task with every cache, with a progress bar, until it is done or Ctrl-C; what the file to resume has is not asked again."""
    from llama_cpp._logger import set_verbose
    from rich.progress import Progress

    from gearcpp import __version__
    from gearcpp.evaluation.run_log import RunLog
    from gearcpp.evaluation.tasks import load, parse_specs
    from gearcpp.model_info import read_model_info

    specs = parse_specs(kv)
    set_verbose(verbose)
    context = min(read_model_info(path).n_ctx_train, DEFAULT_CTX) if n_ctx is None else n_ctx
    results = Results()
    with ExitStack() as opened:
        log = None
        if resume:
            settings = {**task.settings, "model": path.name, "bytes": path.stat().st_size, "ctx": context, "swa_full": swa_full, "gearcpp": __version__}
            log = opened.enter_context(closing(RunLog(resume, settings)))
            for spec in specs:
                if kept := log.results(spec.label, task.kind):
                    results.by_cache[spec] = kept
        progress = opened.enter_context(Progress(console=stderr, transient=True, disable=not stderr.is_terminal))
        try:
            for spec in specs:
                n_kept = len(results.by_cache.get(spec, []))
                bar = progress.add_task(spec.label, total=task.n_cases, completed=n_kept)
                if n_kept >= task.n_cases:
                    continue
                with closing(load(path, spec, n_ctx=context, n_threads=n_threads or default_threads(), swa_full=swa_full)) as llm:
                    for result in task.ask(llm, n_kept):
                        results.by_cache.setdefault(spec, []).append(result)
                        if log:
                            log.add(spec.label, result)
                        progress.advance(bar)
        except KeyboardInterrupt:
            results.interrupted = True
    if results.interrupted:
        done = ", ".join(f"{spec.label} {len(got)}" for spec, got in results.by_cache.items()) or "none"
        notice(f"interrupted: answers so far, of {task.n_cases} by each cache: {done}" + (f"; kept in {resume}" if resume else ""))
    if not results.by_cache:
        raise typer.Exit(130)
    return results


def _report(header: Sequence[str], lines: Sequence[Sequence[str]], results: Results, as_json: bool) -> None:
    """Print the table or the JSON, and leave with the exit code of an interrupted run if it was one."""
    if as_json:
        typer.echo(json.dumps({spec.label: [asdict(one) for one in got] for spec, got in results.by_cache.items()}, ensure_ascii=False))
    else:
        typer.echo(markdown_table(header, lines))
    for spec, line in zip(results.by_cache, lines, strict=True):
        if line[2] == _percent(0):
            notice(f"{spec.label}: nothing was packed in these contexts, so this says nothing about the codec; give longer ones")
    if results.interrupted:
        raise typer.Exit(130)


def _shared_cells(spec: CacheSpec, answers: Sequence[Answer]) -> tuple[str, str]:
    """How many answers there are, and the share of the cache that was packed at their ends."""
    return str(len(answers)), _percent(mean(answer.packed_share for answer in answers)) if spec.kv_type.gear else "-"


def _share(hits: Sequence[bool]) -> str:
    """How many, with the 95 % confidence interval."""
    from gearcpp.evaluation.tasks import wilson

    low, high = wilson(sum(hits), len(hits))
    return f"{_percent(mean(hits))} ({100 * low:.0f} to {100 * high:.0f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--lengths wants whole numbers with commas between them, such as 1024,4096, not {text!r}") from None
    if min(numbers) < 1:
        raise ConfigError(f"--lengths wants lengths of 1 or more, not {min(numbers)}")
    return numbers


def _draw_grids(path: Path, results: Results, lengths: Sequence[int], depths: Sequence[float]) -> None:
    """One grid for each cache: length across, depth down, found or not."""
    pyplot = import_pyplot()
    figure, all_axes = pyplot.subplots(1, len(results.by_cache), squeeze=False, layout="constrained", figsize=(1.5 + 2.5 * len(results.by_cache), 3))
    for axes, (spec, searches) in zip(all_axes[0], results.by_cache.items(), strict=True):
        found = {(one.length, one.depth): one.is_found for one in searches}
        grid = [[found.get((length, depth), math.nan) for length in lengths] for depth in depths]
        axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(spec.label, fontsize=10)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_xlabel("tokens")
    all_axes[0][0].set_ylabel("depth of the needle")
    save_figure(figure, path)
