"""From the options of a command to a conversation with a loaded model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gearcpp.cli._console import notice
from gearcpp.cli._conversation import Conversation, Sampling
from gearcpp.cli._model import load_model, resolve_model
from gearcpp.model_files import assistant_model

TEMPERATURE = 0.8

# What the assistant of 135 million parameters needs to answer at all: with its template's own system prompt, or sampled, it rambles.
_ASSISTANT_SYSTEM = "You are a helpful assistant."
_ASSISTANT_TEMPERATURE = 0.0
_ASSISTANT_PREDICT = 512  # greedy answers of so small a model can go round in circles


def is_assistant(model: Path | None, hf: str | None) -> bool:
    """Whether these options leave the choice to the extra `assistant`, and it is there."""
    return not model and not hf and assistant_model() is not None


def temperature(given: float | None, model: Path | None, hf: str | None) -> float:
    """The temperature that was asked for, or the model's."""
    return given if given is not None else _ASSISTANT_TEMPERATURE if is_assistant(model, hf) else TEMPERATURE


@contextmanager
def conversation(
    *,
    model: Path | None,
    hf: str | None,
    kv: str,
    kv_budget: str | None = None,
    ctx_size: int | None,
    threads: int | None,
    swa_full: bool,
    verbose: bool,
    system_prompt: str | None,
    predict: int | None,
    sampling: Sampling,
    seed: int | None,
    stopped: Callable[[], bool],
    plain: bool = False,
) -> Iterator[Conversation]:
    """Load the model for as long as the ``with`` statement lasts; the arguments are the options of the same names."""
    if not plain and is_assistant(model, hf):
        system_prompt = _ASSISTANT_SYSTEM if system_prompt is None else system_prompt
        predict = _ASSISTANT_PREDICT if predict is None else predict
    llm = load_model(resolve_model(model, hf), kv, kv_budget=kv_budget, n_ctx=ctx_size, n_threads=threads, swa_full=swa_full, verbose=verbose)
    try:
        yield Conversation(
            llm,
            system=system_prompt,
            sampling=sampling,
            seed=random.getrandbits(31) if seed is None else seed,
            n_predict=predict,
            plain=plain,
            stopped=stopped,
            on_shift=lambda n: notice(f"\n(the context is full: its oldest {n} tokens are dropped)"),
        )
    finally:
        llm.close()
