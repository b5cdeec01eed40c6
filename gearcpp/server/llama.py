"""`ServedLlama`: a gearcpp.Llama whose answers come from the scheduler, for llama-cpp-python's server routes to call."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import llama_cpp

from gearcpp.errors import ConfigError
from gearcpp.runtime.asked import check_sampling
from gearcpp.runtime.llama import Llama

from .client import Client, current_client
from .errors import ContextLengthError
from .sampling import MOST_LOGPROBS, Sampler, SamplerParams
from .scheduler import Scheduler
from .sequence import Sequence as Answer
from .sequence import TokenLogprob

_MAX_SEED = 2**32 - 1  # llama.cpp takes this one to mean: any


class ServedLlama(Llama):
    """A model with a scheduler over its context, or, with ``embedding``, a model that only embeds.

    Args:
        name: what answers call the model; its path, if not given.
        n_parallel: most sequences decoded together; they share the ``n_ctx`` cells.
        arguments: those of gearcpp.Llama.

    Attributes:
        scheduler: None in a model that embeds.
        embedder: the model that `create_embedding` of one that does not embed itself goes to.
    """

    scheduler: Scheduler | None = None
    embedder: ServedLlama | None = None

    def __init__(self, model_path: str, *, name: str = "", n_parallel: int = 1, **arguments: Any) -> None:
        self._embedding_lock = threading.Lock()  # before anything can fail: close() runs even then
        n_batch = arguments.get("n_batch", 512)
        if not 1 <= n_parallel <= min(n_batch, llama_cpp.llama_max_parallel_sequences()):
            most = min(n_batch, llama_cpp.llama_max_parallel_sequences())
            raise ConfigError(f"parallel must be 1 to {most} (with n_batch={n_batch}), not {n_parallel}")
        self.name = name or str(model_path)
        self.n_parallel = n_parallel
        self._is_embedder = bool(arguments.get("embedding"))
        self._n_sequences = 1 if self._is_embedder else n_parallel
        super().__init__(model_path, **arguments)
        if not (self.has_chat_template or self.chat_handler or arguments.get("chat_format")):
            self.chat_handler = _refuse_chat
        if not self._is_embedder:
            self.scheduler = Scheduler(self, n_parallel)

    # The parent makes the parameters, then fills what it has arguments for; for these it has none.
    @property
    def context_params(self) -> llama_cpp.llama_context_params:
        """llama.cpp's parameters that the context was made with."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: llama_cpp.llama_context_params) -> None:
        params.n_seq_max = self.n_parallel
        params.kv_unified = True
        self._context_params = params

    def close(self) -> None:
        """End the scheduler, then free everything."""
        if self.scheduler:
            self.scheduler.close()
        with self._embedding_lock:
            super().close()

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # Completions. Chat comes here, too: llama-cpp-python's chat handlers render the messages and convert what this returns.
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def create_completion(  # type: ignore[override]
        self,
        prompt: str | list[int],
        *,
        suffix: str | None = None,
        max_tokens: int | None = 16,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        seed: int | None = None,
        model: str | None = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        grammar: Any = None,
        logit_bias: Mapping[Any, float] | None = None,
        tfs_z: float = 1.0,
        **sampling: Any,
    ) -> Any:
        """One answer, as llama_cpp.Llama.create_completion gives it: a dict, or with ``stream`` an iterator of them.

        What is wrong with the arguments is raised here, also with ``stream``.

        Raises:
            ContextLengthError: the prompt does not fit into the context.
            ConfigError: an argument is out of range, or not supported.
        """
        if not self.scheduler:
            raise ConfigError("this model is served for embeddings only")
        if suffix:
            raise ConfigError("suffix is not supported")
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise ConfigError(f"logprobs must be 0 to {MOST_LOGPROBS}, not {logprobs}")
        if logprobs is not None and echo:
            raise ConfigError("logprobs are those of the answer, not of the prompt: leave echo or logprobs out")
        check_sampling({**sampling, "tfs_z": tfs_z})
        if max_tokens is not None and max_tokens < -1:
            raise ConfigError(f"max_tokens must be 0 or more, or -1 for as many as fit, not {max_tokens}")
        tokens = self._prompt_tokens(prompt)
        head = {"id": f"cmpl-{uuid.uuid4()}", "object": "text_completion", "created": int(time.time()), "model": self.name}
        opening = prompt if echo and isinstance(prompt, str) else ""
        if max_tokens == 0:
            return _nothing(head, opening, len(tokens), stream)
        answer = Answer(
            self.model,
            tokens,
            max_tokens=min(max_tokens if max_tokens is not None and max_tokens > 0 else self.n_ctx(), self.n_ctx() - len(tokens)),
            sampler=Sampler(
                self,
                SamplerParams(**{name: value for name, value in sampling.items() if value is not None}),
                seed=random.randrange(_MAX_SEED) if seed is None else seed % _MAX_SEED,
                logit_bias=_token_biases(logit_bias),
                grammar=grammar,
                processors=logits_processor or (),
            ),
            stops=[stop] if isinstance(stop, str) else list(stop or ()),
            n_logprobs=logprobs,
            stopping=stopping_criteria,
        )
        if client := current_client.get():
            client.when_gone(answer.cancel)
        self.scheduler.submit(answer)
        offset = len(prompt) if isinstance(prompt, str) else 0
        return _chunks(answer, head, opening, offset, client) if stream else _completion(answer, head, opening, offset)

    def _prompt_tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            tokens = self.tokenize(prompt.encode("utf-8", "replace"), add_bos=self._model.add_bos_token(), special=True)
        else:
            tokens = list(prompt)
        if not tokens and self.token_bos() != -1:
            tokens = [self.token_bos()]
        if not tokens:
            raise ConfigError("the prompt is empty")
        if len(tokens) >= self.n_ctx():
            raise ContextLengthError(f"the prompt has {len(tokens)} tokens; this server's context has {self.n_ctx()} for prompt and answer")
        return tokens

    # -----------------------------------------------------------------------------------------------------------------------------------------
    # Embeddings
    # -----------------------------------------------------------------------------------------------------------------------------------------

    def create_embedding(self, input: str | list[str], model: str | None = None) -> Any:
        """Embeddings of unit length, one after the other.

        Raises:
            ConfigError: the server was started without embeddings.
            ContextLengthError: a text has more tokens than fit into a batch; nothing is cut off silently.
        """
        if not self._is_embedder:
            if not self.embedder:
                raise ConfigError("this server does not embed: start it with --embeddings")
            return self.embedder.create_embedding(input, model)
        texts = [input] if isinstance(input, str) else input
        if not texts:
            raise ConfigError("there is nothing to embed")
        for text in texts:
            n_tokens = len(self.tokenize(text.encode("utf-8", "replace")))
            if n_tokens > self.n_batch:
                raise ContextLengthError(f"a text to embed has {n_tokens} tokens; at most {self.n_batch} are taken (n_batch)")
        with self._embedding_lock:
            vectors, n_tokens = self.embed(texts, normalize=True, truncate=False, return_count=True)
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)],
            "model": self.name,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }


def _refuse_chat(**_: Any) -> Any:
    """In place of Llama 2's format, which the parent would take for a model that brings no template."""
    raise ConfigError("this model has no chat template: use /v1/completions, or start the server with --chat-format")


def _token_biases(logit_bias: Mapping[Any, float] | None) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in (logit_bias or {}).items()}
    except ValueError as error:
        raise ConfigError("logit_bias must map token numbers to numbers") from error


def _completion(answer: Answer, head: dict[str, Any], opening: str, offset: int) -> dict[str, Any]:
    pieces = list(answer.pieces())
    logprobs = [entry for piece in pieces for entry in piece.logprobs]
    text = opening + "".join(piece.text for piece in pieces)
    choice = _choice(text, logprobs if answer.has_logprobs else None, offset, answer.finish_reason)
    return {**head, "choices": [choice], "usage": _usage(answer)}


def _nothing(head: dict[str, Any], opening: str, n_prompt: int, stream: bool) -> Any:
    """An answer of no tokens, as max_tokens=0 asks for: nothing is evaluated."""
    usage = {"prompt_tokens": n_prompt, "completion_tokens": 0, "total_tokens": n_prompt}
    whole = {**head, "choices": [_choice(opening, None, 0, "length")]}
    if not stream:
        return {**whole, "usage": usage}
    if client := current_client.get():
        client.last_event = {**head, "choices": [], "usage": usage}
    return iter([whole])


def _usage(answer: Answer) -> dict[str, int]:
    return {"prompt_tokens": answer.n_prompt, "completion_tokens": answer.n_answer, "total_tokens": len(answer.tokens)}


def _chunks(answer: Answer, head: dict[str, Any], opening: str, offset: int, client: Client | None) -> Iterator[dict[str, Any]]:
    try:
        if opening:
            yield {**head, "choices": [_choice(opening, None, offset, None)]}
        for piece in answer.pieces():
            yield {**head, "choices": [_choice(piece.text, piece.logprobs if answer.has_logprobs else None, offset, None)]}
        if client:
            client.last_event = {**head, "choices": [], "usage": _usage(answer)}
        yield {**head, "choices": [_choice("", None, offset, answer.finish_reason)]}
    finally:
        answer.cancel()  # nothing, when it is complete


def _choice(text: str, logprobs: list[TokenLogprob] | None, offset: int, reason: str | None) -> dict[str, Any]:
    lists = logprobs and {
        "tokens": [entry.text for entry in logprobs],
        "text_offset": [offset + entry.start for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [entry.top for entry in logprobs],
    }
    return {"text": text, "index": 0, "logprobs": lists or None, "finish_reason": reason}
