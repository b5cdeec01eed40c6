"""One answer in the making: `Sequence`. The scheduler's thread advances it, the client's thread reads what it says."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

from .errors import CancelledError
from .sampling import Sampler, logits_of, token_bytes, top_logprobs
from .text import TextStream


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer as OpenAI's API reports it.

    Attributes:
        start: where its text begins in the answer, in characters.
        text: its own text.
        logprob: natural logarithm of its probability before any sampling.
        top: the likeliest tokens' texts in its place, and their log-probabilities.
    """

    start: int
    text: str
    logprob: float
    top: dict[str, float]


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and the tokens that it is of (only where log-probabilities were asked for)."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Sequence:
    """A prompt, how it goes on, and what came of it so far.

    Args:
        model: llama.cpp's model, for what its tokens stand for.
        prompt: tokens.
        max_tokens: tokens of the answer.
        sampler: of this sequence alone; freed at the end.
        stops: strings that end the answer.
        n_logprobs: alternatives to report with each token; None: no log-probabilities.
        stopping: asked after each token with all tokens and its logits whether this is the end.

    Attributes:
        tokens: prompt and answer; the scheduler sees to it that all of them but the last get into the cache.
        n_prompt: how many of them are the prompt's.
        finish_reason: why the answer is complete, as OpenAI's API says it: "stop" or "length"; None before.
        cancelled: nobody waits for it any more; the scheduler drops it before its next step.
    """

    def __init__(
        self,
        model: Any,
        prompt: list[int],
        *,
        max_tokens: int,
        sampler: Sampler,
        stops: list[str],
        n_logprobs: int | None = None,
        stopping: Callable[[Any, Any], bool] | None = None,
    ) -> None:
        assert prompt and max_tokens > 0
        self.tokens = list(prompt)
        self.n_prompt = len(prompt)
        self.cancelled = False
        self.finish_reason: str | None = None
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._max_tokens = max_tokens
        self._sampler = sampler
        self._text = TextStream(stops)
        self._n_logprobs = n_logprobs
        self._logprobs: deque[TokenLogprob] = deque()
        self._stopping = stopping
        self._shown = 0
        self._events: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()

    @property
    def n_answer(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self._n_logprobs is not None

    @property
    def n_left(self) -> int:
        """Most tokens that the answer may still get."""
        return self._max_tokens - self.n_answer

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # The client's side
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Nobody waits for it any more. From any thread, at any time."""
        self.cancelled = True

    def pieces(self) -> Iterator[Piece]:
        """The answer as it comes. Raises what it failed with. Once only."""
        while event := self._events.get():
            if isinstance(event, BaseException):
                raise event
            yield event

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # The scheduler's side
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def advance(self, context: Any, index: int) -> bool:
        """Choose the next token by the logits of a token of the batch just decoded. Whether the answer is complete."""
        row = logits_of(context, index, self._n_vocab).copy() if self._n_logprobs is not None else None
        token = self._sampler.sample(context, index, self.tokens)
        if llama_cpp.llama_vocab_is_eog(self._vocab, token):
            self._end("stop")
            return True
        self.tokens.append(token)
        data = token_bytes(self._vocab, token)
        if row is not None:
            self._logprobs.append(self._describe(row, token, data))
        self._show(self._text.push(data))
        if self._text.stopped or (self._stopping and self._stopping(np.array(self.tokens, np.intc), row)):
            self._end("stop")
        elif self.n_left <= 0:
            self._end("length")
        else:
            return False
        return True

    def fail(self, error: BaseException) -> None:
        """It ends without an answer."""
        self._sampler.close()
        self._events.put(error)

    def drop(self) -> None:
        """It was cancelled."""
        self.fail(CancelledError("the client is gone, or the server stops"))

    def _end(self, reason: str) -> None:
        self._show(self._text.finish(), last=True)
        self._sampler.close()
        self.finish_reason = reason
        self._events.put(None)

    def _show(self, text: str, *, last: bool = False) -> None:
        self._shown += len(text)
        logprobs = []
        while self._logprobs and (self._logprobs[0].start < self._shown or (last and not self._text.stopped)):
            logprobs.append(self._logprobs.popleft())
        if text or logprobs:
            self._events.put(Piece(text, logprobs))

    def _describe(self, row: Any, token: int, data: bytes) -> TokenLogprob:
        assert self._n_logprobs is not None
        logprob, best = top_logprobs(row, token, self._n_logprobs)
        texts = {token_bytes(self._vocab, other).decode("utf-8", "replace"): value for other, value in reversed(best)}
        return TokenLogprob(self._text.length, data.decode("utf-8", "replace"), logprob, dict(sorted(texts.items(), key=lambda item: -item[1])))
