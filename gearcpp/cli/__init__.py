"""The `gearcpp` command.

Every command is a module of this package that registers its function with ``@app.command()`` when it is imported. Modules and functions keep the heavy
imports (llama_cpp, numpy, huggingface_hub) inside what needs them, so that `gearcpp --help` answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Annotated

import typer

from gearcpp.errors import ConfigError, GearError

COMMANDS = ("chat", "generate", "info", "bench", "check", "perplexity", "evaluate", "convert", "serve")

app = typer.Typer(
    name="gearcpp",
    help="llama.cpp with a compressed KV cache (GEAR).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from gearcpp import __version__

        typer.echo(f"gearcpp {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None: ...


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave: 0 done, 1 failed, 2 bad arguments, 130 Ctrl-C.

    Errors are one line that says what was wrong and what to do; with ``-v`` the traceback comes, too.
    """
    from gearcpp.cli._console import printed_traceback, stderr

    try:
        _import_commands()
        app(arguments, prog_name="gearcpp")
    except KeyboardInterrupt:  # while the commands were imported; from then on typer sees to it
        sys.exit(130)
    except GearError as error:
        if not printed_traceback():
            stderr.print(f"[bold red]error:[/] {_one_line(error)}", soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except BrokenPipeError:  # `gearcpp generate | head -1`: whoever read is gone; nothing is left to say, and Python must not try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not printed_traceback():
            stderr.print(f"[bold red]unexpected {type(error).__name__}:[/] {_one_line(error)} (a defect; -v shows where)", soft_wrap=True)
        sys.exit(1)


def _import_commands() -> None:
    for command in COMMANDS:
        if importlib.util.find_spec(f"{__name__}.{command}"):
            importlib.import_module(f"{__name__}.{command}")


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))
