"""One answer at a time: what keeps the threads of a program from each other's answers, and what logits processors do or raise from being lost."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llama_cpp.llama import LogitsProcessorList

from ..errors import BusyError, ConfigError

Tokens = Generator[int, Sequence[int] | None, None]


class Turns:
    """Whose turn a context is. A whole answer waits for another thread's; of two answers that are read step by step, the later one goes on."""

    def __init__(self) -> None:
        self._answer = threading.RLock()
        self._step = threading.RLock()
        self._now: object = None
        self.tokens: list[int] = []  # of the latest answer

    @contextmanager
    def answer(self) -> Iterator[None]:
        """A whole answer: other threads' whole answers wait."""
        with self._answer:
            yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of llama.cpp's: no other thread may touch the context meanwhile."""
        with self._step:
            yield

    def take(self, tokens: Tokens, processors: Processors | None, at_the_end: Callable[[], None], *, may_send: bool) -> Tokens:
        """Pass on the tokens of `llama_cpp.Llama.generate` while it is this answer's turn.

        Args:
            tokens: what generate gives.
            processors: those that were given to generate, or None.
            at_the_end: called when the answer ends, however it does, unless another one goes on.
            may_send: whether the caller may send tokens into the answer.

        Raises:
            BusyError: another answer was begun meanwhile, and has emptied the context or goes on from it.
            ConfigError: tokens were sent that may not be.
        """
        turn: object = None
        sent: Sequence[int] | None = None
        try:
            while True:
                with self._step:
                    if turn is None:
                        turn = self._now = object()
                        self.tokens = []
                    elif turn is not self._now:
                        raise BusyError("another answer was begun before this one ended; finish one after the other, take a Llama each, or gearcpp serve")
                    try:
                        token = tokens.send(sent)
                    except StopIteration:
                        return
                    finally:
                        if processors is not None:
                            processors.raise_failure()
                    self.tokens.append(token)
                sent = yield token
                if sent is not None and not may_send:
                    raise ConfigError("tokens that are sent into generate need logits_all=True")  # without it llama.cpp ends the process
        finally:
            with self._step:
                tokens.close()
                if turn is self._now:
                    at_the_end()


class Processors(LogitsProcessorList):
    """Logits processors whose errors are kept: llama.cpp calls them through C, where an exception is printed and lost, and the answer goes on without."""

    failure: BaseException | None = None

    def __init__(self, processors: Sequence[Any]) -> None:
        super().__init__(self._kept(processor) for processor in processors)

    def _kept(self, processor: Any) -> Any:
        def call(input_ids: Any, logits: Any) -> Any:
            if self.failure is not None:
                return logits
            try:
                return processor(input_ids, logits)
            except BaseException as error:  # Ctrl-C, too
                self.failure = error
                return logits

        return call

    def raise_failure(self) -> None:
        """Raise what a processor raised, once."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def with_bias(logit_bias: Mapping[Any, Any] | None, processors: Sequence[Any] | None, n_vocab: int) -> Sequence[Any] | None:
    """The processors, and after them one that adds ``logit_bias``; llama_cpp.Llama would use neither where both are given.

    Raises:
        ConfigError: a token that the model does not have, or a bias that is no number.
    """
    if not logit_bias:
        return processors
    try:
        biases = {int(token): float(bias) for token, bias in logit_bias.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"logit_bias must map tokens to numbers: {error}") from error
    for token, bias in biases.items():
        if not 0 <= token < n_vocab or math.isnan(bias):
            raise ConfigError(f"logit_bias: {bias} for token {token}; tokens are 0 to {n_vocab - 1}, and a bias is a number")
    tokens, values = list(biases), list(biases.values())

    def add(input_ids: Any, logits: Any) -> Any:
        biased = logits.copy()
        biased[tokens] += values
        return biased

    return LogitsProcessorList([*(processors or ()), add])
