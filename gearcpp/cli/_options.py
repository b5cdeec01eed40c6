"""The options that several commands share, by llama-cli's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gearcpp.cli._console import set_verbose

_MODEL, _SAMPLING = "Model", "Sampling"

ModelFile = Annotated[
    Path | None,
    typer.Option("-m", "--model", metavar="FILE", help="GGUF file; default: the extra `assistant`, or the bundled one.", rich_help_panel=_MODEL),
]
HfRepo = Annotated[
    str | None,
    typer.Option("-hf", "--hf-repo", metavar="USER/REPO[:QUANT]", help="GGUF from Hugging Face, cached.", rich_help_panel=_MODEL),
]
KvType = Annotated[
    str,
    typer.Option("--kv", metavar="TYPE", help="KV cache: a preset (gear, gear3, ...), or f16, q8_0, ...; see `gearcpp info`.", rich_help_panel=_MODEL),
]
KvBudget = Annotated[
    str | None,
    typer.Option("--kv-budget", metavar="SIZE", help="Memory for the cache, such as 2GiB or 24KiB/token: picks its bits.", rich_help_panel=_MODEL),
]
CtxSize = Annotated[
    int | None,
    typer.Option("-c", "--ctx-size", min=0, metavar="N", help="Context; 0: all that the model was trained for.", rich_help_panel=_MODEL),
]
SwaFull = Annotated[
    bool,
    typer.Option(
        "--swa-full",
        help="Sliding windows keep the whole context: more memory, but a full context can be shifted and any prefix taken up again.",
        rich_help_panel=_MODEL,
    ),
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, metavar="N", help="Threads; default: the cores.", rich_help_panel=_MODEL)]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", callback=set_verbose, help="llama.cpp's log, and tracebacks of errors.", rich_help_panel=_MODEL)]

SystemPrompt = Annotated[str | None, typer.Option("-sys", "--system-prompt", metavar="TEXT", help="System prompt.", rich_help_panel=_SAMPLING)]
Predict = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--predict",
        "--n-predict",
        min=-1,
        metavar="N",
        help="Most tokens of an answer, -1: until the model ends; default -1, or 256 without a chat template.",
        rich_help_panel=_SAMPLING,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temp", min=0.0, metavar="X", help="Temperature; 0: greedy; default 0.8, the assistant's 0.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[int, typer.Option("--top-k", min=0, metavar="N", help="Most likely tokens to sample from; 0: all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, metavar="X", help="Nucleus; 1: off.", rich_help_panel=_SAMPLING)]
MinP = Annotated[float, typer.Option("--min-p", min=0.0, max=1.0, metavar="X", help="Least share of the likeliest; 0: off.", rich_help_panel=_SAMPLING)]
RepeatPenalty = Annotated[float, typer.Option("--repeat-penalty", min=0.0, metavar="X", help="Of repeated tokens; 1: off.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option("-s", "--seed", metavar="N", help="Of the sampling; default: random.", rich_help_panel=_SAMPLING)]
