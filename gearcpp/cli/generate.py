"""`gearcpp generate`: one answer to one prompt, for scripts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gearcpp.cli import _options as options
from gearcpp.cli import _start as start
from gearcpp.cli import app
from gearcpp.cli._console import notice, write
from gearcpp.cli._conversation import Sampling
from gearcpp.cli._report import answer_line, answer_record
from gearcpp.cli._terminal import Interrupt
from gearcpp.errors import DataError


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Prompt.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", metavar="FILE", help="Prompt from a file, - for stdin; goes after -p.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it stands, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    kv: options.KvType = "gear",
    kv_budget: options.KvBudget = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    system_prompt: options.SystemPrompt = None,
    predict: options.Predict = None,
    temp: options.Temperature = None,
    top_k: options.TopK = 40,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.05,
    repeat_penalty: options.RepeatPenalty = 1.0,
    seed: options.Seed = None,
    verbose: options.Verbose = False,
) -> None:
    """Answer one prompt and leave. The answer goes to stdout, everything else to stderr."""
    text = "\n".join(part for part in (prompt, _read(file)) if part is not None)
    if not text:
        raise typer.BadParameter("there is no prompt: give -p TEXT or -f FILE")
    interrupt = Interrupt()
    with start.conversation(
        model=model,
        hf=hf,
        kv=kv,
        kv_budget=kv_budget,
        ctx_size=ctx_size,
        threads=threads,
        swa_full=swa_full,
        verbose=verbose,
        system_prompt=system_prompt,
        predict=predict,
        sampling=Sampling(start.temperature(temp, model, hf), top_k, top_p, min_p, repeat_penalty),
        seed=seed,
        stopped=interrupt,
        plain=raw,
    ) as conversation:
        pieces = []
        with interrupt:
            for piece in conversation.ask(text):
                pieces.append(piece)
                if not as_json:
                    write(piece)
        if as_json:
            write(json.dumps({"text": "".join(pieces), **answer_record(conversation)}, ensure_ascii=False) + "\n")
        else:
            write("\n")
            notice(answer_line(conversation))
    if interrupt():
        raise typer.Exit(130)


def _read(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the prompt from {file}: {error.strerror}") from error
    return data.decode("utf-8", "replace")
